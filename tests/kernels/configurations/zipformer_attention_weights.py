# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/zipformer_attention_weights.py."""

from fastasr.kernels import _parts, _weighted_values
from fastasr.kernels import zipformer_attention_weights as module

from .configuration import PRODUCTS, Configuration, element_type, setting


def configurations(generation: int):
    like = ("X", "K", "R", "W", "GRAD", "DX", "DS", "DK")
    strides = [f"{name}_{of}" for name in ("x", "k") for of in ("time", "batch")]
    strides += [f"{name}_{of}" for name in ("g", "w") for of in ("head", "batch", "row")] + ["ds_row"]
    masked = {"PADDING": "u8", "MASK": "u8", "BOUNDS": "i32"}
    vectors = {"fp32": 4, "bf16": 8, "fp16": 8}

    def configuration(
        name: str, label: str, dtype: str, keys: int = 1500, dim: int = 32, pos_dim: int = 4, **constants
    ):
        with setting(dtype) as torch_dtype:
            shapes = module.tiles(
                keys,
                dim,
                pos_dim,
                torch_dtype,
                generation,
                "mask" in label or ("recordings" in label and generation == 100),
                "PENALTY" in constants,
            )
        element = element_type(dtype)
        packed = pos_dim == 4 and element != "fp32"
        pointers = dict.fromkeys(like, element) | masked | ({"R": "i64"} if packed else {})
        pointers["PARTS"] = "fp64" if element == "fp32" else "fp32"
        fixed = {"DIM": dim, "POS_DIM": pos_dim, "PACKED": packed, "WIDE_POS": pos_dim, "PENALTY": False}
        fixed |= {"ADD": False, "COLUMNS": 1} | dict.fromkeys(("PIECES", "piece", "held", "shares"))
        if "recorded" in label:
            pointers["ACT"] = "fp32"
        else:
            fixed["ACT"] = None
        fixed |= {"WINDOW": "chunks" in label} | (
            {} if "mask" in label else dict.fromkeys(("PADDING", "MASK"))
        )
        fixed |= {} if "recordings" in label else {"BOUNDS": None}
        fixed |= {"VECTOR": vectors[element]}
        return Configuration(
            f"zipformer_attention_weights {name}{label and ', ' + label}, {dtype}",
            getattr(module, f"{name}_kernel"),
            pointers,
            fixed | shapes[name] | constants,
            strides,
            ("penalty", "limit"),
        )

    for dtype in (*PRODUCTS, "fp16"):
        for name in ("forward", "queries", "keys", "positions"):
            yield configuration(name, "", dtype)
            if dtype == "fp16":
                continue
            if name != "positions" and dtype != "tf32":
                yield configuration(name, "recordings", dtype)
            if name in ("forward", "queries"):
                yield configuration(name, "chunks, padding, mask", dtype)
            if name == "forward":
                for keys in (100, 200, 400) if dtype == "bf16" else (50,):
                    yield configuration(name, f"{keys} keys", dtype, keys)
            if name == "queries":
                yield configuration(name, "penalty", dtype, PENALTY=True)
                if dtype == "bf16":
                    yield configuration(name, "recorded", dtype)
                    yield configuration(name, "penalty, recorded", dtype, PENALTY=True)
            if name == "keys":
                yield configuration(name, "chunks", dtype)
                if dtype == "bf16":
                    yield configuration(name, "chunks, recorded", dtype)
            yield configuration(name, "odd sizes", dtype, 1500, 40, 6)
    for dtype in ("fp32", "bf16"):
        types = {"PARTS": "fp64" if dtype == "fp32" else "fp32", "OUT": dtype}
        name = f"zipformer_attention_weights parts, {dtype}"
        yield Configuration(name, _parts.add_tables_kernel, types, _parts.TABLES, ("size",))
    strides = tuple(f"{name}_{of}" for name in ("w", "dw") for of in ("head", "batch", "row"))
    for dtype in PRODUCTS:
        types = dict.fromkeys(("W", "V", "Y", "G", "DW", "DV"), element_type(dtype))
        for dim in (12, 32):
            with setting(dtype) as torch_dtype:
                shapes = _weighted_values.tiles(dim, torch_dtype, generation)
            for name, constants in shapes.items():
                kernel = getattr(_weighted_values, f"{name}_kernel")
                constants |= {"VECTOR": vectors[element_type(dtype)]}
                constants |= {"ADD": True} if name == "backward" else {}
                label = f"zipformer_attention_weights weighted values {name}, {dim} channels, {dtype}"
                yield Configuration(label, kernel, types, constants, strides)
