# SPDX-License-Identifier: Apache-2.0
"""Imports among fastasr's modules go down the layers and never in a circle. Imports inside functions count.

scripts/sources.py, which reads them, finds every op and every kernel.
"""

import graphlib

import pytest
import sources

from fastasr import ops

# The layers start with the lowest: a package imports itself and those before it. "fastasr" is the package's own file.
LAYERS = (
    *("_transforms", "_left", "_recording", "_renamed", "files", "processor", "kernels"),
    *("ops", "rnnt", "compat", "testing", "models", "graphs", "export", "decoding", "swap"),
    *("_registration", "fastasr"),
    *("audio", "streaming", "recipe", "benchmarks", "demo", "cli"),
)


IMPORTS = {name: sources.imported(path) - {name} for name, path in sources.modules().items()}


def layer(module):
    return LAYERS.index(module.split(".")[1] if "." in module else module)


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


@pytest.mark.parametrize("package", ["fastasr.ops", "fastasr.kernels"])
def test_ops_share_through_shared_files(package):
    """What several ops share is in a file with an underscore, so that a change of one op concerns that op alone."""
    files = {
        name for name in IMPORTS if name.startswith(f"{package}.") and not name.startswith(f"{package}._")
    }
    wrong = [f"{a} imports {b}" for a in IMPORTS if a.startswith(f"{package}.") for b in IMPORTS[a] & files]
    assert not wrong, "\n".join(wrong)


def test_every_kernel_is_reached_from_the_bindings():
    kernels = set((sources.ROOT / "csrc/cpu").rglob("*.cpp"))
    assert kernels <= sources.closure(*(sources.ROOT / "csrc/bindings").glob("*.cpp"))


def test_every_op_is_found():
    assert set(ops.NAMES) <= sources.ops().keys()
