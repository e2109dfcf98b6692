# SPDX-License-Identifier: Apache-2.0
"""Canaries: errors of the interpreter that the repair must remove."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from steps import numbers

from tests.kernels.interpreter import repair


@triton.jit
def _copy(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(Y.dtype.element_ty))


@triton.jit
def _fma(A, B, C, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.fma(tl.load(A + i), tl.load(B + i), tl.load(C + i)))


@triton.jit
def _dot(A, B, C, N: tl.constexpr):
    i = tl.arange(0, N)
    offsets = i[:, None] * N + i[None, :]
    tl.store(C + offsets, tl.dot(tl.load(A + offsets), tl.load(B + offsets), input_precision="ieee"))


def _every_kind_of_float() -> torch.Tensor:
    generator = numbers("floats")
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=generator, dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00008000, 0, -(2**31)], dtype=torch.int32)
    special = torch.tensor([0x7F800000, -0x00800000, 0x7FC00000, 1], dtype=torch.int32)
    values = torch.cat([bits, ties, special, torch.zeros(86, dtype=torch.int32)])
    assert values.numel() == 4096
    return values.view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_is_torchs(dtype):
    x = _every_kind_of_float()
    y = torch.empty(4096, dtype=dtype)
    _copy[(1,)](x, y, 4096)
    expected = x.to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()], expected[~y.isnan()])


def test_widening_is_exact():
    x = _every_kind_of_float().bfloat16()
    y = torch.empty(4096)
    _copy[(1,)](x, y, 4096)
    assert torch.equal(y.nan_to_num(7.0), x.float().nan_to_num(7.0))


def test_fma_rounds_once():
    one = torch.tensor([1.0 + 2.0**-12] * 16)
    y = torch.empty(16)
    _fma[(1,)](one, one, -torch.full((16,), 1.0 + 2.0**-11), y, 16)
    assert torch.equal(y, torch.full((16,), 2.0**-24))


def test_bfloat16_dot():
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    c = torch.empty(16, 16)
    _dot[(1,)](a, b, c, 16)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_ties_go_to_even():
    values = np.array([0x3F808000, 0x3F818000], dtype=np.uint32).view(np.float32)
    assert repair.narrow(values).tolist() == [0x3F80, 0x3F82]


@pytest.mark.usefixtures("products_in_order")
def test_products_in_order():
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    ab, ba = torch.empty(32, 32), torch.empty(32, 32)
    _dot[(1,)](a, b, ab, 32)
    _dot[(1,)](b.T.contiguous(), a.T.contiguous(), ba, 32)
    assert torch.equal(ab, ba.T)
    expected = torch.zeros(32, 32)
    for k in range(32):
        expected = (expected.double() + a[:, k, None].double() * b[None, k].double()).float()
    assert torch.equal(ab, expected)
