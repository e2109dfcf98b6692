# SPDX-License-Identifier: Apache-2.0
"""rnnt_lattice at the sizes of a training batch, of a short one, and of a model with few frames."""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BACKWARD,
    BOTH,
    FORWARD,
    Case,
    Cost,
    Implementation,
    simple,
    upstream_member,
    versions,
)

PEER = "fast_rnnt.mutual_information_recursion"


def _peer(x: torch.Tensor, y: torch.Tensor, boundary: torch.Tensor | None) -> Implementation:
    function = upstream_member(PEER)
    return simple(lambda x, y: function(x, y, boundary), x, y)


def _make(
    batch: int, symbols: int, frames: int, modified: bool, ragged: bool, device: str, dtype: torch.dtype
):
    x = torch.randn(batch, symbols, frames + (not modified), device=device, dtype=dtype) - 4
    y = torch.randn(batch, symbols + 1, frames, device=device, dtype=dtype) - 1
    if not modified:
        x[:, :, frames] = -float("inf")
    boundary = None
    if ragged:
        part = torch.linspace(0.5, 1, batch)
        rows = [[0, 0, int(symbols * p), int(frames * p)] for p in part.tolist()]
        boundary = torch.tensor(rows, device=device)
    upstream = {"upstream": lambda: _peer(x, y, boundary)}
    return versions(ops.rnnt_lattice, x, y, options={"boundary": boundary}, others=upstream, compiles=False)


def costs(cells: int, size: int) -> dict[str, Cost]:
    return {
        FORWARD: Cost(2 * cells * size),  # both log probabilities
        BACKWARD: Cost(3 * cells * size),  # shares; both gradients
        BOTH: Cost(6 * cells * size),  # and the shares written
    }


def _case(batch: int, symbols: int, frames: int, *, modified: bool = False, ragged: bool = False) -> Case:
    shape = f"{batch}x{symbols}x{frames}"
    name = shape + ", modified" * modified + ", ragged" * ragged
    make = partial(_make, batch, symbols, frames, modified, ragged)
    cells = batch * (symbols + 1) * (frames + 1)
    return Case("rnnt_lattice", name, shape, make, partial(costs, cells), copy=True)


CASES = (
    _case(40, 100, 750),
    _case(40, 100, 750, ragged=True),
    _case(40, 100, 750, modified=True),
    _case(4, 60, 400),
    _case(1, 10, 40),
)
ON_DEVICE = CASES[:3]
