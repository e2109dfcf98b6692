# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/conv_spatial_gate.py."""

from fastasr.kernels import _layer_norm
from fastasr.kernels import conv_spatial_gate as gate

from .configuration import Configuration


def configurations():  # the weight's gradient is that of gated_depthwise_conv
    like = ("FACTOR", "GATE", "U", "Y", "GRAD", "Q", "DFACTOR", "DGATE")
    parameters = ("NORM_WEIGHT", "NORM_BIAS", "WEIGHT", "BIAS", "TABLE", "DWEIGHT", "DBIAS")
    divisible = ("C", "x_batch", "x_time")
    tile = gate.convolving(31, 750) | {"num_warps": gate.NUM_WARPS}
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(like, dtype) | dict.fromkeys(parameters, "fp32") | {"MASK": "u8"}
        types |= {"PARTS": "fp64" if dtype == "fp32" else "fp32"}
        for activation, label in ((0, ""), (4, ", gelu")):
            constants = {**tile, "ACTIVATION": activation}
            for name in ("forward", "output_gradient"):
                kernel = getattr(gate, f"{name}_kernel")
                name = f"conv_spatial_gate {name.replace('_', ' ')}{label}, {dtype}"
                yield Configuration(name, kernel, types, constants, divisible)
        name = f"conv_spatial_gate input gradient, {dtype}"
        yield Configuration(name, gate.input_gradient_kernel, types, tile, divisible)
        if dtype == "fp16":
            continue
        for channels in (512, 1536):
            whole = _layer_norm.row_tile(channels, gate.NORMALISE_ELEMENTS, gate.NORMALISE_WARPS)
            block_r = max(1, gate.GRADIENT_ELEMENTS // whole["BLOCK_C"])
            parts = whole | {"BLOCK_R": block_r, "num_warps": gate.GRADIENT_WARPS}
            for name, of_rows in (("normalise", whole), ("norm_gradient", parts)):
                constants = of_rows | {"MASK": None, "TILE_K": gate.BLOCK_K, "TILE_C": gate.BLOCK_C}
                kernel = getattr(gate, f"{name}_kernel")
                name = f"conv_spatial_gate {name.replace('_', ' ')}, C={channels}, {dtype}"
                yield Configuration(name, kernel, types, constants, divisible, ("eps",))
