# SPDX-License-Identifier: Apache-2.0
"""Configurations of the kernels of a lattice."""

from .configuration import Configuration


def lattices(module, letter: str, sizes: tuple[int, ...], types: dict, divisible: tuple[str, ...] = ()):
    for size in sizes:
        for modified in (False, True):
            label = f"{'modified' if modified else 'regular'}, {letter}={size}"
            for kernel in ("forward", "backward"):
                name = f"{module.__name__.rpartition('.')[2]} {kernel}, {label}"
                constants = {"MODIFIED": modified, **module.tile(size)}
                yield Configuration(name, getattr(module, f"{kernel}_kernel"), types, constants, divisible)
