# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/add_norm.py."""

from fastasr.kernels import add_norm

from .configuration import DTYPES, Configuration, norm_tile


def configurations(generation: int):
    def configuration(kernel: str, dtype: str, channels: int, update: str = "", form: str = ""):
        # x, t and the parameters have the first dtype, update and y the second
        update = update or dtype
        gemma = form != ""
        constants = {"CENTRED": not gemma, "LIMITED": gemma}
        constants |= {"BIAS": None} if gemma else {"UPDATE_WEIGHT": None}
        constants |= {"T_TYPE": add_norm.TYPES[DTYPES[dtype]]}
        constants |= norm_tile(kernel, channels, dtype, generation, gated=gemma, norms=1 + gemma)
        types = dict.fromkeys(("X", "T", "DX", "GRAD_T"), dtype)
        types |= dict.fromkeys(("UPDATE", "Y", "GRAD_Y", "DUPDATE"), update)
        types |= dict.fromkeys(("WEIGHT", "BIAS", "UPDATE_WEIGHT"), "fp32")
        return Configuration(
            f"add_norm {kernel}, {form}C={channels}, {dtype}" + f", {update} branch" * (update != dtype),
            getattr(add_norm, f"{kernel}_kernel"),
            types | {"PARTS": "fp64" if dtype == "fp32" else "fp32"},
            constants,
            ("C", "x_stride", "update_stride"),
            ("eps", "scale", "update_limit", "limit"),
        )

    for kernel in ("forward", "backward"):
        for channels in (512, 1024):
            yield configuration(kernel, "fp32", channels)
            yield configuration(kernel, "bf16", channels)
            yield configuration(kernel, "fp32", channels, "bf16")
        for dtype in ("fp32", "bf16"):
            yield configuration(kernel, dtype, 1024, form="rms of both, ")
