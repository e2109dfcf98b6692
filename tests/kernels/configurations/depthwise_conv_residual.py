# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/depthwise_conv_residual.py."""

from fastasr.kernels._sliding_taps import LINE

from ._depthwise import depthwise, taps_gradients
from .configuration import DTYPES

CHANNELS = 1024


def configurations():
    divisible = ("C", "g_batch", "g_time", "x_batch", "x_time")
    for dtype in DTYPES:
        types = dict.fromkeys(("X", "Y", "G"), dtype) | dict.fromkeys(("TABLE", "BIAS", "PARTS"), "fp32")
        yield from depthwise("depthwise_conv_residual", dtype, types, (3, 1), 1, CHANNELS, residual=True)
        name = f"depthwise_conv_residual weight gradient, {dtype}"
        yield taps_gradients(name, types, 3, LINE, divisible, (CHANNELS, CHANNELS))
