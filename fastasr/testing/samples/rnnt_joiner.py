# SPDX-License-Identifier: Apache-2.0
"""Samples of rnnt_joiner, and its benchmark at the sizes of a pruned transducer: 8,000 rows of 512 channels, 500 and
5,000 outputs."""

from typing import Any

import torch

from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import Case, Cost, case, costs_of
from fastasr.testing.table import Make, OpTable, Sample, invalid


def _call(
    make: Make,
    batch: int,
    frames: int,
    length: int,
    s_range: int,
    d: int,
    v: int,
    bias: bool = True,
    **more: Any,
) -> dict:
    """Makes windows that move evenly from the first context to the last."""
    last = max(0, length + 1 - s_range)
    starts = torch.arange(frames) * last // max(1, frames - 1)
    generator = torch.Generator().manual_seed(7)
    call = {
        "am": make.normal(batch, frames, d),
        "lm": make.normal(batch, length + 1, d),
        "weight": make.normal(v, d, scale=d**-0.5 if d else 1.0),
        "bias": make.normal(v, scale=0.3) if bias else None,
        "symbols": torch.randint(0, v, (batch, length), generator=generator).to(make.device),
        "starts": starts.expand(batch, frames).contiguous().to(make.device),
        "s_range": s_range,
        "termination_symbol": 0,
    }
    return call | more


def saturated(call: dict) -> dict:
    """Moves the sums of am and lm to where tanh' shows how tanh was rounded."""
    return call | {"lm": call["lm"] + 4}


def _short(make: Make, *sizes: int, **more: Any) -> dict:
    """Makes windows that end before the last context. Every row then has a symbol, so all values are finite."""
    batch, frames, length, s_range, channels, outputs = sizes
    call = _call(make, batch, frames, length, s_range, channels, outputs, **more)
    return call | {"starts": call["starts"].clamp(max=length - s_range)}


def _symbols_but_blank(call: dict) -> dict:
    """Replaces blank among the symbols, because its probability as a symbol is 0 in a HAT."""
    outputs, blank = call["weight"].shape[0], call["termination_symbol"]
    return call | {"symbols": (blank + 1 + call["symbols"] % max(1, outputs - 1)) % outputs}


def _hat(make: Make, *sizes: int, **more: Any) -> dict:
    return _symbols_but_blank(_short(make, *sizes, hat=True, **more))


def dropout(make: Make, p: float, seed: int) -> dict:
    return {"dropout_p": p, "dropout_seed": torch.tensor([seed], device=make.device)}


def _boundary(make: Make, *rows: tuple[int, int, int, int]) -> torch.Tensor:
    return torch.tensor(rows, device=make.device)


def _padded(make: Make) -> dict:
    """Makes ragged sequences with invalid symbols behind the end of each."""
    call = _call(make, 3, 9, 6, 3, 16, 11)
    symbols = call["symbols"].clone()
    symbols[1, 4:] = -1
    symbols[2, 0:] = 99
    boundary = _boundary(make, (0, 0, 6, 9), (1, 2, 4, 7), (0, 0, 0, 5))
    return call | {"symbols": symbols, "boundary": boundary}


def _random(make: Make, shape: Shape) -> dict:
    length, v = shape.size() % 20, 2 + shape.size()
    call = _call(
        make,
        shape.size() % 4,
        shape.size() % 20,
        length,
        1 + shape.size() % 6,
        shape.size() % 40,
        v,
        termination_symbol=shape.choice((0, v - 1)),
        activation=shape.choice(("tanh", "relu")),
        hat=shape.choice((False, True)),
        keep_logits=shape.choice((None, True, False)),
    )
    if shape.choice((False, True)):
        call |= dropout(make, shape.size() % 10 / 10, shape.size())
    return _symbols_but_blank(call)


