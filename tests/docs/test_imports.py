# SPDX-License-Identifier: Apache-2.0
"""Imports among fastasr's modules go down the layers and never in a circle. Imports inside functions count."""

import graphlib

import pytest
import sources

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
