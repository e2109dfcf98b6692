# SPDX-License-Identifier: Apache-2.0
"""Calls of kernels inside models, mostly of recorded passes, which are no ops and have no samples."""

import importlib
from collections.abc import Callable, Sequence

import torch

from fastasr.ops import _decided, _folded_norm, _linear, _row, _weighted_values
from fastasr.ops.balancer_gradient import Balanced, sums_of
from fastasr.ops.bypass import dropped, dropped_gradients
from fastasr.ops.whitening_gradient import Whitened, moments_of


def launch(device: str) -> None:
    """Runs every step, in float32 and with branches in bfloat16."""
    made = torch.Generator(device).manual_seed(0)

    def uniform(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(shape, generator=made, device=device, dtype=torch.float32).to(dtype)

    def table(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=device)

    def later(total: torch.Tensor, do: Callable[..., None], work: tuple[torch.Tensor, ...]) -> bool:
        do([work], table)
        return True

    rate, scale, act = (torch.tensor(n, dtype=torch.float32, device=device) for n in ([0.5], [2.0], [1.0]))
    limits = torch.tensor([1.0, 0.2, 0.8], dtype=torch.float32, device=device)
    drawn = _decided.Drawn(uniform(2, 1), rate)
    of_row = drawn._replace(of=torch.arange(9, device=device, dtype=torch.int64) // 5)
    for dtype in (torch.float32, torch.bfloat16):
        src, y = uniform(9, 2, 70), uniform(9, 2, 70, dtype=dtype)
        for kept in (None, drawn):
            _decided.plus(src, y, kept, dtype)
            _decided.gradients([src, src, src, y, y], kept, torch.float32, dtype)
        row, branch = src[:, :1].contiguous(), y[:, :1].contiguous()
        _decided.plus(row, branch, of_row, dtype)
        skipping = row, branch, uniform(70), of_row
        dropped_gradients(dropped(*skipping), *skipping)
        _decided.mask(y, rate, scale)
        _decided.either(uniform(1, 2, 9, 16, dtype=dtype)[..., :9], act)
        weights, values = uniform(5, 2, 9, 16, dtype=dtype)[..., :9], y
        sums = _weighted_values.products(weights, values)
        summed = sums.forward(weights, values)
        for add in (False, True):
            sums.backward(summed, weights, values, torch.zeros_like(weights), add)
        wide, hidden = uniform(600, 1, 32, dtype=dtype), uniform(600, 1) > 0.5
        _linear.bias_grad(wide, "triton", later)
        for of_nobody in (None, hidden):
            some = wide[:9], -1, act, of_nobody if of_nobody is None else of_nobody[:9]
            sums_of([Balanced(wide, -1, act, of_nobody), Balanced(*some)], table)
            moments_of([Whitened(wide, 1, act, of_nobody), Whitened(some[0], 2, *some[2:])], table)
    weight, state = uniform(96, 64), torch.zeros(130, dtype=torch.int64, device=device)
    cast, forced = weight.to(torch.bfloat16), torch.ones(1, dtype=torch.int64, device=device)
    importlib.import_module("fastasr.kernels._casts").Casts([(cast, weight, state)], forced).run()
    conv = torch.nn.Conv1d(70, 70, 9, groups=70, device=device).requires_grad_(False)
    norm = torch.nn.BatchNorm1d(70, device=device).requires_grad_(False)
    _folded_norm.folded(conv, norm)
    begins, lengths = (torch.tensor(n, dtype=torch.int64, device=device) for n in ([0, 4], [3, 5]))
    leaves = [uniform(9, 1, 70).requires_grad_(), uniform(2).requires_grad_()]
    (tables,) = _row.tables(leaves[0], begins, begins + lengths, 10, (1,))
    with torch.enable_grad():
        means = _row.averaged(_row.moved(leaves[0], begins, begins, lengths, 10), tables.left, leaves[1])
        torch.autograd.grad(means, leaves, torch.ones_like(means))
    x = uniform(70)
    for end in (None, later):
        _decided.limited(x, x, limits, None, end)
        _decided.limited(_decided.scaled(x, drawn), x, limits, drawn, end)
