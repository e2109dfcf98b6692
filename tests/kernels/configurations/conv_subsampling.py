# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/conv_subsampling.py."""

from fastasr.kernels import conv_subsampling as conv

from .configuration import PRODUCTS, Configuration, element_type, setting


def configurations():
    parts = {"BLOCK_P": 4 * conv.MAX_PARTS, "BLOCK_C": conv.BLOCK_SUM, "num_warps": 4}
    like = ("G", "X", "WEIGHT", "BIAS", "DEPTHWISE", "DEPTHWISE_BIAS", "Y")
    like += "DWEIGHT", "DBIAS", "DDEPTHWISE", "DDEPTHWISE_BIAS"
    for dtype in (*PRODUCTS, "fp16"):
        types = dict.fromkeys(like, element_type(dtype)) | {"MASK": "u8", "PARTS": "fp32", "SHARES": "fp32"}
        with setting(dtype) as torch_dtype:
            shapes = conv.tiles(torch_dtype)
        for name, tile in shapes.items():
            kernel = getattr(conv, f"{name}_kernel")
            name = f"conv_subsampling {name.replace('_', ' ')}, {dtype}"
            yield Configuration(name, kernel, types, tile, ("C",))
        if dtype != "tf32":
            name = f"conv_subsampling add parts, {dtype}"
            yield Configuration(name, conv.add_kernel, types, parts, ("C",))
