# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/rel_attention.py."""

from fastasr.kernels import _recordings
from fastasr.kernels import rel_attention as module

from .configuration import PRODUCTS, Configuration, element_type, setting


def configurations(generation: int):
    like = ("Q", "K", "V", "POS", "U", "W", "BIAS", "GATE", "KEY_BIAS", "DGATE")
    like += ("Y", "REMAINDER", "G", "DS", "DQ", "DK", "DV", "DU", "DW")
    products = "offsets", "positions"
    wide = dict.fromkeys(("LSE", "INVERSE", "DELTA", "CONTENT", "EDGES"), "fp32")
    strides = [f"{name}_{of}" for name in ("q", "v") for of in ("time", "batch")]
    strides += ["k_batch", "g_batch", "ds_row", "width", "r_time", "r_head", "p_row", "p_head"]
    masks = {"PADDING": "u8", "MASK": "u8", "SEED": "i64", "BOUNDS": "i32", "PIECES": "i64"}

    def configuration(name: str, label: str, dtype: str, dim: int = 64, value: int = 64):
        hiding, dropping, element = "mask" in label, "dropout" in label, element_type(dtype)
        recordings = "recordings" in label
        limited = "context" in label or recordings
        with setting(dtype) as torch_dtype:
            shapes = module.tiles(dim, value, torch_dtype, generation, hiding, dropping, limited, recordings)
        shapes["biases"] = module.BIASES
        types = dict.fromkeys(like, element) | wide | masks
        types |= dict.fromkeys(
            ("PARTS", "SUMS", "BIASES", "DKEY_BIAS"), "fp64" if element == "fp32" else "fp32"
        )
        words = [("PADDING", "padding"), ("MASK", "mask"), ("SEED", "dropout")]
        words += [(of, "recordings") for of in ("BOUNDS", "PIECES")]
        words += [(of, "gated bias") for of in ("BIAS", "GATE", "DGATE", "BIASES")]
        words += [(of, "span") for of in ("EDGES", "SUMS") if name != "edges"]
        words += [(of, "key bias") for of in ("KEY_BIAS", "DKEY_BIAS")]
        absent = [name for name, word in words if word not in label]
        if "cap" not in label:
            absent.append("cap")
        if element == "fp32" or "inference" in label:
            absent.append("REMAINDER")
        if element != "fp32" and name != "statistics":
            absent.append("INVERSE")
        if "gated bias" in label:  # without positions
            absent += ["POS", "U", "W", "PARTS"]
        return Configuration(
            f"rel_attention {name}{label and ', ' + label}, {dtype}",
            getattr(module, f"{name}_kernel"),
            types | ({"DQ": "fp32"} if name == "queries" else {}),
            {"DIM": dim, "VALUE_DIM": value, "WINDOW": limited, **dict.fromkeys(absent)}
            | ({"ADDS": label in ("pieces", "recordings")} if name == "positions" else {})
            | (
                {"EACH": shapes["queries"]["BLOCK_M"] // shapes["queries"]["BLOCK"]}
                if name in products
                else {}
            )
            | shapes[name],
            strides,
            ("scale", "factor", "cap"),
        )

    for value in (64, 100):
        yield configuration("delta", "" if value == 64 else "odd sizes", "bf16", value=value)
    for dtype in PRODUCTS:
        for label in ("padding, mask", "padding, dropout", "padding, context", "padding, context, cap"):
            if dtype != "bf16" and (dtype != "tf32" or "mask" in label):
                yield configuration("statistics", label, dtype)
    for name in ("forward", "queries", "keys"):
        yield configuration(name, "padding", "bf16")
        if name == "forward":
            yield configuration(name, "padding, inference", "bf16")
        for dtype in PRODUCTS:
            yield configuration(name, "padding, mask", dtype)
            if dtype != "tf32":
                yield configuration(name, "padding, dropout", dtype)
        for dim in (96, 128, 144):  # blocks of 64 channels or of 128
            yield configuration(name, f"d={dim}, padding", "bf16", dim, dim)
        for label in ("padding, mask", "padding, dropout", "padding, mask, dropout"):
            yield configuration(name, f"d=128, {label}", "bf16", 128, 128)
        yield configuration(name, "padding, mask, dropout", "bf16")
        for dtype in ("fp32", "bf16"):
            yield configuration(name, "padding, context", dtype)
            yield configuration(name, "recordings", dtype)
        yield configuration(name, "d=128, recordings, dropout", "bf16", 128, 128)
        for dtype in ("fp32", "bf16"):
            yield configuration(name, "padding, gated bias", dtype)
            yield configuration(name, "padding, span", dtype)
            if name != "queries":
                yield configuration(name, "padding, key bias", dtype)
            yield configuration(name, "padding, context, cap", dtype, 128, 128)
        for label in ("padding, dropout, context", "d=128, padding, context"):
            dim = 128 if "d=128" in label else 64
            yield configuration(name, label, "bf16", dim, dim)
    for dtype in PRODUCTS:
        for name in products:
            yield configuration(name, "", dtype)
            if dtype != "tf32":
                yield configuration(name, "context", dtype)
                yield configuration(name, "recordings", dtype)
                if name == "offsets":
                    yield configuration(name, "span", dtype)
        yield configuration("positions", "pieces", dtype)
        if dtype != "tf32":
            yield configuration("positions", "gated bias", dtype)
    for dtype in ("fp32", "bf16"):
        yield configuration("edges", "span", dtype)
        yield configuration("biases", "", dtype)
    types, table = {"BOUNDS": "i32", "OUT": "i64"}, {"BLOCK": 32, "COLUMNS": 32, "MORE": 32, "COUNTED": 2}
    table |= _recordings.BLOCKS
    yield Configuration("rel_attention pieces", _recordings.pieces_kernel, types, table)
