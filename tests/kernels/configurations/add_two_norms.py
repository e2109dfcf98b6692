# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/add_two_norms.py."""

from fastasr.kernels import add_two_norms

from .configuration import DTYPES, Configuration, norm_tile


def configurations(generation: int):
    for kernel in ("forward", "backward"):
        for channels in (512, 1024):
            for dtype, update in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
                types = dict.fromkeys(("X", "T", "DX", "GRAD_T"), dtype)
                types |= dict.fromkeys(("UPDATE", "Y", "GRAD_Y", "DUPDATE"), update)
                types |= dict.fromkeys(("WEIGHT", "BIAS", "NEXT_WEIGHT", "NEXT_BIAS"), "fp32")
                constants = {"T_TYPE": add_two_norms.TYPES[DTYPES[dtype]]}
                constants |= norm_tile(kernel, channels, dtype, generation, gated=True, norms=2)
                yield Configuration(
                    f"add_two_norms {kernel}, C={channels}, {dtype}"
                    + f", {update} branch" * (update != dtype),
                    getattr(add_two_norms, f"{kernel}_kernel"),
                    types | {"PARTS": "fp64" if dtype == "fp32" else "fp32"},
                    constants,
                    ("C",),
                    ("eps", "next_eps", "scale"),
                )
