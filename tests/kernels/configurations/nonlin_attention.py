# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/nonlin_attention.py."""

from fastasr.kernels import nonlin_attention as module

from .configuration import Configuration


def configurations():
    divisible = ("width", "stride")
    names = ("P", "X", "SUMS", "Y", "U", "GRAD", "DX", "DP")
    tile = module.tile(144)
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(names, dtype)
        for kernel in ("gate", "product", "operands", "gradient"):
            function, name = getattr(module, f"{kernel}_kernel"), f"nonlin_attention {kernel}, {dtype}"
            constants = tile | {"PRECISE": dtype == "fp32", "CONSTANT": None}
            yield Configuration(name, function, types, constants, divisible)
    types |= dict.fromkeys(names, "bf16") | {"CONSTANT": "fp32"}
    name, constants = "nonlin_attention operands, recorded, bf16", tile | {"PRECISE": False}
    yield Configuration(name, module.operands_kernel, types, constants, divisible)
