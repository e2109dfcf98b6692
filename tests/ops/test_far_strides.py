# SPDX-License-Identifier: Apache-2.0
"""Strided views whose elements lie more than 2³¹ elements apart: results are those of contiguous tensors.

The memory between the elements is reserved but never touched, so it takes no room.
"""

import mmap

import pytest
import torch
from steps import seeded

from fastasr.testing import Make, tables
from fastasr.testing.table import flat, floating

FAR = (1 << 31) + 64
NORESERVE = 0x4000  # Linux's; Python names it from 3.13 on


def far(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns a copy of ``t`` whose first and last index along ``dim`` are ``FAR`` elements apart."""
    if t.dim() == 0 or t.shape[dim] < 2 or not t.numel():
        return t
    strides = list(t.contiguous().stride())
    strides[dim] = FAR // (t.shape[dim] - 1) + 1
    elements = t.numel() + strides[dim] * t.shape[dim]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, elements * t.element_size(), flags=flags), dtype=t.dtype)
    return memory.as_strided(t.shape, strides).copy_(t)


def results(table, arguments, cotangent=None):
    leaves = {
        k: v.detach().requires_grad_() if v is not None and k in floating(arguments) else v
        for k, v in arguments.items()
    }
    out = flat(table.function(**leaves))
    cotangent = Make(seed="cotangent").normal(*out.shape) if cotangent is None else cotangent
    return cotangent, [out.detach(), *torch.autograd.grad(out, list(floating(leaves).values()), cotangent)]


@pytest.mark.parametrize("name", tables())
@pytest.mark.parametrize("dim", [0, -1])
def test_far_strides(name, dim):
    table = tables()[name]
    for sample in table.thorough:
        arguments = sample.arguments(Make())
        seeded(0)
        cotangent, expected = results(table, arguments)
        apart = {k: far(v, dim) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        seeded(0)
        _, found = results(table, apart, far(cotangent, dim))
        torch.testing.assert_close(found, expected, msg=lambda m, s=sample: f"{s.name}: {m}")
