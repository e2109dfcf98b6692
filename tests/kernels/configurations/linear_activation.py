# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/linear_activation.py."""

from fastasr.kernels import linear_activation as kernels

from .configuration import Configuration


def configurations():
    tile = {"TAIL": False, "BLOCK": kernels.BLOCK, "BLOCK_R": kernels.BLOCK_R, "BLOCK_C": kernels.BLOCK_C}
    for dtype in ("fp32", "bf16"):
        types = dict.fromkeys(("Z", "Y", "GRAD", "DZ"), dtype) | {"PARTS": "fp32"}
        for label, number in (("silu", 1), ("gelu", 4)):
            constants = tile | {"ACTIVATION": number, "num_warps": kernels.NUM_WARPS}
            for kernel in ("forward", "backward", "gated_forward", "gated_backward"):
                name = f"linear_activation {kernel.replace('_', ' ')}, {label}, {dtype}"
                function = getattr(kernels, f"{kernel}_kernel")
                yield Configuration(name, function, types, constants, ("C",))
