# SPDX-License-Identifier: Apache-2.0
"""Swoosh with every kind of mask, at the sizes where its kernels change: correct to the rounding of the result."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fastasr.kernels._flat import flat_range
from fastasr.kernels._swoosh import exp_minus_abs
from fastasr.kernels.swoosh import BLOCK, swoosh_backward, swoosh_forward
from fastasr.testing.tolerance import compare

DTYPES = torch.float32, torch.bfloat16, torch.float16

# (shape, dimension along which the mask is shared; None: no mask, -1: a mask of full size)
CASES = [
    *(((n,), d) for n, d in ((1, None), (5, -1), (BLOCK, 0), (BLOCK + 9, -1), (2 * BLOCK - 16, None))),
    *(((9, 3, 40), d) for d in (None, -1, 0, 1, 2)),
    *(((17, 2, 260), d) for d in (0, 1, 2)),
    *(((3, 1), d) for d in (0, 1)),
    *(((2, 5, 1), d) for d in (-1, 1, 2)),
    *(((0, 3, 4), d) for d in (None, 0, "named")),
    *((shape, "named") for shape in ((9, 3, 40), (17, 2, 260), (70, 1))),
    ((3, 4, 0), 2),
]


def _formula(x, right):
    shift, offset = (1.0, 0.313261687) if right else (4.0, 0.035)
    return torch.logaddexp(torch.zeros_like(x), x - shift) - 0.08 * x - offset


def _mask(shape, shared_dim, dtype):
    """Returns a mask and the rows that x's rows have there, or None."""
    if shared_dim is None:
        return None, None
    if shared_dim == "named":
        row = torch.randint(3, shape[:-1])
        return ((torch.rand(3, shape[-1]) > 0.25) / 0.75).to(dtype), row
    size = [1 if d == shared_dim else n for d, n in enumerate(shape)]
    return ((torch.rand(size) > 0.25) / 0.75).to(dtype), None


@pytest.mark.parametrize(
    ("case", "dtype", "right"),
    [(case, dtype, (i + j) % 2 == 0) for i, case in enumerate(CASES) for j, dtype in enumerate(DTYPES)],
    ids=str,
)
def test_values_and_gradients(case, dtype, right):
    """Of the pairs of a case, a dtype and a side each occurs once."""
    shape, shared_dim = case
    x, (mask, row) = (torch.randn(shape) * 4).to(dtype), _mask(shape, shared_dim, dtype)
    grad = torch.randn(shape).to(dtype)
    index = shared_dim if isinstance(shared_dim, int) else -1
    y = swoosh_forward(x, right, mask, index, row)
    dx, again = swoosh_backward(grad, x, right, mask, index, row, True)
    dx_alone, nothing = swoosh_backward(grad, x, right, mask, index, row, False)
    mask = mask if row is None else mask[row]
    wide = x.double().requires_grad_()
    expected = _formula(wide, right) * (1.0 if mask is None else mask.double())
    (expected_dx,) = torch.autograd.grad(expected, wide, grad.double())
    assert y.dtype == dx.dtype == dtype
    assert torch.equal(y, again)
    assert torch.equal(dx, dx_alone)
    assert nothing.numel() == 0
    assert nothing.dtype == dtype
    # 16-bit types are correctly rounded, up to the short polynomial's 1e-5 and their smallest numbers.
    narrow = dtype.itemsize == 2
    rtol = 0.51 * torch.finfo(dtype).eps if narrow else 4e-7
    torch.testing.assert_close(y.double(), expected.detach(), rtol=rtol, atol=1.1e-5 if narrow else 2e-7)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=rtol, atol=1e-6)


RIGHT = pytest.mark.parametrize("right", [False, True], ids=["left", "right"])


def _comparisons(x, right):
    """Yields how values and gradients compare with eager."""
    grad = torch.randn(len(x))
    wide = x.double().requires_grad_()
    eager, truth = _formula(x.requires_grad_(), right), _formula(wide, right)
    y, (dx, _) = swoosh_forward(x, right, None, -1), swoosh_backward(grad, x, right, None, -1, None, False)
    yield compare(y, eager, truth)
    (expected,) = torch.autograd.grad(truth, wide, grad.double())
    yield compare(dx, torch.autograd.grad(eager, x, grad)[0], expected)


@RIGHT
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0, 30.0])
def test_error_is_not_above_that_of_eager(scale, right):
    for comparison in _comparisons(torch.randn(20000) * scale, right):
        assert comparison.ok, str(comparison)


@RIGHT
def test_a_sum_is_rounded_once_at_its_scale(right):
    """With the offset added last, the error of values was above eager's here."""
    values, _ = _comparisons(torch.empty(20000).uniform_(2, 5) + (0.0 if right else 3.0), right)
    assert values.rms < 0.9 * values.eager_rms, str(values)


@RIGHT
def test_the_reciprocal_of_hardware_is_corrected(right, monkeypatch):
    """A GPU's reciprocal is off by up to 2 units in the last place; the interpreter's is exact."""
    exact = interpreter.InterpreterBuilder.create_fdiv

    def approximate(builder, a, b):
        found = exact(builder, a, b)
        sign = torch.randint(2, found.data.shape).numpy() * 2.0 - 1.0
        found.data = (found.data * (1.0 + sign * 2.0**-22)).astype(found.data.dtype)
        return found

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", approximate)
    for comparison in _comparisons(torch.randn(20000), right):
        assert comparison.ok, str(comparison)


@triton.jit
def _exponential(X, U, RIGHT: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    _, u = exp_minus_abs(tl.load(X + offsets), RIGHT, False)
    tl.store(U + offsets, u)


@RIGHT
@pytest.mark.parametrize("bounds", [(-10, -4), (-4, 0), (2, 8), (8, 16)], ids=str)
def test_the_exponential_errs_by_its_last_rounding_alone(bounds, right):
    """torch's errs by more where x - a rounds, which here is added back."""
    x = torch.empty(16384).uniform_(*bounds)
    u = torch.empty_like(x)
    _exponential[(1,)](x, u, RIGHT=right, SIZE=len(x))
    exact = (x.double() - (1.0 if right else 4.0)).abs().neg().exp()
    assert (u / exact - 1).square().mean().sqrt() < 0.5 * torch.finfo(torch.float32).eps


def test_mask_of_another_type():
    x = (torch.randn(9, 2, 40) * 4).bfloat16()
    mask, _ = _mask((9, 2, 40), 0, torch.float32)
    y = swoosh_forward(x, False, mask, 0)
    assert y.dtype == torch.float32
    expected = _formula(x.double(), False) * mask.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=2e-7)


@triton.jit
def _offsets(Y, groups, SIZE: tl.constexpr):
    offsets, keep = flat_range(groups, SIZE)
    tl.store(Y + tl.arange(0, SIZE), offsets, mask=keep)


def test_offsets_beyond_32_bits(monkeypatch):
    """A program in the middle of a tensor of more than 2^31 elements finds its own."""
    program = 2**31 // BLOCK + 1
    y = torch.zeros(BLOCK, dtype=torch.int64)
    number = interpreter.TensorHandle(np.array([program], dtype=np.int32), tl.int32)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", lambda *_: number)
    _offsets[(1,)](y, (program + 1) * BLOCK // 16, SIZE=BLOCK)
    assert torch.equal(y, program * BLOCK + torch.arange(BLOCK))
