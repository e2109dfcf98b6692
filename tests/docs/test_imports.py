# SPDX-License-Identifier: Apache-2.0
"""Imports among fastasr's modules go down the layers and never in a circle. Imports inside functions count."""

import graphlib

import pytest
import sources

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


@pytest.mark.parametrize("package", ["fastasr.ops", "fastasr.kernels"])
def test_ops_share_through_shared_files(package):
    """What several ops share is in a file with an underscore, so that a change of one op concerns that op alone."""
    files = {
        name for name in IMPORTS if name.startswith(f"{package}.") and not name.startswith(f"{package}._")
    }
    mine = [
        a for a in IMPORTS if a.startswith(f"{package}.") and "._written." not in a and "._wrapped." not in a
    ]
    wrong = [f"{a} imports {b}" for a in mine for b in IMPORTS[a] & files]
    assert not wrong, "\n".join(wrong)
