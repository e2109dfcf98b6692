# SPDX-License-Identifier: Apache-2.0
"""Configurations of the kernels of a lattice."""

from .configuration import Configuration


def lattices(module, letter: str, sizes: tuple[int, ...], types: dict, divisible: tuple[str, ...] = ()):
    for size in sizes:
        lanes, warps = module._lanes(size)
        for modified in (False, True):
            label = f"{'modified' if modified else 'regular'}, {letter}={size}"
            for kernel in ("forward", "backward"):
                name = f"{module.__name__.rpartition('.')[2]} {kernel}, {label}"
                function, constants = (
                    getattr(module, f"{kernel}_kernel"),
                    {"BLOCK": lanes, "MODIFIED": modified},
                )
                yield Configuration(name, function, types, constants, warps, divisible)
