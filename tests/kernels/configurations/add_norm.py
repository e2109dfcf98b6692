# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/add_norm.py."""

from fastasr.kernels import _layer_norm, add_norm

from .configuration import DTYPES, Configuration


def configurations(generation: int):
    def configuration(kernel: str, dtype: str, channels: int, update: str = "", form: str = ""):
        # x, t and the parameters have the first dtype, update and y the second
        update = update or dtype
        block_c = _layer_norm.row_width(channels)
        gemma = form != ""
        constants = {"CENTRED": not gemma, "LIMITED": gemma}
        constants |= {"BIAS": None} if gemma else {"UPDATE_WEIGHT": None}
        if kernel == "forward":
            elements = _layer_norm.forward_elements(generation, norms=1 + gemma)
            block_r, _, warps = _layer_norm.row_blocks(channels, elements)
        else:
            elements, warps, _ = _layer_norm.backward_tile(channels, DTYPES[dtype], gemma, False, generation)
            block_r = max(1, elements // block_c)
            constants |= {"T_TYPE": add_norm.TYPES[DTYPES[dtype]]}
        types = dict.fromkeys(("X", "T", "DX", "GRAD_T"), dtype)
        types |= dict.fromkeys(("UPDATE", "Y", "GRAD_Y", "DUPDATE"), update)
        types |= dict.fromkeys(("WEIGHT", "BIAS", "UPDATE_WEIGHT"), "fp32")
        return Configuration(
            f"add_norm {kernel}, {form}C={channels}, {dtype}" + f", {update} branch" * (update != dtype),
            getattr(add_norm, f"{kernel}_kernel"),
            types | {"PARTS": "fp64" if dtype == "fp32" else "fp32"},
            constants | {"BLOCK_R": block_r, "BLOCK_C": block_c},
            warps,
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
