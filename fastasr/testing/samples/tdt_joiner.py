# SPDX-License-Identifier: Apache-2.0
"""Samples of tdt_joiner, and its benchmark at a size of Parakeet: 31,000 rows of 640 channels, 8,193 tokens and 5
durations."""

from typing import Any

import torch

from fastasr.testing.fuzz import Shape
from fastasr.testing.samples.rnnt_joiner import dropout, saturated
from fastasr.testing.speed import Case, Cost, case, costs_of
from fastasr.testing.table import Make, OpTable, Sample, invalid


def _call(
    make: Make, batch: int, frames: int, length: int, d: int, v: int, n: int, bias: bool = True, **more: Any
) -> dict:
    """Makes windows that end before the last context. Every row then has a symbol, so all values are finite."""
    generator = torch.Generator().manual_seed(7)
    call = {
        "am": make.normal(batch, frames, d),
        "lm": make.normal(batch, length + 1, d),
        "weight": make.normal(v + n, d, scale=d**-0.5 if d else 1.0),
        "bias": make.normal(v + n, scale=0.3) if bias else None,
        "symbols": torch.randint(0, v, (batch, length), generator=generator).to(make.device),
        "starts": torch.zeros(batch, frames, dtype=torch.int64, device=make.device),
        "s_range": max(1, length),
        "durations": n,
        "termination_symbol": v - 1,
    }
    return call | more


def _ragged(make: Make, **more: Any) -> dict:
    """Makes whole lattices of ragged sequences, with invalid symbols behind the end of each."""
    call = _call(make, 3, 9, 6, 16, 11, 4, **more)
    symbols = call["symbols"].clone()
    symbols[1, 4:] = -1
    symbols[2, 0:] = 99
    boundary = torch.tensor([(0, 0, 6, 9), (1, 2, 4, 7), (0, 0, 0, 5)], device=make.device)
    return call | {"symbols": symbols, "boundary": boundary, "s_range": 7}


def _windowed(make: Make, **more: Any) -> dict:
    """Makes windows of three rows that move from the first context to the last one with a symbol."""
    call = _call(make, 2, 7, 5, 12, 9, 3, **more)
    starts = torch.arange(7, device=make.device) * 2 // 6
    return call | {"starts": starts.expand(2, 7).contiguous(), "s_range": 3}


def _random(make: Make, shape: Shape) -> dict:
    call = _call(
        make,
        shape.size() % 4,
        shape.size() % 12,
        shape.size() % 12,
        shape.size() % 40,
        1 + shape.size() % 40,
        1 + shape.size() % 6,
        bias=shape.choice((False, True)),
        activation=shape.choice(("tanh", "relu")),
        keep_logits=shape.choice((None, True, False)),
    )
    if shape.choice((False, True)):
        call |= dropout(make, shape.size() % 10 / 10, shape.size())
    return call


TABLE = OpTable(
    op="tdt_joiner",
    samples=(
        Sample("small", lambda m: _call(m, 2, 4, 3, 8, 7, 5), thorough=True),
        Sample(
            "relu, no bias",
            lambda m: _call(m, 2, 3, 2, 12, 9, 3, bias=False, activation="relu", keep_logits=False),
            thorough=True,
        ),
        Sample(
            "dropout",
            lambda m: _call(m, 2, 4, 3, 24, 7, 5, keep_logits=False, **dropout(m, 0.3, 2**45 + 11)),
            thorough=True,
        ),
        Sample(
            "dropout, saturated values",
            lambda m: saturated(_call(m, 2, 6, 3, 32, 7, 3, **dropout(m, 0.3, 5))),
        ),
        Sample(
            "dropout, relu, logits kept",
            lambda m: _call(m, 2, 4, 3, 40, 9, 2, activation="relu", keep_logits=True, **dropout(m, 0.5, -7)),
        ),
        Sample("no symbols", lambda m: _call(m, 2, 4, 0, 8, 7, 5)),
        Sample("boundary", _ragged),
        Sample("windows", _windowed, thorough=True),
        Sample("windows above the last context", lambda m: _windowed(m) | {"s_range": 5}),
        Sample(
            "windows, boundary",
            lambda m: _windowed(
                m, keep_logits=False, boundary=torch.tensor([(0, 0, 5, 7), (1, 2, 4, 6)], device=m.device)
            ),
        ),
        Sample("boundary, computed again", lambda m: _ragged(m, keep_logits=False), large=True),
        Sample("one token, one duration", lambda m: _call(m, 2, 3, 2, 8, 1, 1)),
        Sample("model", lambda m: _call(m, 2, 40, 7, 128, 500, 5, activation="relu"), large=True),
        Sample(
            "model, computed again",
            lambda m: _call(m, 2, 40, 7, 128, 500, 5, activation="relu", keep_logits=False),
            large=True,
        ),
        Sample("no frames", lambda m: _call(m, 2, 0, 3, 8, 7, 5)),
        Sample("no sequences", lambda m: _call(m, 0, 4, 3, 8, 7, 5)),
        Sample("no channels", lambda m: _call(m, 2, 4, 3, 0, 7, 5)),
    ),
    invalid=invalid(
        lambda m: _call(m, 2, 4, 5, 8, 7, 5, **dropout(m, 0.5, 3)),
        ("durations without tokens", "weight", torch.zeros(5, 8)),
        ("weight in half precision", "weight", torch.zeros(12, 8).half(), TypeError),
        ("a symbol outside the vocabulary", "symbols", torch.full((2, 5), 7)),
        ("beyond the frames", "boundary", torch.tensor([[0, 0, 5, 4], [0, 0, 5, 5]])),
        ("outside", "termination_symbol", 7),
        ("dropout without a seed", "dropout_seed", None),
    ),
    thread_invariant=False,
    unread=("am", "lm"),
    random=_random,
)


# --- the benchmark


def sized(T: int = 188, B: int = 4, S: int = 20, D: int = 640, V: int = 1025) -> Case:
    """Returns a case with windows of S rows, which lack the last context."""
    rows = B * T * S

    def costs(size: int) -> dict[str, Cost]:
        operands = (B * (T + S + 1) + V + 5) * D * size
        product = 2 * rows * D * (V + 5)
        return costs_of(Cost(operands + 28 * rows, product), Cost(2 * operands + 28 * rows, 2 * product))

    shape = f"{B}x{T}x{S}x{D}, V={V}"
    options: dict[str, Any] = {"result": lambda _, y: torch.cat([t.flatten() for t in y])}
    arguments = lambda m: _call(m, B, T, S, D, V, 5, activation="relu")  # noqa: E731
    return case("tdt_joiner", shape, arguments, costs, shape=shape, **options)


CASES = (sized(188, 4, 41, 640, 8193), sized(20, 1, 6, 64, 30))
ON_DEVICE = CASES[:1]
WATCH = "the durations' gradients beside the tokens' gradients; dropout by a hash"
