# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/linear_activation.py."""

from fastasr.kernels import linear_activation as kernels

from .configuration import Configuration


def configurations():
    tile = {"TAIL": False, "BLOCK": kernels.BLOCK, "BLOCK_R": kernels.BLOCK_R, "BLOCK_C": kernels.BLOCK_C}
    passes = {
        "forward": kernels.forward_kernel,
        "gated forward": kernels.tiled_forward_kernel,
        "backward": kernels.backward_kernel,
        "gated backward": kernels.gated_backward_kernel,
    }
    for dtype in ("fp32", "bf16"):
        types = dict.fromkeys(("Z", "Y", "GRAD", "DZ"), dtype) | {"PARTS": "fp32", "SEED": "i64"}
        for label, number in (("silu", 1), ("gelu", 4)):
            for name, kernel in passes.items():
                constants = tile | {"ACTIVATION": number, "GATED": "gated" in name}
                constants["num_warps"] = kernels.NUM_WARPS
                title = f"linear_activation {name}, {label}, "
                plain = constants | {"SEED": None}
                yield Configuration(f"{title}{dtype}", kernel, types, plain, ("C",), ("factor",))
                if label == "silu":
                    kernel = kernels.tiled_forward_kernel if name == "forward" else kernel
                    yield Configuration(
                        f"{title}dropout, {dtype}", kernel, types, constants, ("C",), ("factor",)
                    )
