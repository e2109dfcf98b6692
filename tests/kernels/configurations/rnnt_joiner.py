# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/rnnt_joiner.py."""

from fastasr.kernels import rnnt_joiner as module

from .configuration import PRODUCTS, Configuration, element_type, setting


def configurations(generation: int):
    like = dict.fromkeys(
        ("AM", "LM", "HIDDEN", "WEIGHT", "BIAS", "DLOGITS", "DBIAS", "DHIDDEN", "DA", "DAM", "DLM")
    )
    wide = dict.fromkeys(("PX", "PY", "PD", "GX", "GY", "GZ", "BEFORE"), "fp32")
    types = wide | dict.fromkeys(("STARTS", "SYMBOLS", "BOUNDARY"), "i64") | {"NORMALISER": "fp64"}
    extra = {
        "normalise": module.NORMALISE | {"BLOCK_S": 8},
        "frame_gradient": module.FRAME,
        "context_gradient": module.CONTEXT,
    }

    def configuration(name: str, label: str, dtype: str, d: int = 512, tile: dict | None = None, **constants):
        with setting(dtype) as torch_dtype:
            options = tile or (extra | module.tiles(d, torch_dtype, generation))[name]
        element = element_type(dtype)
        return Configuration(
            f"rnnt_joiner {name.replace('_', ' ')}{label and ', ' + label}, D={d}, {dtype}",
            getattr(module, f"{name}_kernel"),
            types
            | dict.fromkeys(like, element)
            | {"PARTS": "fp32" if name != "scores" and element != "fp32" else "fp64"},
            {"ACTIVATION": 3, "HAT": False, "SEED": None, "PRECISE": element == "fp32"} | options | constants,
            ("width", "d_stride", "share", *(("D", "V") if d % 16 == 0 else ())),
        )

    for dtype in (*PRODUCTS, "fp16"):
        for name in ("scores", "logits_gradient"):
            yield configuration(name, "", dtype)
            if dtype == "fp16":
                continue
            yield configuration(name, "HAT", dtype, HAT=True, BOUNDARY=None, BIAS=None)
            if dtype == "bf16":
                yield configuration(name, "odd sizes", dtype, d=100)
        yield configuration("durations", "", dtype, **dict.fromkeys(("GZ", "DLOGITS", "PARTS")))
        yield configuration("durations", "gradient", dtype, PD=None)
        if dtype in ("tf32", "fp16"):
            continue
        for name in ("hidden", *extra):
            if dtype == "fp32" or name != "normalise":  # whose kernel is that of fp32
                constants = {"BEFORE": None} if name == "context_gradient" else {}
                yield configuration(name, "", dtype, **constants)
        yield configuration("context_gradient", "a later chunk", dtype, PARTS=None, DBIAS=None)
        yield configuration("frame_gradient", "few rows", dtype, tile=module.SHORT_FRAME)
        yield configuration("hidden", "relu, odd sizes", dtype, d=100, ACTIVATION=2, BOUNDARY=None)
