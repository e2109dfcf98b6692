# SPDX-License-Identifier: Apache-2.0
"""The configurations of kernels/swoosh.py."""

import torch

from fastasr.kernels import _jobs, _parts, _sum_rows, swoosh

from .configuration import DTYPES, Configuration

WARPS = {"num_warps": 4}


def configurations():
    kinds = {"no mask": 0, "full mask": 1, "row mask": 2, "column mask": 3, "named mask": 4}
    for dtype in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("X", "MASK", "Y", "GRAD", "DX"), dtype) | {"MASK_ROW": "i64"}
        for label, kind in kinds.items():
            if dtype == "fp16" and label != "column mask":
                continue
            if kind >= 2:
                forward, backward = swoosh.forward_tile, swoosh.backward_tile
                tile = {"BLOCK_R": 8, "BLOCK_C": 256, "GROUPED": False}
            else:
                forward, backward = swoosh.forward_flat, swoosh.backward_flat
                tile = {"TAIL": False, "BLOCK": swoosh.BLOCK}
            common = tile | WARPS | {"RIGHT": False, "KIND": kind} | ({"MASK": None} if kind == 0 else {})
            common |= {} if kind == 4 else {"MASK_ROW": None}
            divisible = ("columns",)
            yield Configuration(f"swoosh forward, {label}, {dtype}", forward, types, common, divisible)
            for output in (False, True):
                constants = {**common, "OUTPUT": output, **({} if output else {"Y": None})}
                name = f"swoosh backward{' + output' if output else ''}, {label}, {dtype}"
                yield Configuration(name, backward, types, constants, divisible)
    for dtype, shares, of_shares in (("fp32", "fp64", torch.float64), ("bf16", "fp32", torch.float32)):
        types, block_c = {"X": dtype, "PARTS": shares}, _sum_rows.COLUMNS
        tile = {"BLOCK_R": _parts.ELEMENTS // block_c, "BLOCK_C": block_c, "num_warps": _parts.WARPS}
        yield Configuration(f"swoosh sum, {dtype}", _sum_rows.sum_kernel, types, tile, ("columns",))
        constants = _parts.reduce_tile(512)
        types = {"PARTS": shares, "OUT": dtype}
        name = f"swoosh sum, parts, {dtype}"
        yield Configuration(name, _parts.add_parts_kernel, types, constants, ("columns",))
        constants = constants | {
            "FIELDS": 4,
            "DTYPE": _jobs.TYPES[of_shares],
            "TO": _jobs.TYPES[DTYPES[dtype]],
        }
        name, kernel = f"swoosh sum, parts of jobs, {dtype}", _parts.add_parts_of_jobs_kernel
        yield Configuration(name, kernel, {"JOBS": "i64"}, constants)
    types = dict.fromkeys(("X", "Y"), "bf16")
    tail = {"RIGHT": True, "KIND": 0, "MASK": None, "TAIL": True, "BLOCK": swoosh.BLOCK}
    yield Configuration("swooshR forward, tail, bf16", swoosh.forward_flat, types, tail | WARPS)
    types = dict.fromkeys(("X", "Y", "MASK"), "bf16")
    narrow = WARPS | {"RIGHT": True, "BLOCK_R": 64, "BLOCK_C": 32, "MASK_ROW": None}
    groups, one = {"KIND": 3, "GROUPED": True}, {"KIND": 2, "GROUPED": False, "columns": 1}
    name = "swooshR forward, groups, column mask of 32, bf16"
    yield Configuration(name, swoosh.forward_tile, types, narrow | groups, ("columns",))
    name = "swooshR forward, row mask, one column, bf16"
    yield Configuration(name, swoosh.forward_tile, types, narrow | one)
