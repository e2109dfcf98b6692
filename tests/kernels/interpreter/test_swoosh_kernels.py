# SPDX-License-Identifier: Apache-2.0
"""Swoosh kernels in the interpreter against float64."""

import pytest
import torch

from fastasr.kernels.swoosh import BLOCK, DTYPES, swoosh_backward, swoosh_forward
from fastasr.testing.tolerance import compare

SHAPES = [(1,), (5,), (BLOCK,), (BLOCK + 9,), (2 * BLOCK - 16,), (9, 3, 40), (17, 2, 260), (3, 1), (2, 5, 1)]


def _formula(x, right):
    shift, offset = (1.0, 0.313261687) if right else (4.0, 0.035)
    return torch.logaddexp(torch.zeros_like(x), x - shift) - 0.08 * x - offset


def _mask(shape, shared_dim, dtype):
    """Returns no mask for shared_dim None, and one of full size for -1."""
    if shared_dim is None:
        return None
    size = [1 if d == shared_dim else n for d, n in enumerate(shape)]
    return ((torch.rand(size) > 0.25) / 0.75).to(dtype)


def _inputs(shape, shared_dim, dtype):
    torch.manual_seed(0)
    return (torch.randn(shape) * 4).to(dtype), _mask(shape, shared_dim, dtype), torch.randn(shape).to(dtype)


def _expected(x, right, mask, grad):
    wide = x.double().requires_grad_()
    y = _formula(wide, right) * (1.0 if mask is None else mask.double())
    y.backward(grad.double())
    return y.detach(), wide.grad


CASES = [(shape, d) for shape in SHAPES for d in (None, -1, *range(len(shape)))]


# Long vectors take the interpreter long, and float16 follows bfloat16's path through them.
TYPED_CASES = [
    (*case, dtype)
    for case in CASES
    for dtype in DTYPES
    if not (dtype is torch.float16 and len(case[0]) == 1 and case[0][0] > 5)
]


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize(("shape", "shared_dim", "dtype"), TYPED_CASES, ids=str)
def test_values_and_gradients(shape, shared_dim, dtype, right):
    x, mask, grad = _inputs(shape, shared_dim, dtype)
    index = -1 if shared_dim is None else shared_dim
    y = swoosh_forward(x, right, mask, index)
    dx, again = swoosh_backward(grad, x, right, mask, index, True)
    dx_alone, nothing = swoosh_backward(grad, x, right, mask, index, False)
    expected, expected_dx = _expected(x, right, mask, grad)
    assert y.dtype == dx.dtype == dtype
    assert torch.equal(y, again)
    assert torch.equal(dx, dx_alone)
    assert nothing.numel() == 0
    assert nothing.dtype == dtype
    # 16-bit types are correctly rounded, up to the short polynomial's 1e-5 and their smallest numbers.
    narrow = dtype.itemsize == 2
    rtol = 0.51 * torch.finfo(dtype).eps if narrow else 4e-7
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=1.1e-5 if narrow else 2e-7)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
def test_error_is_not_above_that_of_eager(right):
    for scale in (0.1, 1.0, 4.0, 30.0):
        torch.manual_seed(1)
        x, grad = torch.randn(20000) * scale, torch.randn(20000)
        eager = x.clone().requires_grad_()
        y_eager = _formula(eager, right)
        y_eager.backward(grad)
        expected, expected_dx = _expected(x, right, None, grad)
        y, dx = swoosh_forward(x, right, None, -1), swoosh_backward(grad, x, right, None, -1, False)[0]
        for comparison in (compare(y, y_eager, expected), compare(dx, eager.grad, expected_dx)):
            assert comparison.ok, f"scale {scale}: {comparison}"


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, right):
    big = 3e4 if dtype is torch.float16 else 1e38
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e4, -1e4, big, -big, 0.0, -0.0]).to(dtype)
    y = swoosh_forward(x, right, None, -1)
    dx, _ = swoosh_backward(torch.ones_like(x), x, right, None, -1, False)
    expected, _ = _expected(x, right, None, torch.ones_like(x))
    torch.testing.assert_close(
        y, expected.to(dtype), equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )
    slope = (torch.sigmoid(x.double() - (1.0 if right else 4.0)) - 0.08).to(dtype)
    torch.testing.assert_close(dx, slope, equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty(shape):
    x = torch.empty(shape)
    for shared_dim in (None, -1, *range(len(shape))):
        mask = _mask(shape, shared_dim, torch.float32)
        index = -1 if shared_dim is None else shared_dim
        assert swoosh_forward(x, True, mask, index).shape == shape
        assert swoosh_backward(x, x, True, mask, index, True)[1].shape == shape


def test_mask_of_another_type():
    x, mask, _ = _inputs((9, 2, 40), 0, torch.bfloat16)
    y = swoosh_forward(x, False, mask.float(), 0)
    assert y.dtype == torch.float32
    expected = _formula(x.double(), False) * mask.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize(("shape", "shared_dim"), CASES, ids=str)
def test_no_address_is_stored_twice(shape, shared_dim, writes):
    x, mask, grad = _inputs(shape, shared_dim, torch.float32)
    swoosh_backward(grad, x, True, mask, -1 if shared_dim is None else shared_dim, True)
    assert writes.count == 2 * x.numel()
    assert writes.clashes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "shared_dim"), CASES, ids=str)
def test_no_read_past_the_end(shape, shared_dim, dtype, guarded):
    x, mask, grad = _inputs(shape, shared_dim, dtype)
    index = -1 if shared_dim is None else shared_dim
    plain = swoosh_backward(grad, x, True, mask, index, True)
    x, grad, mask = guarded(x), guarded(grad), None if mask is None else guarded(mask)
    for a, b in zip(plain, swoosh_backward(grad, x, True, mask, index, True), strict=True):
        assert torch.equal(a, b)
