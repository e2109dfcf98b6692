# SPDX-License-Identifier: Apache-2.0
"""Imports among fastasr's modules go down the layers and never in a circle. Imports inside functions count.

scripts/sources.py, which reads them, finds every op and every kernel.
"""

import graphlib

import pytest
import sources

from fastasr import ops

# The layers start with the lowest: a package imports itself and those before it. "fastasr" is the package's own file.
CORE = (
    *("_transforms", "_left", "_recording", "_nearest", "files", "processor", "kernels"),
    *("ops", "rnnt", "compat", "testing", "models", "graphs", "swap"),
    *("_registration", "fastasr"),
)
ASR = ("asr", "asr.recogniser", "asr.export", "asr.decoding", "asr.audio", "asr.streaming", "asr.recipe")
LAYERS = (*CORE, *ASR, "benchmarks", "asr.demo", "cli")


IMPORTS = {name: sources.imported(path) - {name} for name, path in sources.modules().items()}


def layer(module):
    _, *parts = module.split(".")
    return LAYERS.index(".".join(parts[: 2 if parts[:1] == ["asr"] else 1]) or module)


def test_no_circles():
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_imports_go_down():
    wrong = [
        f"{a} imports {b}" for a in IMPORTS for b in IMPORTS[a] if a != "fastasr" and layer(a) < layer(b)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_kernel_is_reached_from_the_bindings():
    kernels = set((sources.ROOT / "csrc/cpu").rglob("*.cpp"))
    assert kernels <= sources.closure(*(sources.ROOT / "csrc/bindings").glob("*.cpp"))


def test_every_op_is_found():
    assert set(ops.NAMES) <= sources.ops().keys()
