# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/bias_norm.py."""

from fastasr.kernels import _parts, bias_norm

from .configuration import DTYPES, Configuration


def configurations():
    def tile(kernel: str, channels: int) -> dict[str, int]:
        block_r, block_c, warps = bias_norm._forward_blocks(channels)
        if kernel == "backward":
            block_r, warps = max(1, _parts.ELEMENTS // block_c), _parts.WARPS
        return {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}

    parts = {"DBIAS_PARTS": "fp32", "DLOG_SCALE_PARTS": "fp32"}
    names = ("X", "BIAS", "LOG_SCALE", "Y", "GRAD", "DX", "DBIAS", "DLOG_SCALE")

    def both(channels: int, label: str, types: dict):
        for kernel in ("forward", "backward"):
            name = f"bias_norm {kernel}, C={channels}, {label}"
            function = getattr(bias_norm, f"{kernel}_kernel")
            yield Configuration(name, function, types, tile(kernel, channels), ("C",))

    for dtype in DTYPES:
        for channels in (512,) if dtype == "fp16" else (192, 512, 768, 2048, 8192):
            yield from both(channels, dtype, dict.fromkeys(names, dtype) | parts)
    mixed = dict.fromkeys(names, "fp32") | parts | {"X": "bf16", "DX": "bf16"}
    yield from both(512, "x bf16", mixed)
    one = tile("backward", 1) | {"C": 1}  # Triton makes integers that are 1 constants
    yield Configuration("bias_norm backward, C=1, x bf16", bias_norm.backward_kernel, mixed, one)
    for block_p in (128, 256, 512):
        name, constants = f"bias_norm parts, {block_p}", _parts.reduce_tile(block_p)
        yield Configuration(name, bias_norm.add_sums_kernel, mixed, constants, ("C",))
