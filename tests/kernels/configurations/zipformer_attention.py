# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/zipformer_attention.py."""

from fastasr.kernels import _recordings
from fastasr.kernels import zipformer_attention as module

from .configuration import PRODUCTS, Configuration, element_type, setting


def configurations(generation: int):
    like = ("X", "K", "R", "V", "G", "Y", "REMAINDER", "DX", "DS", "DK", "DV")
    wide = dict.fromkeys(("MAXIMUM", "INVERSE", "WEIGHT", "DELTA"), "fp32")
    strides = [f"{name}_{of}" for name in ("x", "k", "v") for of in ("time", "batch")] + ["ds_row"]
    given = {"PADDING": "u8", "MASK": "u8", "BOUNDS": "i32", "PIECES": "i64", "ACT": "fp32", "EQUAL": "fp32"}
    words = {"PADDING": "padding", "MASK": "mask", "EQUAL": "equal", "WEIGHT": "equal"}
    words |= dict.fromkeys(("BOUNDS", "PIECES", "piece"), "recordings")
    words |= dict.fromkeys(("ACT", "penalty", "limit"), "penalty")

    def configuration(
        name: str, label: str, dtype: str, dim: int = 32, pos_dim: int = 4, value_dim: int = 12
    ):
        with setting(dtype) as torch_dtype:
            hiding, recordings = "mask" in label or "chunks" in label, "recordings" in label
            sizes = dim, pos_dim, value_dim, torch_dtype, generation
            shapes = module.tiles(*sizes, hiding, recordings, "penalty" in label, "equal" in label)
        element = element_type(dtype)
        packed = pos_dim == 4 and element != "fp32"
        fixed = {"DIM": dim, "POS_DIM": pos_dim, "VALUE_DIM": value_dim}
        fixed |= {"PACKED": packed, "WIDE_POS": pos_dim}
        fixed |= {"COLUMNS": shapes["queries"]["BLOCK_N"], "OTHERS": value_dim > 100}
        absent = [tensor for tensor, word in words.items() if word not in label]
        absent += ["REMAINDER"] if element == "fp32" else []
        absent += ["MAXIMUM", "INVERSE", "REMAINDER"] if "inference" in label else []
        fixed |= {"ADD": True, "WINDOW": "chunks" in label} | dict.fromkeys(absent)
        return Configuration(
            f"zipformer_attention {name}{label and ', ' + label}, {dtype}",
            getattr(module, f"{name}_kernel"),
            dict.fromkeys(like, element)
            | wide
            | given
            | {"PARTS": "fp64" if element == "fp32" else "fp32"}
            | ({"R": "i64"} if packed else {}),
            fixed | shapes[name],
            strides,
            ("penalty", "limit"),
        )

    for dtype in (*PRODUCTS, "fp16"):
        for name in ("forward", "queries", "keys"):
            yield configuration(name, "", dtype)
            if name == "forward":
                yield configuration(name, "inference", dtype)
            if dtype == "fp16":
                continue
            yield configuration(name, "chunks, padding, mask", dtype)
            if dtype != "tf32":
                yield configuration(name, "recordings", dtype)
                yield configuration(name, "recordings, chunks", dtype)
                if name == "forward":
                    yield configuration(name, "recordings, equal", dtype)
                else:
                    for label in ("", "recordings, ", "recordings, chunks, "):
                        yield configuration(name, f"{label}penalty, equal", dtype)
                yield configuration(name, "recordings, V=144, equal", dtype, value_dim=144)
            yield configuration(name, "V=144", dtype, value_dim=144)
            if name == "keys" and dtype == "bf16":
                yield configuration(name, "padding", dtype)
            yield configuration(name, "odd sizes", dtype, 40, 6, 20)
        if dtype in ("fp32", "bf16"):
            yield configuration("positions", "recordings", dtype)
    types = {"STARTS": "i64", "OUT": "i32"}
    table = _recordings.TABLE
    alone = table | dict.fromkeys(("ENDS", "HIDDEN", "WHOSE"))
    yield Configuration("zipformer_attention bounds", _recordings.bounds_kernel, types, alone)
    types |= {"ENDS": "i64", "HIDDEN": "u8", "WHOSE": "i64"}
    yield Configuration("zipformer_attention tables of rates", _recordings.bounds_kernel, types, table)
