# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the seed of the run, its folder of measured choices, and the tests that need a GPU.

``SEED`` in the environment repeats a run's random numbers; without it, each run draws a seed. The processes that a test
starts inherit it. Tests of whole models run on one thread. With ``OP`` in the environment only the tests run that
have the op's name, in their own or in their file's.
"""

import gc
import os
import re
import sys
import tempfile
from collections import Counter

import pytest
import torch
from steps import seeded

from fastasr.testing import seeds

STARTS_PROCESSES = {"benchmarks", "cli", "examples", "faults", "kernels", "packaging", "recipe"}
OF_EVERY_OP = {"test_budgets", "test_docs", "test_opgen"}
# The models are tiny: threads cost more than they bring, most of all beside other processes.
TINY_MODELS = {"asr", "models", "parity", "recipe", "streaming", "swap"}


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    print(seeds.begin())
    if config.getoption("--hypothesis-seed", None) is None:
        config.option.hypothesis_seed = os.environ["SEED"]
    if config.getoption("--hypothesis-profile", None) is None:
        # with CI set hypothesis takes another, which ignores the seed
        config.option.hypothesis_profile = "default"
    folder = tempfile.TemporaryDirectory(prefix="fastasr-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["FASTASR_CACHE"] = folder.name


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    inner = [item for item in items if item.get_closest_marker("inner")]
    if op := os.environ.get("OP"):
        config.hook.pytest_deselected(items=[item for item in items if not _is_of(item, op)])
        items[:] = [item for item in items if _is_of(item, op)]
    yield
    items += [item for item in inner if item not in items]
    _long_ones_first(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _is_of(item, op: str) -> bool:
    """Says whether a test has the name of an op, in its own name or as that of its file, or judges every op at once."""
    return item.path.stem in OF_EVERY_OP or not {op, f"test_{op}"}.isdisjoint(re.findall(r"\w+", item.nodeid))


def _long_ones_first(items: list) -> None:
    """Sorts files of tests by a guess of their time, so that no process has a long one left at the end."""
    share = Counter(item.path for item in items)
    for item in items:
        share[item.path] += 50 if item.path.parent.name in STARTS_PROCESSES else 0
        share[item.path] += 1000 if item.get_closest_marker("inner") else 0
    items.sort(key=lambda item: -share[item.path])


@pytest.fixture(autouse=True, scope="module")
def _settled():
    """Modules and collected tests live as long as the session. Python's collector leaves them out from here on: to walk
    them again and again took more time than many a test. A walk may free what held other garbage: it is repeated until
    it finds none, since what is left out stays for good, a model's copies of weights among it.
    """
    for _ in range(5):
        if not gc.collect():
            break
    gc.freeze()


@pytest.fixture(autouse=True)
def _repeatable(request):
    folder, threads = request.path.parent.name, torch.get_num_threads()
    if "fastasr._left" in sys.modules:
        sys.modules["fastasr._left"]._logged.clear()  # what is logged once in a process
    torch.set_num_threads(1 if folder in TINY_MODELS else threads)
    seeded(request.node.nodeid)
    imported = "speechbrain" in sys.modules
    yield
    torch.set_num_threads(threads)  # commands that run in this process set it for good
    if not imported and "speechbrain" in sys.modules:
        _forget_lazy_modules()


def _forget_lazy_modules():
    """SpeechBrain's import leaves modules that raise ImportError where hypothesis looks at every module."""
    for name, module in list(sys.modules.items()):
        if type(module).__module__ == "speechbrain.utils.importutils":
            del sys.modules[name]
