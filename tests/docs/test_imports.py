# SPDX-License-Identifier: Apache-2.0
"""Imports among fastasr's modules go down the layers and never in a circle. Imports inside functions count."""

import graphlib
from functools import cache

import pytest
import sources

# The layers start with the lowest: a package imports itself and those before it. "fastasr" is the package's own file.
CORE = (
    *(
        "_transforms",
        "_recording",
        "packed_frames",
        "_left",
        "_tables",
        "_nearest",
        "files",
        "processor",
        "kernels",
    ),
    *("ops", "rnnt", "compat", "testing", "models", "graphs", "swap"),
    *("_registration", "fastasr"),
)
ASR = ("asr", "asr.recogniser", "asr.export", "asr.decoding", "asr.audio", "asr.streaming", "asr.recipe")
LAYERS = (*CORE, *ASR, "benchmarks", "asr.demo", "cli")


@cache
def imports():
    """Returns module -> those that it imports."""
    return {name: sources.imported(path) - {name} for name, path in sources.modules().items()}


def layer(module):
    _, *parts = module.split(".")
    return LAYERS.index(".".join(parts[: 2 if parts[:1] == ["asr"] else 1]) or module)


def test_no_circles():
    try:
        graphlib.TopologicalSorter(imports()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_imports_go_down():
    pairs = [(a, b) for a, those in imports().items() for b in those]
    wrong = [f"{a} imports {b}" for a, b in pairs if a != "fastasr" and layer(a) < layer(b)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["fastasr.ops", "fastasr.kernels"])
def test_ops_share_through_shared_files(package):
    """What several ops share is in a file with an underscore, so that a change of one op concerns that op alone."""
    users = [name for name in imports() if name.startswith(f"{package}.")]
    files = {name for name in users if not name.startswith(f"{package}._")}
    of_all = f"{package}._written.", f"{package}._wrapped."
    wrong = [f"{a} imports {b}" for a in users if not a.startswith(of_all) for b in imports()[a] & files]
    assert not wrong, "\n".join(wrong)
