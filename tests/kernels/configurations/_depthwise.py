# SPDX-License-Identifier: Apache-2.0
"""Configurations of kernels that several convolutions share."""

from fastasr.kernels import _maps as maps
from fastasr.kernels import _sliding_taps as sliding

from .configuration import DTYPES, Configuration


def depthwise(
    op: str, dtype: str, types: dict, taps: tuple[int, int], width: int, channels: int, residual: bool
):
    tile = maps.form(taps[0], 1500, DTYPES[dtype]) | {"RESIDUAL": residual, "num_warps": maps.NUM_WARPS}
    tile |= {"WIDTH": width, "OUT_WIDTH": width, "C": channels, "TAPS_F": taps[1]}
    for name, constants in (
        ("forward", {**tile, "TURNED": False}),
        ("input gradient", {**tile, "TURNED": True, "BIAS": None}),
    ):
        name = f"{op} {name}, {dtype}"
        yield Configuration(name, maps.forward_kernel, types, constants)


def taps_gradients(
    name,
    types,
    taps: int,
    shape: sliding.Map,
    divisible,
    steps=(0, 0),
    pixel: int = 0,
    chunked: bool = False,
    recordings: bool = False,
):
    steps = dict(zip(("G_STEP", "X_STEP"), steps, strict=True)) | {"PIXEL": pixel}
    segments = sliding.Segments(1500, 20, 1500, taps, 1, 64, DTYPES[types["G"]])
    constants = (
        segments.form(shape)
        | steps
        | {"EARLY": taps // 2 >= segments.taps, "CHUNKED": chunked, "num_warps": sliding.NUM_WARPS}
    )
    constants |= {} if recordings else {"GROUPS": None}
    divisible = (*divisible, "g_tile", "x_tile")
    return Configuration(name, sliding.gradient_kernel, types, constants, divisible)
