# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/zipformer_attention.py."""

from fastasr.kernels import zipformer_attention as module

from .configuration import PRODUCTS, Configuration, element_type, setting


def configurations(generation: int):
    like = ("X", "K", "R", "V", "G", "Y", "DX", "DS", "DK", "DV")
    wide = dict.fromkeys(("MAXIMUM", "INVERSE", "DELTA"), "fp32")
    strides = [f"{name}_{of}" for name in ("x", "k", "v") for of in ("time", "batch")] + ["ds_row"]
    masked = {"PADDING": "u8", "MASK": "u8"}

    def configuration(
        name: str, label: str, dtype: str, dim: int = 32, pos_dim: int = 4, value_dim: int = 12
    ):
        with setting(dtype) as torch_dtype:
            options = dict(
                module.tiles(dim, pos_dim, value_dim, torch_dtype, generation, "mask" in label)[name]
            )
        warps, stages, element = options.pop("num_warps"), options.pop("num_stages"), element_type(dtype)
        packed = pos_dim == 4 and element != "fp32"
        fixed = {"DIM": dim, "POS_DIM": pos_dim, "VALUE_DIM": value_dim}
        fixed |= {"PACKED": packed, "WIDE_POS": pos_dim}
        absent = [tensor for tensor in masked if tensor.lower() not in label]
        fixed |= {"WINDOW": "chunks" in label} | dict.fromkeys(absent)
        return Configuration(
            f"zipformer_attention {name}{label and ', ' + label}, {dtype}",
            getattr(module, f"{name}_kernel"),
            dict.fromkeys(like, element) | wide | masked | ({"R": "i64"} if packed else {}),
            fixed | options,
            warps,
            strides,
            stages=stages,
        )

    for dtype in (*PRODUCTS, "fp16"):
        for name in ("forward", "queries", "keys"):
            yield configuration(name, "", dtype)
            if dtype == "fp16":
                continue
            yield configuration(name, "chunks, padding, mask", dtype)
            yield configuration(name, "V=144", dtype, value_dim=144)
            if name == "keys" and dtype == "bf16":
                yield configuration(name, "padding", dtype)
            yield configuration(name, "odd sizes", dtype, 40, 6, 20)
