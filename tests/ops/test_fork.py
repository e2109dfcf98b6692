# SPDX-License-Identifier: Apache-2.0
"""A forked DataLoader worker computes what its parent computed before: pools of buffers and threads survive a fork."""

import pytest
import torch
from torch.utils.data import DataLoader

from fastasr import ops
from fastasr.testing import Make, tables
from fastasr.testing.table import flat, floating, with_tensors

SECONDS = 60


class Results(torch.utils.data.Dataset):
    """The output and gradients of every op, in one tensor each, and last a result from the pool of large buffers."""

    names = tuple(tables())

    def __len__(self):
        return len(self.names) + 1

    def __getitem__(self, index):
        if index == len(self.names):
            return ops.swoosh_r(torch.linspace(-3, 3, 2_300_000))
        table = tables()[self.names[index]]
        arguments = next(s for s in reversed(table.samples) if s.exact).arguments(Make())
        leaves = with_tensors(arguments, lambda _, t: t.requires_grad_())
        out = flat(table.function(**leaves))
        cotangent = Make(seed="cotangent").normal(*out.shape)
        grads = torch.autograd.grad(out, list(floating(leaves).values()), cotangent)
        return torch.cat([t.detach().flatten() for t in (out, *grads)])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_forked_worker(workers):
    torch.set_num_threads(2)
    expected = list(Results())
    loader = DataLoader(
        Results(), batch_size=None, num_workers=workers, multiprocessing_context="fork", timeout=SECONDS
    )
    for name, ours, theirs in zip((*Results.names, "buffers"), loader, expected, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")
    again = list(Results())
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
