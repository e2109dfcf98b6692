# SPDX-License-Identifier: Apache-2.0
"""rnnt_pruned_lattice at the sizes of a training batch; fast_rnnt scatters the band into a whole lattice."""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import Case, Implementation, simple, upstream_member, versions
from fastasr.benchmarks.ops.rnnt_lattice import PEER, costs


def _peer(x: torch.Tensor, y: torch.Tensor, starts: torch.Tensor, symbols: int) -> Implementation:
    recursion = upstream_member(PEER)
    batch, frames, window = x.shape
    at = (starts[..., None] + torch.arange(window, device=x.device)).transpose(1, 2)  # (B, R, T)

    def scattered(x, y):
        whole_x = x.new_full((batch, symbols + 1, frames + 1), -float("inf"))
        whole_y = x.new_full((batch, symbols + 1, frames), -float("inf"))
        whole_x = whole_x.scatter(1, at, x.transpose(1, 2))[:, :symbols]
        return recursion(whole_x.contiguous(), whole_y.scatter(1, at, y.transpose(1, 2)), None)

    return simple(scattered, x, y)


def _make(batch: int, symbols: int, frames: int, window: int, device: str, dtype: torch.dtype):
    x = torch.randn(batch, frames, window, device=device, dtype=dtype) - 4
    y = torch.randn(batch, frames, window, device=device, dtype=dtype) - 1
    rise = torch.linspace(0, symbols + 1 - window, frames, device=device).long()
    starts = rise.expand(batch, frames).contiguous()
    x[starts[..., None] + torch.arange(window, device=device) >= symbols] = -float("inf")
    upstream = {"upstream": lambda: _peer(x, y, starts, symbols)}
    inputs = x, y, starts
    return versions(ops.rnnt_pruned_lattice, *inputs, others=upstream, compiles=False, differentiable=(x, y))


def _case(batch: int, symbols: int, frames: int, window: int) -> Case:
    shape = f"{batch}x{frames}x{window}"
    make, cost = partial(_make, batch, symbols, frames, window), partial(costs, batch * frames * window)
    return Case("rnnt_pruned_lattice", f"{shape}, S={symbols}", shape, make, cost, copy=True)


CASES = (_case(40, 100, 750, 5), _case(4, 60, 400, 5), _case(1, 10, 40, 5))
ON_DEVICE = CASES[:1]
