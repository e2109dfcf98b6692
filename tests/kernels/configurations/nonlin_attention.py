# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/nonlin_attention.py."""

from fastasr.kernels import nonlin_attention as module

from .configuration import Configuration


def configurations():
    names = ("P", "X", "SUMS", "Y", "U", "GRAD", "DX", "DP")
    tile = {"BLOCK_T": module.BLOCK_T, "BLOCK_C": module.BLOCK_C}
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(names, dtype)
        for kernel in ("gate", "product", "operands", "gradient"):
            function = getattr(module, f"{kernel}_kernel")
            constants = tile if kernel == "product" else tile | {"PRECISE": dtype == "fp32"}
            name = f"nonlin_attention {kernel}, {dtype}"
            divisible = ("width", "stride")
            constants = constants | ({"CONSTANT": None} if kernel == "operands" else {})
            yield Configuration(name, function, types, constants, module.NUM_WARPS, divisible)
    types |= dict.fromkeys(names, "bf16") | {"CONSTANT": "fp32"}
    constants, divisible = tile | {"PRECISE": False}, ("width", "stride")
    name = "nonlin_attention operands, recorded, bf16"
    yield Configuration(name, module.operands_kernel, types, constants, module.NUM_WARPS, divisible)