TABLE = OpTable(
    op="rnnt_joiner",
    samples=(
        Sample("small", lambda m: _short(m, 2, 4, 5, 2, 8, 7), thorough=True),
        Sample(
            "relu, no bias",
            lambda m: _short(m, 2, 4, 5, 2, 12, 9, bias=False, activation="relu"),
            thorough=True,
        ),
        Sample("HAT", lambda m: _hat(m, 2, 5, 6, 3, 8, 13, termination_symbol=3), thorough=True),
        Sample(
            "logits computed again",
            lambda m: _short(m, 2, 4, 5, 3, 8, 7, termination_symbol=6, keep_logits=False),
            thorough=True,
        ),
        Sample(
            "dropout",
            lambda m: _short(m, 2, 4, 5, 3, 8, 7, keep_logits=False, **dropout(m, 0.3, 2**45 + 11)),
            thorough=True,
        ),
        Sample(
            "dropout, saturated values",
            lambda m: saturated(_call(m, 2, 6, 5, 3, 32, 7, **dropout(m, 0.3, 5))),
        ),
        Sample(
            "dropout, relu, logits kept",
            lambda m: _short(
                m, 2, 4, 5, 2, 40, 9, activation="relu", keep_logits=True, **dropout(m, 0.5, -7)
            ),
        ),
        Sample("to the last context", lambda m: _call(m, 2, 7, 5, 3, 17, 33)),
        Sample("boundary", _padded),
        Sample("boundary, computed again", lambda m: _padded(m) | {"keep_logits": False}, large=True),
        Sample(
            "HAT with a boundary",
            lambda m: _symbols_but_blank(_padded(m)) | {"hat": True, "activation": "relu"},
        ),
        Sample("full lattice", lambda m: _call(m, 2, 3, 4, 5, 16, 12)),
        Sample("a window beyond the last context", lambda m: _call(m, 1, 3, 2, 5, 16, 12)),
        Sample("one output", lambda m: _call(m, 2, 3, 4, 2, 8, 1)),
        Sample("model", lambda m: _call(m, 2, 60, 13, 5, 128, 500), large=True),
        Sample(
            "model, computed again", lambda m: _call(m, 2, 60, 13, 5, 128, 500, keep_logits=False), large=True
        ),
        Sample("wide", lambda m: _call(m, 1, 11, 7, 3, 96, 2051), large=True),
        Sample("no symbols", lambda m: _call(m, 2, 4, 0, 1, 8, 7)),
        Sample("no frames", lambda m: _call(m, 2, 0, 3, 2, 8, 7)),
        Sample("no sequences", lambda m: _call(m, 0, 4, 3, 2, 8, 7)),
        Sample("no channels", lambda m: _call(m, 2, 4, 3, 2, 0, 7)),
    ),
    invalid=invalid(
        lambda m: _call(m, 2, 4, 5, 2, 8, 7, **dropout(m, 0.5, 3)),
        ("lm without contexts", "lm", torch.zeros(2, 0, 8)),
        ("weight in half precision", "weight", torch.zeros(7, 8).half(), TypeError),
        ("a symbol outside the vocabulary", "symbols", torch.full((2, 5), 7)),
        ("a negative symbol", "symbols", torch.full((2, 5), -1)),
        ("starts out of range", "starts", torch.full((2, 4), 6)),
        ("beyond the frames", "boundary", torch.tensor([[0, 0, 5, 4], [0, 0, 5, 5]])),
        ("outside", "termination_symbol", 7),
        ("dropout without a seed", "dropout_seed", None),
    ),
    thread_invariant=False,
    unread=("am", "lm"),
    random=_random,
)


# --- the benchmark


def _case(
    outputs: int, keep_logits: bool | None = None, sizes: tuple[int, ...] = (4, 400, 60, 5, 512)
) -> Case:
    batch, frames, length, s_range, channels = sizes

    def arguments(make: Make) -> dict:
        call = _call(make, batch, frames, length, s_range, channels, outputs, keep_logits=keep_logits)
        return _symbols_but_blank(call)

    def costs(size: int) -> dict[str, Cost]:
        rows = batch * frames * s_range
        operands = (batch * (frames + length + 1) + outputs) * channels * size
        product = 2 * rows * channels * outputs
        return costs_of(Cost(operands + 8 * rows, product), Cost(2 * operands + 8 * rows, 2 * product))

    shape = f"{batch}x{frames}x{s_range}x{channels}, V={outputs}"
    name = shape if keep_logits is None else f"{shape}, logits computed again"
    options: dict[str, Any] = {"result": lambda _, y: torch.stack(y)}
    return case("rnnt_joiner", name, arguments, costs, shape=shape, **options)


def sized(T: int = 400, B: int = 4, S: int = 60, s_range: int = 5, D: int = 512, V: int = 500) -> Case:
    return _case(V, sizes=(B, T, S, s_range, D))


CASES = (_case(500), _case(500, False), _case(5000), _case(5000, False))
ON_DEVICE = CASES[::2]
WATCH = "outputs shared among programs, whose sums a second kernel adds; `torch.mm(out_dtype=...)`"
