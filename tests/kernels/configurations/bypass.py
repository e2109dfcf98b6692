# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/bypass.py, and of the other steps along a Zipformer's residual stream."""

from fastasr.kernels import _parts, _row, bypass

from ._decided import decided
from .configuration import Configuration


def configurations():
    none = dict.fromkeys(("DRAWN", "RATE", "OF"))
    names = ("X_ORIG", "X", "SCALE", "Y", "GRAD", "DX_ORIG", "DX", "DSCALE")
    every = {dtype: dict.fromkeys(names, dtype) for dtype in ("fp32", "bf16", "fp16")}
    every["x bf16"] = every["fp32"] | {"X": "bf16", "DX": "bf16"}
    every["x bf16, of a row"] = every["x bf16"] | {"DRAWN": "fp32", "RATE": "fp32", "OF": "i64"}
    for dtype, types in every.items():
        types = types | {"PARTS": "fp32"}
        for kernel, elements, warps in (
            ("forward", 2048, bypass.NUM_WARPS),
            ("backward", _parts.ELEMENTS, _parts.WARPS),
        ):
            wide = 64 if kernel == "backward" and dtype in ("bf16", "fp16") else 256
            for block_c in (wide, 32) if dtype in ("fp32", "bf16") else (wide,):
                constants = {"BLOCK_R": elements // block_c, "BLOCK_C": block_c, "num_warps": warps}
                constants |= {} if "row" in dtype else none
                function = getattr(bypass, f"{kernel}_kernel")
                name = f"bypass {kernel}, tile {elements // block_c}x{block_c}, {dtype}"
                yield Configuration(name, function, types, constants, ("columns",))
    tile = {"BLOCK_R": _parts.ELEMENTS // 32, "BLOCK_C": 32, "num_warps": _parts.WARPS}
    types = every["fp32"] | {"PARTS": "fp32"}
    name = "bypass backward, one column, fp32"
    yield Configuration(name, bypass.backward_kernel, types, tile | none | {"columns": 1})
    for block_p in (128, 256, _parts.MAX_PARTS):
        name, types = f"bypass parts, {block_p}", {"PARTS": "fp32", "OUT": "fp32"}
        yield Configuration(name, _parts.add_parts_kernel, types, _parts.reduce_tile(block_p), ("columns",))
    yield from decided()
    types = dict.fromkeys(("X", "DX", "WEIGHTS", "Y", "G", "PARTS"), "fp32") | {"LEFT": "i32"}
    types |= dict.fromkeys(("BEFORE", "AFTER", "LENGTHS"), "i64")
    for dtype in ("fp32", "bf16"):
        elements = types | {"X": dtype, "Y": dtype}
        yield Configuration(f"row move, {dtype}", _row.move_kernel, elements, _row.TILE, ("columns",))
    for factor in (2, 4, 8):
        for kernel, more in (("average", {}), ("average_gradient", {"LANES": factor})):
            name, function = f"row {kernel} of {factor}", getattr(_row, f"{kernel}_kernel")
            constants = _row.TILE | {"FACTOR": factor} | more
            yield Configuration(name, function, types, constants, ("columns",))
            padded = {key: value for key, value in types.items() if key != "LEFT"}
            yield Configuration(f"{name}, padded", function, padded, constants | {"LEFT": None}, ("columns",))
