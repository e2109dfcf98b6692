# SPDX-License-Identifier: Apache-2.0
"""Samples of tdt_lattice, and its benchmark at the sizes of a training batch, beside transformers' ``tdt_loss``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr.testing.fuzz import Shape
from fastasr.testing.samples.rnnt_lattice import random_boundary
from fastasr.testing.speed import (
    BACKWARD,
    BOTH,
    FORWARD,
    Case,
    Cost,
    Implementation,
    case,
    simple,
    upstream_member,
)
from fastasr.testing.table import Make, OpTable, Sample, invalid

PARAKEET = (0, 1, 2, 3, 4)


def _lattice(
    make: Make,
    batch: int,
    frames: int,
    symbols: int,
    durations: tuple[int, ...] = PARAKEET,
    *,
    boundary: list | None = None,
    mean: float = -2.0,
    scale: float = 1.0,
) -> dict:
    shape = batch, frames, symbols + 1
    call = {
        "symbol_logprobs": make.normal(batch, frames, symbols, scale=scale, mean=mean),
        "blank_logprobs": make.normal(*shape, scale=scale, mean=mean / 2),
        "duration_logprobs": make.normal(*shape, len(durations), mean=mean / 2),
        "durations": torch.tensor(durations, dtype=torch.int64, device=make.device),
    }
    if boundary is not None:
        rows = torch.tensor(boundary, dtype=torch.int64, device=make.device)
        call["boundary"] = rows.reshape(batch, 4)
    return call


def _special(name: str, value: float) -> Callable[[Make], dict]:
    def arguments(make: Make) -> dict:
        made = _lattice(make, 2, 8, 3, boundary=[[0, 0, 3, 8], [0, 0, 2, 5]])
        made[name][0, 4, 1] = value
        made[name][1, 5, 1] = value  # outside the boundary
        return made

    return arguments


def _random(make: Make, shape: Shape) -> dict:
    batch, frames, symbols = shape.choice((0, 1, 2, 3)), min(shape.size(), 40), min(shape.size() - 1, 40)
    symbols = max(symbols, 0)
    durations = shape.choice(((0, 1, 2, 3, 4), (1,), (0, 1), (2, 0, 5), (4, 2, 1), (0, 100), (0,)))
    rows = random_boundary(shape, batch, symbols, frames)
    return _lattice(make, batch, frames, symbols, durations, boundary=rows)


RAGGED = [[0, 0, 5, 9], [1, 2, 4, 7], [0, 0, 0, 3], [2, 1, 2, 9]]
TABLE = OpTable(
    op="tdt_lattice",
    samples=(
        Sample("parakeet", lambda m: _lattice(m, 2, 7, 4), thorough=True),
        Sample("ragged", lambda m: _lattice(m, 4, 9, 5, boundary=RAGGED), thorough=True),
        Sample("without 0", lambda m: _lattice(m, 2, 9, 3, (3, 1)), thorough=True),
        Sample("RNN-T", lambda m: _lattice(m, 2, 6, 5, (0, 1))),
        Sample("modified", lambda m: _lattice(m, 2, 8, 5, (1,))),
        Sample("0 alone", lambda m: _lattice(m, 2, 5, 3, (0,)), exact=False),
        Sample("a duration beyond the frames", lambda m: _lattice(m, 2, 6, 3, (0, 2, 50))),
        Sample("gaps", lambda m: _lattice(m, 2, 14, 4, (8, 0, 4, 2))),
        Sample("no way to the end", lambda m: _lattice(m, 2, 5, 3, (2, 4)), exact=False),
        Sample("one frame", lambda m: _lattice(m, 3, 1, 2)),
        Sample("no symbols", lambda m: _lattice(m, 2, 7, 0)),
        Sample("no frames", lambda m: _lattice(m, 2, 0, 2), exact=False),
        Sample("no frames, no symbols", lambda m: _lattice(m, 2, 0, 0)),
        Sample("no sequences", lambda m: _lattice(m, 0, 4, 3)),
        Sample("several vectors", lambda m: _lattice(m, 2, 20, 37)),
        Sample("long", lambda m: _lattice(m, 2, 150, 60), large=True),
        Sample("improbable", lambda m: _lattice(m, 2, 7, 5, mean=-20.0, scale=10.0)),
        Sample("probable", lambda m: _lattice(m, 2, 7, 5, mean=1.0)),
        *(
            Sample(f"{value} in {name}", _special(name, value), exact=False)
            for name in ("symbol_logprobs", "blank_logprobs", "duration_logprobs")
            for value in (float("nan"), float("inf"), -float("inf"))
        ),
    ),
    invalid=invalid(
        lambda m: _lattice(m, 2, 4, 3),
        ("cells", "duration_logprobs", lambda m: m.normal(2, 4, 3, 5)),
        *(
            (name, argument, torch.tensor(value))
            for name, argument, value in (
                ("symbols outside", "boundary", [[0, 0, 3, 4], [0, 0, 4, 4]]),
                ("frames outside", "boundary", [[0, 0, 3, 4], [0, 0, 3, 5]]),
                ("end before begin", "boundary", [[0, 0, 3, 4], [2, 0, 1, 4]]),
                ("equal durations", "durations", [0, 1, 2, 1, 4]),
                ("a negative duration", "durations", [0, 1, 2, -1, 4]),
            )
            if not torch.cuda.is_available()  # values are checked on the CPU only
        ),
    ),
    rows=("symbol_logprobs", "blank_logprobs", "duration_logprobs", "boundary"),
    random=_random,
)


# --- the benchmark

PEER = "transformers.loss.loss_tdt.tdt_loss"


def _peer(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    duration_logprobs: Tensor,
    durations: Tensor,
    boundary: Tensor | None = None,
) -> Implementation:
    """Calls transformers' loss with two tokens, which it normalises once more: blank and the next symbol."""
    function, (batch, frames, row) = upstream_member(PEER), blank_logprobs.shape
    targets = torch.ones(batch, row - 1, dtype=torch.int64)
    ends = torch.full((batch,), frames), torch.full((batch,), row - 1)
    if boundary is not None:
        ends = boundary[:, 3], boundary[:, 2]

    def loss(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        tokens = torch.stack((y, torch.nn.functional.pad(x, (0, 1))), 3)
        return function(tokens, z, targets, *ends, 0, durations.tolist(), reduction="none")

    return simple(loss, symbol_logprobs, blank_logprobs, duration_logprobs)


def _costs(cells: int, durations: int, size: int) -> dict[str, Cost]:
    read, shares = durations + 2, 2 * durations
    return {
        FORWARD: Cost(read * cells * size),
        BACKWARD: Cost((shares + read) * cells * size),
        BOTH: Cost(2 * (shares + read) * cells * size),
    }


def _case(batch: int, frames: int, symbols: int, *, ragged: bool = False) -> Case:
    shape = f"{batch}x{frames}x{symbols}"

    def arguments(make: Make) -> dict:
        parts = torch.linspace(0.5, 1, batch).tolist()
        boundary = [[0, 0, int(symbols * p), int(frames * p)] for p in parts] if ragged else None
        return _lattice(make, batch, frames, symbols, boundary=boundary, mean=-3.0)

    costs = partial(_costs, batch * frames * (symbols + 1), len(PARAKEET))
    options: dict[str, Any] = {"copy": True, "compiles": False, "others": {"upstream": _peer}, "shape": shape}
    return case("tdt_lattice", shape, arguments, costs, ", ragged" * ragged, **options)


def sized(T: int = 188, B: int = 4, S: int = 20) -> Case:
    return _case(B, T, S)


CASES = (_case(4, 188, 40), _case(4, 188, 40, ragged=True), _case(1, 20, 5))
ON_DEVICE = CASES[:2]
WATCH = "frames of a sequence handed from thread to thread through memory between barriers"
