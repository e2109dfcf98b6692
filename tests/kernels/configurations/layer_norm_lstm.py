# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/layer_norm_lstm.py."""

from fastasr.kernels import layer_norm_lstm as module

from .configuration import PRODUCTS, Configuration, element_type, setting


def configurations():
    like = ("PRODUCT", "WEIGHT", "DGATES")
    own = ("GATE_WEIGHT", "GATE_BIAS", "CELL_WEIGHT", "CELL_BIAS", "Y", "GRAD")
    wide = ("RECURRENT", "HIDDEN", "CELL", "NORMED", "SCALES", "DHIDDEN", "DCELL", "BEFORE")
    for dtype, parameters in (*((dtype, "fp32") for dtype in PRODUCTS), ("bf16", "bf16")):
        types = dict.fromkeys(like, element_type(dtype)) | dict.fromkeys(wide, "fp32")
        types |= dict.fromkeys(own, parameters) | {"ARRIVED": "i32", "PARTS": "fp64"}
        for units, batch, label in ((512, 16, ""), (512, 1, ", one step")):
            with setting(dtype) as torch_dtype:
                shape = module.shapes(units, batch, 128, torch_dtype)
            types = types | {"FED": "fp32" if batch == 1 else element_type(dtype)}
            absent = {"ARRIVED": None, "NORMED": None, "SCALES": None} if batch == 1 else {}
            for name in ("forward",) if batch == 1 else ("forward", "backward"):
                kernel = getattr(module, f"{name}_kernel")
                narrow = ", bf16 parameters" * (parameters == "bf16")
                name = f"layer_norm_lstm {name}, H={units}{label}{narrow}, {dtype}"
                yield Configuration(name, kernel, types, shape | absent, ("units",), ("eps",))
    constants = {"BLOCK_R": module.PART_ROWS, "BLOCK_C": module.BLOCK_P, "num_warps": 4}
    name, divisible = "layer_norm_lstm norm gradient", ("row", "columns")
    yield Configuration(name, module.norm_gradient_kernel, types, constants, divisible)
