# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/depthwise_conv2d.py."""

from fastasr.kernels import _maps as maps
from fastasr.kernels._sliding_taps import Map

from ._depthwise import depthwise, taps_gradients
from .configuration import DTYPES, Configuration

WIDTH, CHANNELS = 19, 128


def configurations():
    parts = {"BLOCK_P": maps.MAX_PARTS, "BLOCK_C": maps.BLOCK_C, "num_warps": maps.NUM_WARPS}
    for dtype in DTYPES:
        types = dict.fromkeys(("X", "BIAS", "Y", "G", "DWEIGHT", "DBIAS"), dtype)
        types |= {"TABLE": "fp32", "PARTS": "fp32"}
        yield from depthwise("depthwise_conv2d", dtype, types, (7, 7), WIDTH, CHANNELS, residual=False)
        name = f"depthwise_conv2d weight gradient, {dtype}"
        strides, step = ("C", "g_batch", "g_time", "x_batch", "x_time"), WIDTH * CHANNELS
        yield taps_gradients(name, types, 7, Map(WIDTH, WIDTH, 7, 3), strides, (step, step), CHANNELS)
        name = f"depthwise_conv2d parts, {dtype}"
        yield Configuration(name, maps.add_map_taps_kernel, types, parts, ("C",))
