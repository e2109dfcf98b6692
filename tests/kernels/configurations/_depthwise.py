# SPDX-License-Identifier: Apache-2.0
"""Configurations of kernels that several convolutions share."""

from fastasr.kernels import _maps as maps
from fastasr.kernels import _sliding_taps as sliding

from .configuration import DTYPES, Configuration


def depthwise(op: str, dtype: str, types: dict, taps: int, residual: bool):
    tile = maps.form(taps, 1500, DTYPES[dtype]) | {"RESIDUAL": residual, "num_warps": maps.NUM_WARPS}
    for name, constants in (
        ("forward", {**tile, "TURNED": False}),
        ("input gradient", {**tile, "TURNED": True, "BIAS": None}),
    ):
        name = f"{op} {name}, {dtype}"
        yield Configuration(name, maps.forward_kernel, types, constants, ("C",))


def taps_gradients(
    name,
    types,
    taps: int,
    shape: sliding.Map,
    divisible,
    tiled=(False, False),
    chunked: bool = False,
    recordings: bool = False,
):
    steps = {name: sliding.BLOCK_C * here for name, here in zip(("G_STEP", "X_STEP"), tiled, strict=True)}
    segments = sliding.Segments(1500, 20, 1500, taps, 1, 64, DTYPES[types["G"]])
    constants = segments.form(shape) | steps | {"CHUNKED": chunked, "num_warps": sliding.NUM_WARPS}
    constants |= {} if recordings else {"GROUPS": None}
    divisible = (*divisible, "g_tile", "x_tile")
    return Configuration(name, sliding.gradient_kernel, types, constants, divisible)
