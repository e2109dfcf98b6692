# SPDX-License-Identifier: Apache-2.0
"""The small steps of a recorded pass: kernels beside their formulas."""

import pytest
import torch

from fastasr import backend
from fastasr.ops import _decided
from fastasr.ops._decided import Drawn

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(5, 3, 7), (37, 2, 130)]


def both(function):
    """Returns the results of the formulas and of the kernels."""
    found = []
    for name in ("eager", "triton"):
        with backend(name):
            found.append(function())
    return found


def same(function):
    for a, b in zip(*both(function), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def drawn(batch):
    return Drawn(torch.rand(batch, 1), torch.tensor([9.0, 0.5])[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("of_src", "of_y", "narrow"), [(F32, BF16, BF16), (F32, F32, None), (BF16, BF16, None)]
)
def test_plus(shape, masked, of_src, of_y, narrow):
    src, y = torch.randn(shape).to(of_src), torch.randn(shape).to(of_y)
    kept = drawn(shape[1]) if masked else None
    same(lambda: _decided.plus(src, y, kept, narrow))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("own", [None, F32])
def test_gradients(shape, masked, count, own):
    grads = [torch.randn(shape).to(F32 if i < 3 else BF16) for i in range(count)]
    kept = drawn(shape[1]) if masked else None
    same(lambda: _decided.gradients(grads, kept, own, BF16))
    if own is not None:
        same(lambda: _decided.gradients(grads, kept, own, None))
    for name in ("eager", "triton"):
        with backend(name):
            found = _decided.gradients(grads, kept, F32, F32)
        places = {t.data_ptr() for t in (*grads, *found)}
        assert len(places) == count + 2  # each result is a tensor of its own


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_mask(dtype):
    uniform, (p, scale) = torch.rand(3, 1, 700).to(dtype), torch.tensor([0.25, 4 / 3])
    same(lambda: [_decided.mask(uniform, p, scale)])


@pytest.mark.parametrize("channels", [5, 1300])
def test_scaled(channels):
    x, kept = torch.randn(channels), drawn(4)
    same(lambda: [_decided.scaled(x, kept)])


@pytest.mark.parametrize("act", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(), (5,), (1300,)], ids=str)
def test_limited(shape, act):
    x, grad = 2 * torch.randn(shape), torch.randn(shape)
    limits = torch.tensor([act, -0.5, 0.5])
    same(lambda: [_decided.limited(grad, x, limits)])
    if shape:
        kept, rows = drawn(4), torch.randn(4, *shape)
        eager, ours = both(lambda: _decided.limited(rows, x, limits, kept))
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("act", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("keys", [9, 1100])
def test_either(keys, dtype, act):
    weights = torch.rand(2, 3, 4, keys + 7)[..., :keys]
    weights = (weights * (torch.rand(3, 1, keys) > 0.3)).to(dtype)[:1]
    same(lambda: [_decided.either(weights, torch.tensor([act]))])
