# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/clamped_linear.py."""

from fastasr.kernels import clamped_linear as kernels

from .configuration import Configuration


def configurations():
    flat = {"TAIL": False, "BLOCK": kernels.BLOCK, "num_warps": kernels.NUM_WARPS}
    alone = {"NEXT_LOW": None, "NEXT_HIGH": None}
    for dtype in ("fp32", "bf16"):
        types = dict.fromkeys(("Z", "Y", "GRAD", "DZ", "LOW", "HIGH", "NEXT_LOW", "NEXT_HIGH"), dtype)
        for label, constants in (("silu, next", {"ACTIVATION": 1}), ("identity", {"ACTIVATION": 0, **alone})):
            for name, kernel in (("forward", kernels.forward_kernel), ("backward", kernels.backward_kernel)):
                for halves in ({},) if name == "forward" else ({"HALVES": False}, {"HALVES": True}):
                    half = ", halves at a bound" if halves.get("HALVES") else ""
                    yield Configuration(
                        f"clamped_linear {name}, {label}, {dtype}{half}",
                        kernel,
                        types,
                        constants | halves | flat,
                    )
