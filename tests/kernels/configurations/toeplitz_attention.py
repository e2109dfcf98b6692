# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/toeplitz_attention.py."""

from fastasr.kernels import toeplitz_attention as module

from .configuration import PRODUCTS, Configuration, element_type, setting


def configurations(generation: int):
    like = ("X", "VALUE", "GATE", "GRAD", "MIXED", "QUERY", "KEY", "ACTIVE", "WEIGHT", "SHIFT", "BIAS")
    like += ("G", "DGATE", "Y", "WEIGHTS", "SLOPES", "DQUERY", "DKEY", "DV", "DVALUE", "DX", "OUT")
    wide = ("TABLE", "DROPOUT", "PARTS")
    strides = [f"{name}_{of}" for name in ("x", "value", "gate", "grad") for of in ("time", "batch")]
    plain = {"HIDDEN": None, "DROPOUT": None}
    extra = {"prepare": module.PREPARE, "values": module.VALUES, "parameters": module.PARAMETERS}

    def configuration(name: str, label: str, dtype: str, d: int = 128, v: int = 1024, full=True, **constants):
        with setting(dtype) as torch_dtype:
            width, shapes = module.tiles(d, v, torch_dtype, generation, "DROPOUT" not in constants, full)
        options = shapes[name] if name in shapes else extra.get(name, {"num_warps": 4})
        element = element_type(dtype)
        pointers = dict.fromkeys(like, element) | dict.fromkeys(wide, "fp32")
        pointers |= {"PADDING": "i8", "HIDDEN": "i8"} | ({"PARTS": "fp64"} if element == "fp32" else {})
        return Configuration(
            f"toeplitz_attention {name}{label and ', ' + label}, d={d}, V={v}, {dtype}",
            getattr(module, f"{name}_kernel"),
            pointers,
            {"CAUSAL": True, "ACTIVATION": 1, "WIDTH": width} | options | constants,
            ("D", "V", *strides, "out_time", "stride"),
            ("scale",),
        )

    for name in ("forward", "slopes"):
        for dtype in PRODUCTS if name == "forward" else ("fp32", "bf16", "fp16"):
            yield configuration(name, "", dtype, **plain)
            yield configuration(name, "both ways, padding, dropout", dtype, CAUSAL=False)
        yield configuration(name, "both ways, padding", "bf16", CAUSAL=False, DROPOUT=None)
    yield configuration("forward", "", "bf16", 256, 512, **plain)
    yield configuration("forward", "", "fp16", **plain)
    yield configuration("forward", "few rows", "bf16", full=False, **plain)
    for dtype in ("fp32", "bf16"):
        forward = dict.fromkeys(("GATE", "GRAD", "MIXED", "G", "DGATE"))
        yield configuration("prepare", "forward, padding", dtype, **forward)
        yield configuration("prepare", "backward", dtype, PADDING=None, HIDDEN=None)
        yield configuration("parameters", "", dtype)
        yield configuration("diagonals", "", dtype)
        yield configuration("values", "", dtype)
