# SPDX-License-Identifier: Apache-2.0
"""Samples of rnnt_pruned_lattice, and its benchmark at the sizes of a training batch; fast_rnnt scatters the band into
a whole lattice."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr.testing.fuzz import Shape
from fastasr.testing.samples.rnnt_lattice import PEER, lattice_costs
from fastasr.testing.speed import Case, Implementation, case, simple, upstream_member
from fastasr.testing.table import Make, OpTable, Sample, invalid, sampler


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
    **rest: Any,
) -> dict:
    """Makes a band of windows. ``step``: a window moves at most this far in a frame. ``ends``: t_end of each sequence;
    its s_end is in the last window."""
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


def _special(value: float, **rest: Any) -> Callable[[Make], dict]:
    def arguments(make: Make) -> dict:
        made = _band(make, 2, 8, 3, ends=[8, 5], **rest)
        made["symbol_logprobs"][0, 1, 0] = value
        made["blank_logprobs"][1, 7, 2] = value  # outside the boundary
        return made

    return arguments


def _random(make: Make, shape: Shape) -> dict:
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


_sample = sampler(_band)
TABLE = OpTable(
    op="rnnt_pruned_lattice",
    samples=(
        _sample("regular", (2, 6, 3), thorough=True),
        _sample("ragged", (3, 7, 3), step=2, ends=[7, 5, 1], thorough=True),
        _sample("modified", (3, 7, 3), step=1, ends=[7, 5, 4], modified=True, thorough=True),
        _sample("one sequence, occupations", (1, 9, 5), step=1, return_occupation=True),
        _sample(
            "one modified sequence, occupations", (1, 12, 5), step=1, modified=True, return_occupation=True
        ),
        _sample("one cell", (2, 7, 1)),
        _sample("one cell, moving", (2, 7, 1), step=1, modified=True),
        _sample("windows that jump over each other", (3, 6, 3), step=5, modified=True),
        Sample(
            "begins and ends within",
            lambda m: (
                _band(m, 3, 6, 3, step=0)
                | {"boundary": torch.tensor([[0, 1, 2, 5], [1, 0, 3, 4], [2, 3, 2, 3]])}
            ),
        ),
        _sample("no frames", (2, 0, 3)),
        _sample("no sequences", (0, 4, 3)),
        _sample("standing windows", (2, 4, 6), step=0, large=True),
        _sample("many sequences", (19, 21, 5), step=1, ends=[21 - b for b in range(19)], large=True),
        _sample("wide", (2, 30, 17), step=2, ends=[30, 11], large=True),
        _sample("wide, modified", (2, 30, 17), step=1, modified=True, large=True),
        _sample("long", (2, 150, 5), step=1, large=True),
        # The mantissa of a probability of 0.68 is 1.37, and a product of 300 of them is beyond float32. Gradients have
        # the rounding errors of as many factors, in float64 too, where eager's error counts as 0.
        _sample("very wide", (2, 3, 400), step=0, mean=-0.38, scale=0.01, exact=False, large=True),
        _sample("improbable", (2, 6, 3), step=1, mean=-20.0, scale=10.0, large=True),
        Sample("NaN", _special(float("nan")), exact=False),
        Sample("inf, modified", _special(float("inf"), modified=True), exact=False),
        Sample("-inf", _special(-float("inf")), exact=False),
        Sample("NaN, occupations", _special(float("nan"), return_occupation=True), exact=False),
        Sample("-inf, occupations", _special(-float("inf"), return_occupation=True), exact=False),
    ),
    invalid=()
    if torch.cuda.is_available()  # values are checked on the CPU only
    else invalid(
        lambda m: _band(m, 2, 5, 3),
        ("starts decrease", "starts", torch.tensor([[0] * 5, [0, 1, 2, 1, 1]])),
        ("negative starts", "starts", torch.tensor([[0] * 5, [-1, 0, 0, 0, 0]])),
        ("frames outside", "boundary", torch.tensor([[0, 0, 3, 5], [0, 0, 3, 6]])),
        ("end before begin", "boundary", torch.tensor([[0, 0, 3, 5], [2, 0, 1, 5]])),
    ),
    rows=("symbol_logprobs", "blank_logprobs", "starts", "boundary"),
    random=_random,
)


# --- the benchmark


def _peer(symbols: int, symbol_logprobs: Tensor, blank_logprobs: Tensor, starts: Tensor) -> Implementation:
    recursion = upstream_member(PEER)
    batch, frames, window = symbol_logprobs.shape
    at = (starts[..., None] + torch.arange(window, device=starts.device)).transpose(1, 2)  # (B, R, T)

    def scattered(x: Tensor, y: Tensor) -> Tensor:
        whole_x = x.new_full((batch, symbols + 1, frames + 1), -float("inf"))
        whole_y = x.new_full((batch, symbols + 1, frames), -float("inf"))
        whole_x = whole_x.scatter(1, at, x.transpose(1, 2))[:, :symbols]
        return recursion(whole_x.contiguous(), whole_y.scatter(1, at, y.transpose(1, 2)), None)

    return simple(scattered, symbol_logprobs, blank_logprobs)


def _case(batch: int, symbols: int, frames: int, window: int) -> Case:
    def arguments(make: Make) -> dict:
        made = _band(make, batch, frames, window, mean=-4.0)
        starts = torch.linspace(0, symbols + 1 - window, frames, device=make.device).long()
        starts = starts.expand(batch, frames).contiguous()
        past = starts[..., None] + torch.arange(window, device=make.device) >= symbols
        made["symbol_logprobs"][past] = -float("inf")
        return made | {"starts": starts}

    shape, cells = f"{batch}x{frames}x{window}", batch * frames * window
    options: dict[str, Any] = {
        "copy": True,
        "compiles": False,
        "others": {"upstream": partial(_peer, symbols)},
        "shape": shape,
    }
    return case("rnnt_pruned_lattice", shape, arguments, lattice_costs(cells), f", S={symbols}", **options)


def sized(T: int = 400, B: int = 4, R: int = 5) -> Case:
    return _case(B, 60, T, R)


CASES = (_case(40, 100, 750, 5), _case(4, 60, 400, 5), _case(1, 10, 40, 5))
ON_DEVICE = CASES[:1]
WATCH = "bands that move; one program per sequence"
