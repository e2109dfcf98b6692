# SPDX-License-Identifier: Apache-2.0
"""Samples of rnnt_pruned_lattice."""

import torch

from fastasr.ops.rnnt_pruned_lattice import definition
from fastasr.testing.table import Invalid, Make, OpTable, Sample


def _registered(a: dict) -> tuple:
    return (
        a["symbol_logprobs"],
        a["blank_logprobs"],
        a["starts"],
        a.get("boundary"),
        a.get("modified", False),
        a.get("return_occupation", False),
        True,
    )


def _result(a: dict, outputs: tuple) -> tuple:
    return outputs[:3] if a.get("return_occupation", False) else outputs[0]


def _band(
    make: Make,
    batch: int,
    frames: int,
    window: int,
    *,
    step: int | None = None,
    ends: list | None = None,
    mean: float = -2.0,
    scale: float = 1.0,
    **rest,
) -> dict:
    """``step``: the most that a window moves in a frame; ends: t_end of each sequence, its s_end in the last window."""
    x, y = (make.normal(batch, frames, window, scale=scale, mean=m) for m in (mean, mean / 2))
    step = window - 1 if step is None else step
    moves = (make.uniform(batch, frames).double() * (step + 1)).floor().clamp(0, step).long()
    starts = moves.cumsum(1) - moves[:, :1]
    arguments = {"symbol_logprobs": x, "blank_logprobs": y, "starts": starts}
    if ends is not None:
        tops = [int(starts[b, max(t - 1, 0)]) + window // 2 for b, t in enumerate(ends)]
        if rest.get("modified"):  # a symbol takes a frame
            tops = [min(s, t) for s, t in zip(tops, ends, strict=True)]
        rows = [[0, 0, s, t] for s, t in zip(tops, ends, strict=True)]
        arguments["boundary"] = torch.tensor(rows, device=make.device)
    return arguments | rest


def _special(value: float, **rest):
    def arguments(make: Make) -> dict:
        made = _band(make, 2, 8, 3, ends=[8, 5], **rest)
        made["symbol_logprobs"][0, 1, 0] = value
        made["blank_logprobs"][1, 7, 2] = value  # outside the boundary
        return made

    return arguments


def _with(**arguments):
    return lambda m: _band(m, 2, 5, 3) | {k: v(m) if callable(v) else v for k, v in arguments.items()}


def _integers(*shape: int):
    return lambda m: torch.zeros(shape, dtype=torch.int64, device=m.device)


def _rows(*rows: list):
    return lambda m: torch.tensor(rows, device=m.device)


def _random(make: Make, shape) -> dict:
    batch, frames, window = shape.choice((0, 1, 2, 3)), min(shape.size(), 40), max(1, min(shape.size(), 20))
    arguments = _band(make, batch, frames, window, modified=shape.choice((False, True)))
    if frames and shape.choice((False, True)):
        rows = []
        for b in range(batch):
            t = sorted(shape.choice(range(frames + 1)) for _ in "12")
            low, high = (int(arguments["starts"][b, max(x - 1, 0)]) for x in t)
            s = sorted((low + shape.choice(range(window + 1)), high + shape.choice(range(window + 1))))
            rows.append([s[0], t[0], s[1], t[1]])
        arguments["boundary"] = torch.tensor(rows, dtype=torch.int64, device=make.device).reshape(batch, 4)
    return arguments


TABLE = OpTable(
    op="rnnt_pruned_lattice",
    definition=definition,
    registered=_registered,
    result=_result,
    samples=(
        Sample("regular", lambda m: _band(m, 2, 6, 3), thorough=True),
        Sample("ragged", lambda m: _band(m, 3, 7, 3, step=2, ends=[7, 5, 1]), thorough=True),
        Sample("modified", lambda m: _band(m, 3, 7, 3, step=1, ends=[7, 5, 4], modified=True), thorough=True),
        Sample("one sequence, occupations", lambda m: _band(m, 1, 9, 5, step=1, return_occupation=True)),
        Sample(
            "one modified sequence, occupations",
            lambda m: _band(m, 1, 12, 5, step=1, modified=True, return_occupation=True),
        ),
        Sample("one cell", lambda m: _band(m, 2, 7, 1)),
        Sample("one cell, moving", lambda m: _band(m, 2, 7, 1, step=1, modified=True)),
        Sample("windows that jump over each other", lambda m: _band(m, 3, 6, 3, step=5, modified=True)),
        Sample("no frames", lambda m: _band(m, 2, 0, 3)),
        Sample("no sequences", lambda m: _band(m, 0, 4, 3)),
        Sample("standing windows", lambda m: _band(m, 2, 4, 6, step=0), large=True),
        Sample(
            "many sequences",
            lambda m: _band(m, 19, 21, 5, step=1, ends=[21 - b for b in range(19)]),
            large=True,
        ),
        Sample("wide", lambda m: _band(m, 2, 30, 17, step=2, ends=[30, 11]), large=True),
        Sample("wide, modified", lambda m: _band(m, 2, 30, 17, step=1, modified=True), large=True),
        Sample("long", lambda m: _band(m, 2, 150, 5, step=1), large=True),
        Sample("improbable", lambda m: _band(m, 2, 6, 3, step=1, mean=-20.0, scale=10.0), large=True),
        Sample("NaN", _special(float("nan")), exact=False),
        Sample("inf, modified", _special(float("inf"), modified=True), exact=False),
        Sample("-inf", _special(-float("inf")), exact=False),
        Sample("NaN, occupations", _special(float("nan"), return_occupation=True), exact=False),
        Sample("-inf, occupations", _special(-float("inf"), return_occupation=True), exact=False),
    ),
    invalid=(
        Invalid("a matrix", _with(symbol_logprobs=lambda m: m.normal(5, 3)), ValueError, "symbol_logprobs"),
        Invalid(
            "no window",
            lambda m: _band(m, 2, 5, 1) | {"symbol_logprobs": m.normal(2, 5, 0)},
            ValueError,
            "R >= 1",
        ),
        Invalid(
            "another shape", _with(blank_logprobs=lambda m: m.normal(2, 5, 4)), ValueError, "blank_logprobs"
        ),
        Invalid("starts of another shape", _with(starts=_integers(2, 4)), ValueError, "starts"),
        Invalid("starts of int32", _with(starts=lambda m: _integers(2, 5)(m).int()), TypeError, "starts"),
        Invalid("boundary of another shape", _with(boundary=_integers(2, 3)), ValueError, "boundary"),
        Invalid("modified is an int", _with(modified=1), TypeError, "modified"),
        *(
            invalid
            for invalid in (
                Invalid(
                    "starts decrease", _with(starts=_rows([0] * 5, [0, 1, 2, 1, 1])), ValueError, "starts"
                ),
                Invalid(
                    "negative starts", _with(starts=_rows([0] * 5, [-1, 0, 0, 0, 0])), ValueError, "starts"
                ),
                Invalid(
                    "frames outside",
                    _with(boundary=_rows([0, 0, 3, 5], [0, 0, 3, 6])),
                    ValueError,
                    "boundary",
                ),
                Invalid(
                    "end before begin",
                    _with(boundary=_rows([0, 0, 3, 5], [2, 0, 1, 5])),
                    ValueError,
                    "boundary",
                ),
            )
            if not torch.cuda.is_available()  # values are looked at on the CPU alone
        ),
    ),
    rows=("symbol_logprobs", "blank_logprobs", "starts", "boundary"),
    random=_random,
)
