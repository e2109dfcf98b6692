# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the seed of the run, its folder of measured choices, and the tests that need a GPU.

``SEED`` in the environment repeats a run's random numbers; without it, each run draws a seed. The processes that a test
starts inherit it. Tests of whole models run on one thread. With FASTASR_LEDGER a test that has passed with the same
files is skipped.
"""

import gc
import os
import sys
import tempfile

import pytest
import torch
from steps import seeded

from fastasr.testing import seeds

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
    if path := os.environ.get("FASTASR_LEDGER"):
        from ledger import Ledger

        ledger = Ledger(config, path)
        config.pluginmanager.register(ledger, "ledger")
        if not hasattr(config, "workerinput"):
            print(f"of {len(ledger.done)} files whose tests have passed, {len(ledger.skipped)} are skipped")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):
    inner = [item for item in items if item.get_closest_marker("inner")]
    yield
    items += [item for item in inner if item not in items]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


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
