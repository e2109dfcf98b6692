# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/linear_activation.py."""

from fastasr.kernels import linear_activation as kernels

from .configuration import Configuration


def configurations():
    flat = {"TAIL": False, "BLOCK": kernels.BLOCK}
    tile = {"BLOCK_R": kernels.BLOCK_R, "BLOCK_C": kernels.BLOCK_C}
    for dtype in ("fp32", "bf16"):
        types = dict.fromkeys(("Z", "Y", "GRAD", "DZ"), dtype) | {"PARTS": "fp32"}
        for label, number in (("silu", 1), ("gelu", 4)):
            for name, kernel, constants in (
                ("forward", kernels.forward_kernel, flat),
                ("backward", kernels.backward_kernel, tile),
                ("gated forward", kernels.gated_forward_kernel, tile),
                ("gated backward", kernels.gated_backward_kernel, tile),
            ):
                name = f"linear_activation {name}, {label}, {dtype}"
                constants = {"ACTIVATION": number, **constants}
                yield Configuration(name, kernel, types, constants, kernels.NUM_WARPS, ("C",))
