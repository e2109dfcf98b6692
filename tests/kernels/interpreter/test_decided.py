# SPDX-License-Identifier: Apache-2.0
"""The small steps of a recorded pass: kernels beside their formulas."""

from types import SimpleNamespace

import pytest
import torch

from fastasr import backend
from fastasr.models.zipformer.self_attention import weighted
from fastasr.models.zipformer.shared_weights import FirstHead, SharedWeights
from fastasr.ops import _decided, nonlin_attention, zipformer_attention_weights
from fastasr.ops._decided import Drawn
from fastasr.ops.bypass import dropped, dropped_gradients
from fastasr.ops.zipformer_attention_weights import gradients

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


@pytest.mark.parametrize("frames", [5, 70])
@pytest.mark.parametrize("of_x", [F32, BF16], ids=str)
def test_frames_of_a_row(frames, of_x):
    """A table has the sequence of each frame of a row."""
    kept = drawn(4)._replace(of=torch.randint(4, (frames,)).sort().values)
    x, other = torch.randn(frames, 1, 130).to(of_x), torch.randn(frames, 1, 130)
    same(lambda: _decided.plus(other, x, kept, of_x))
    same(lambda: _decided.gradients([other], kept, F32, of_x))


@pytest.mark.parametrize("of_x", [F32, BF16], ids=str)
def test_a_bypass_of_a_row(of_x):
    """Recordings that skip the module have the stream, and so has its gradient."""
    kept = drawn(4)._replace(of=torch.randint(4, (70,)).sort().values)
    x, other, grad = torch.randn(70, 1, 130).to(of_x), *torch.randn(2, 70, 1, 130)
    given = other, x, torch.rand(130), kept
    skips = ~(kept.numbers > kept.rate)[kept.of, 0]
    found = []
    for name in ("eager", "triton"):
        with backend(name):
            found.append((dropped(*given), *dropped_gradients(grad, *given)))
        y, *grads = found[-1]
        assert torch.equal(y[skips], other[skips])
        assert torch.equal(grads[0][skips], grad[skips])
        assert not grads[1][skips].any()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


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


@pytest.mark.parametrize("act", [0.0, 1.0])
@pytest.mark.parametrize("masks", ["none", "padding", "chunks"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradient_of_attention_weights_with_a_penalty_that_the_device_decides(dtype, masks, act):
    """It is that of the op with or without the penalty, bit for bit."""
    heads, dim, frames, batch = 2, 8, 40, 2
    x = torch.randn(frames, batch, heads * (2 * dim + 4)).to(dtype).requires_grad_()
    pos = torch.randn(1, 2 * frames - 1, heads * 4).to(dtype).requires_grad_()
    grad = torch.randn(heads, batch, frames, frames).to(dtype)
    given = {
        "none": {},
        "padding": {"key_padding_mask": torch.arange(frames).expand(batch, -1) >= 30},
        "chunks": {"chunk_size": 8, "left_context_chunks": 1},
    }[masks]
    penalty, limit = 0.5, 1.0
    with backend("triton"):
        weights = zipformer_attention_weights(
            x, pos, heads, dim, **given, score_penalty=act * penalty, score_limit=limit
        )
        expected = torch.autograd.grad(weights, (x, pos), grad)
    numbers = torch.tensor([0.0, act])[1:]
    for name in ("triton", "eager"):
        with backend(name):
            sizes = heads, dim, given, penalty, limit, numbers
            found = gradients(grad, weights.detach(), x.detach(), pos.detach(), *sizes)
        for a, b in zip(found, expected, strict=True):
            if name == "triton":
                assert torch.equal(a, b)
            elif dtype is F32:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 4}, {"attn_mask": torch.ones(21, 21).triu() > 0}], ids=str
)
def test_rows_of_attention_weights_end_with_zeros(options):
    with backend("triton"):
        weights = zipformer_attention_weights(
            torch.randn(21, 2, 2 * 20), torch.randn(1, 41, 8), 2, 8, **options
        )
    assert weights.stride() == (2 * 21 * 32, 21 * 32, 32, 1)
    assert not weights.as_strided((2, 2, 21, 11), weights.stride(), 21).any()


@pytest.mark.parametrize("constant", [None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_shared_weights(padded, dtype, constant):
    """Three consumers of the same weights give the gradients of three separate ones."""
    heads, batch, frames = 3, 2, 12
    rows = torch.rand(heads, batch, frames, 16).to(dtype)
    rows[..., frames:] = 0.0 if padded else float("nan")
    weights = rows[..., :frames].requires_grad_()
    values = [torch.randn(frames, batch, heads * 4).to(dtype).requires_grad_() for _ in range(2)]
    projected = torch.randn(frames, batch, 3 * 10).to(dtype).requires_grad_()
    inputs = [weights, projected, *values]
    numbers = None if constant is None else SimpleNamespace(values=torch.tensor([constant]))

    def separate(weights, projected, *values):
        first = weights[:1]
        if constant:
            first = (first > 0).to(first.dtype)
            first = first * (1 / first.sum(-1, keepdim=True))
        return nonlin_attention(first[0], projected), *(weighted(weights, v) for v in values)

    with backend("triton"):
        shared = SharedWeights(weights, padded)
        found = FirstHead(shared, numbers).gated(projected), *map(shared.weighted, values)
    expected = separate(*inputs)
    exact = separate(*(t.double() for t in inputs))
    cotangents = [torch.randn(y.shape).to(dtype) for y in found]

    with backend("triton"):
        ours = torch.autograd.grad(found, inputs, cotangents)
    theirs = torch.autograd.grad(expected, inputs, cotangents)
    truth = torch.autograd.grad(exact, inputs, [c.double() for c in cotangents])
    for a, b, c in zip((*found, *ours), (*expected, *theirs), (*exact, *truth), strict=True):
        error, allowed = ((t.double() - c.double()).norm() for t in (a, b))
        assert error <= 1.1 * allowed + 1e-6 * c.double().norm()
