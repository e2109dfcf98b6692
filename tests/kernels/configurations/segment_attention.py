# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/segment_attention.py."""

from fastasr.kernels import segment_attention as module

from .configuration import PRODUCTS, Configuration, element_type, setting


def configurations(generation: int):
    like = ("Q", "K", "V", "G", "Y", "DQ", "DK", "DV")
    wide = dict.fromkeys(("MAXIMUM", "INVERSE", "DELTA", "DROPOUT"), "fp32")
    bounds = dict.fromkeys(("LENGTHS", "HISTORY"), "i64")
    strides = [f"{name}_{of}" for name in "gqkv" for of in ("time", "batch")] + ["y_time"]

    def configuration(name: str, label: str, dtype: str, dim: int = 64, lanes: int = 1876):
        everything = "dropout" in label
        with setting(dtype) as torch_dtype:
            tile = module.tiles(dim, torch_dtype, generation, lanes, everything)[name]
        remembers = everything or "step" in label
        absent = (
            () if everything else ("DROPOUT", "LENGTHS") if remembers else ("DROPOUT", "HISTORY", "LENGTHS")
        )
        fixed = {"DIM": dim, "HAS_MEMORY": remembers} | dict.fromkeys(absent)
        return Configuration(
            f"segment_attention {name}{label and ', ' + label}, {dtype}",
            getattr(module, f"{name}_kernel"),
            dict.fromkeys(like, element_type(dtype)) | wide | bounds,
            fixed | tile,
            strides,
            ("scale",),
        )

    for dtype in PRODUCTS:
        for name in ("forward", "queries", "keys"):
            yield configuration(name, "", dtype)
            yield configuration(name, "memory, dropout, lengths, history", dtype)
            if dtype == "bf16":
                yield configuration(name, "odd sizes", dtype, 150)
    yield configuration("forward", "", "fp16")
    yield configuration("forward", "a step of a stream", "bf16", lanes=21)
