# SPDX-License-Identifier: Apache-2.0
"""The configurations of every Triton kernel that the launchers use at model shapes.

Each file of kernels has a file of its name here, with a function ``configurations``.
"""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from fastasr import kernels

from .configuration import Configuration

KERNELS = Path(kernels.__file__).parent
# The architectures that share a table of tiles, by the one that ``generation`` of kernels/_launch.py names.
GENERATIONS = {80: (80, 86, 89), 90: (90,), 100: (100,), 120: (120,)}


def kernel_files() -> list[str]:
    """Returns the kernels' files, without those that several kernels share."""
    return sorted(path.stem for path in KERNELS.glob("[!_]*.py"))


def configurations() -> Iterator[Configuration]:
    """Returns what the launchers use at model shapes: every kernel, mask kind, tile shape and element type.

    A function of kernels whose tiles depend on the generation takes it, and serves the architectures of that table.
    """
    for name in kernel_files():
        if not (Path(__file__).parent / f"{name}.py").exists():
            continue  # nothing is measured of this kernel
        own = import_module(f"{__name__}.{name}").configurations
        if not inspect.signature(own).parameters:
            yield from own()
            continue
        for generation, architectures in GENERATIONS.items():
            for configuration in own(generation):
                yield replace(configuration, architectures=architectures)
