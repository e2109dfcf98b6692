# SPDX-License-Identifier: Apache-2.0
"""Configurations of kernels/_decided.py, the small steps of a recorded Zipformer, and of kernels/_casts.py."""

import triton.language as tl

from fastasr.kernels import _casts
from fastasr.kernels import _decided as steps

from .configuration import Configuration


def decided():
    tile = {"BLOCK_R": steps.ROWS, "BLOCK_C": steps.COLUMNS}
    numbers = dict.fromkeys(("DRAWN", "RATE", "SCALE", "LIMITS", "ACT"), "fp32") | {"OF": "i64"}
    none, warps = dict.fromkeys(("DRAWN", "RATE", "OF")), {"num_warps": steps.WARPS}

    def configuration(name, kernel, types, constants, divisible=("columns",)):
        function = getattr(steps, f"{kernel}_kernel")
        return Configuration(f"decided {name}", function, numbers | types, constants | warps, divisible)

    stream = {"SRC": "fp32", "OUT": "fp32", "TOTAL": "fp32", "Y": "bf16", "NARROW": "bf16", "DY": "bf16"}
    stream |= {"A": "fp32", "B": "bf16"}
    alone = dict.fromkeys(stream, "fp32")
    for label, given in {"": tile | none, ", masked": tile | {"OF": None}, ", of a row": tile}.items():
        yield configuration(f"plus{label}, bf16 branch", "plus", stream, given)
        yield configuration(f"plus{label}, fp32", "plus", alone, given | {"NARROW": None})
        few = given | dict.fromkeys("CDE")
        yield configuration(f"gradients{label}, bf16 branch", "gradients", stream, few)
        yield configuration(f"gradients{label}, fp32", "gradients", alone, few)
    five = {"A": "fp32", "B": "fp32", "C": "fp32", "D": "bf16", "E": "bf16", "TOTAL": "fp32"}
    yield configuration("gradients of five", "gradients", five, tile | none | {"DY": None})
    flat = {"BLOCK": steps.BLOCK}
    for dtype in ("fp32", "bf16"):
        types = {"DRAWN": dtype, "MASK": dtype}
        yield configuration(f"mask, {dtype}", "mask", types, flat, ("count",))
        yield configuration(f"either, {dtype}", "either", {"W": dtype, "Y": dtype}, flat, ("w_row", "y_row"))
    types = dict.fromkeys(("X", "Y", "GRAD"), "fp32")
    yield configuration("scale", "scale", types, flat)
    yield configuration("limit", "limit", types, {"BLOCK": 256} | none, ())
    yield configuration("limit, masked", "limit", types, {"BLOCK": 256}, ())
    own = {"FIELDS": 8, "DTYPE": tl.float32, "DRAWN": tl.bfloat16, "MASKED": True, "BLOCK": steps.CHANNELS}
    yield Configuration("decided limit, jobs", steps.limit_of_jobs_kernel, {"JOBS": "i64"}, own | warps)
    own = {"FIELDS": 5, "SAMPLE": _casts.SAMPLE}
    bits = {"BITS": tl.int32, "num_warps": 4}
    cast = {"DTYPE": tl.float32, "TO": tl.bfloat16, "BLOCK": _casts.BLOCK, "num_warps": 8}
    yield Configuration("decided casts, compare", _casts.compare_kernel, {"JOBS": "i64"}, own | bits)
    yield Configuration("decided casts, cast", _casts.cast_kernel, {"JOBS": "i64"}, own | cast)
