# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/depthwise_conv2d.py."""

from fastasr.kernels import _maps as maps
from fastasr.kernels._sliding_taps import Map

from ._depthwise import depthwise, taps_gradients
from .configuration import DTYPES, Configuration


def configurations():
    parts = {"BLOCK_P": maps.MAX_PARTS, "BLOCK_C": maps.BLOCK_C, "num_warps": maps.NUM_WARPS}
    for dtype in DTYPES:
        types = dict.fromkeys(("X", "TABLE", "BIAS", "Y", "G", "DWEIGHT", "DBIAS"), dtype) | {"PARTS": "fp32"}
        yield from depthwise("depthwise_conv2d", dtype, types, 7, residual=False)
        name = f"depthwise_conv2d weight gradient, {dtype}"
        yield taps_gradients(
            name, types, 7, Map(19, 19, 7, 3), ("C", "g_batch", "g_time", "x_batch", "x_time")
        )
        name = f"depthwise_conv2d parts, {dtype}"
        yield Configuration(name, maps.add_map_taps_kernel, types, parts, ("C",))
