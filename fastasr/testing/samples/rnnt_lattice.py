# SPDX-License-Identifier: Apache-2.0
"""Samples of rnnt_lattice, and its benchmark at the sizes of a training batch, of a short one, and of a model with few
frames."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastasr.testing.fuzz import Shape
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
from fastasr.testing.table import Make, OpTable, Sample, invalid, sampler


def _lattice(
    make: Make,
    batch: int,
    symbols: int,
    frames: int,
    *,
    modified: bool = False,
    boundary: list | None = None,
    mean: float = -2.0,
    scale: float = 1.0,
    **rest: Any,
) -> dict:
    x = make.normal(batch, symbols, frames + (not modified), scale=scale, mean=mean)
    y = make.normal(batch, symbols + 1, frames, scale=scale, mean=mean / 2)
    arguments = {"symbol_logprobs": x, "blank_logprobs": y}
    if boundary is not None:
        rows = torch.tensor(boundary, dtype=torch.int64, device=make.device)
        arguments["boundary"] = rows.reshape(batch, 4)
    return arguments | rest


def _last_column(make: Make, batch: int, symbols: int, frames: int, **rest: Any) -> dict:
    """Makes a lattice as losses do: no symbol follows the last frame, and some symbols are impossible."""
    arguments = _lattice(make, batch, symbols, frames, **rest)
    x = arguments["symbol_logprobs"]
    x[:, :, frames] = -float("inf")
    x[:, 1, :2] = -float("inf")
    return arguments


def _special(value: float, modified: bool = False, **rest: Any) -> Callable[[Make], dict]:
    def arguments(make: Make) -> dict:
        made = _lattice(make, 2, 4, 6, modified=modified, boundary=[[0, 0, 4, 6], [0, 0, 3, 6]], **rest)
        made["symbol_logprobs"][0, 2, 3] = value
        made["blank_logprobs"][1, 4, 2] = value  # outside the boundary
        return made

    return arguments


def random_boundary(shape: Shape, batch: int, symbols: int, frames: int) -> list | None:
    """Draws whether there is a boundary, and its rows."""
    if not shape.choice((False, True)):
        return None
    rows = []
    for _ in range(batch):
        s, t = (sorted(shape.choice(range(n + 1)) for _ in "12") for n in (symbols, frames))
        rows.append([s[0], t[0], s[1], t[1]])
    return rows


def _random(make: Make, shape: Shape) -> dict:
    sizes = shape.choice((0, 1, 2, 3)), min(shape.size(), 40), min(shape.size(), 40)
    modified = shape.choice((False, True))
    return _lattice(make, *sizes, modified=modified, boundary=random_boundary(shape, *sizes))


_RAGGED = [[0, 0, 4, 7], [1, 2, 3, 6], [0, 0, 0, 4]]

_sample = sampler(_lattice)
TABLE = OpTable(
    op="rnnt_lattice",
    samples=(
        _sample("regular", (2, 3, 5), thorough=True),
        _sample("ragged", (3, 4, 7), boundary=_RAGGED, thorough=True),
        _sample("modified", (3, 4, 7), modified=True, boundary=_RAGGED, thorough=True),
        Sample("no symbol after the last frame", lambda m: _last_column(m, 2, 4, 7)),
        _sample("one sequence, occupations", (1, 7, 11), return_occupation=True),
        _sample(
            "one modified sequence, occupations",
            (1, 7, 11),
            modified=True,
            boundary=[[1, 2, 6, 10]],
            return_occupation=True,
        ),
        _sample("no symbols", (2, 0, 5)),
        _sample("no frames", (2, 3, 0)),
        _sample("no frames and no symbols", (2, 0, 0), modified=True),
        _sample("no sequences", (0, 3, 4)),
        _sample("one symbol, one frame", (2, 1, 1), modified=True),
        _sample("unreachable: more symbols than frames", (2, 6, 4), modified=True),
        _sample("empty boundaries", (3, 2, 3), boundary=[[0, 0, 0, 0], [1, 2, 1, 2], [2, 3, 2, 3]]),
        _sample("sixteen rows", (2, 15, 40), large=True),
        _sample("seventeen rows", (2, 16, 33), large=True),
        _sample("long", (3, 37, 110), boundary=[[0, 0, 37, 110], [0, 0, 20, 61], [3, 5, 36, 99]], large=True),
        _sample("long, modified", (2, 37, 110), modified=True, large=True),
        _sample("steep", (2, 90, 7), mean=0.0, large=True),
        _sample("improbable", (2, 5, 7), mean=-20.0, scale=10.0),
        _sample("probable", (2, 5, 7), mean=1.0),
        Sample("NaN", _special(float("nan")), exact=False),
        Sample("NaN, modified", _special(float("nan"), modified=True), exact=False),
        Sample("inf", _special(float("inf")), exact=False),
        Sample("-inf", _special(-float("inf")), exact=False),
        Sample("NaN, occupations", _special(float("nan"), return_occupation=True), exact=False),
        Sample("-inf, occupations", _special(-float("inf"), return_occupation=True), exact=False),
        _sample("unreachable, occupations", (1, 6, 4), modified=True, return_occupation=True, exact=False),
    ),
    invalid=invalid(
        lambda m: _lattice(m, 2, 3, 4),
        ("frames", "symbol_logprobs", lambda m: m.normal(2, 3, 6)),
        *(
            (name, "boundary", torch.tensor([[0, 0, 3, 4], row]))
            for name, row in (
                ("symbols outside", [0, 0, 4, 4]),
                ("frames outside", [0, 0, 3, 5]),
                ("negative begin", [-1, 0, 3, 4]),
                ("end before begin", [2, 0, 1, 4]),
                ("frames backwards", [0, 3, 1, 2]),
            )
            if not torch.cuda.is_available()  # values are checked on the CPU only
        ),
    ),
    rows=("symbol_logprobs", "blank_logprobs", "boundary"),
    random=_random,
)


# --- the benchmark

PEER = "fast_rnnt.mutual_information_recursion"


def _peer(symbol_logprobs: Tensor, blank_logprobs: Tensor, boundary: Tensor | None = None) -> Implementation:
    function = upstream_member(PEER)
    return simple(lambda x, y: function(x, y, boundary), symbol_logprobs, blank_logprobs)


def lattice_costs(cells: int) -> Callable[[int], dict[str, Cost]]:
    return lambda size: {
        FORWARD: Cost(2 * cells * size),  # both log probabilities
        BACKWARD: Cost(3 * cells * size),  # shares; both gradients
        BOTH: Cost(6 * cells * size),  # and the shares written
    }


def _case(batch: int, symbols: int, frames: int, *, modified: bool = False, ragged: bool = False) -> Case:
    def arguments(make: Make) -> dict:
        parts = torch.linspace(0.5, 1, batch).tolist()
        boundary = [[0, 0, int(symbols * p), int(frames * p)] for p in parts] if ragged else None
        made = _lattice(make, batch, symbols, frames, modified=modified, boundary=boundary, mean=-4.0)
        if not modified:
            made["symbol_logprobs"][:, :, frames] = -float("inf")
        return made

    shape = f"{batch}x{symbols}x{frames}"
    note = ", modified" * modified + ", ragged" * ragged
    options: dict[str, Any] = {"copy": True, "compiles": False, "others": {"upstream": _peer}, "shape": shape}
    return case(
        "rnnt_lattice", shape, arguments, lattice_costs(batch * (symbols + 1) * (frames + 1)), note, **options
    )


def sized(T: int = 400, B: int = 4, S: int = 60) -> Case:
    return _case(B, S, T)


CASES = (
    _case(40, 100, 750),
    _case(40, 100, 750, ragged=True),
    _case(40, 100, 750, modified=True),
    _case(4, 60, 400),
    _case(1, 10, 40),
)
ON_DEVICE = CASES[:3]
WATCH = "the last column of a block of 1024 frames, passed through memory between barriers"
