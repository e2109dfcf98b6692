# SPDX-License-Identifier: Apache-2.0
"""Kernels of the gated depthwise convolution in the interpreter against float64."""

import pytest
import torch

from fastasr.kernels import gated_depthwise_conv as kernels
from fastasr.ops import gated_depthwise_conv
from fastasr.testing.tolerance import compare

# (frames, batch, channels, taps, chunk or None for the plain form, cache, right)
CASES = [
    (1, 3, 40, 1, None, False, True),
    (37, 2, 5, 7, None, False, True),
    (5, 2, 70, 31, None, False, False),
    (33, 2, 20, 5, -1, False, True),
    (40, 2, 66, 5, 4, False, True),
    (19, 3, 6, 15, 8, True, False),
    (3, 2, 17, 7, 2, True, True),
]
NAMES = ("h", "weight", "bias", "causal_weight", "causal_bias", "chunk_scale", "cache")


def _inputs(frames, batch, channels, taps, chunk, cache, right, dtype):
    torch.manual_seed(0)

    def make(*shape):
        return torch.randn(shape).to(dtype)

    h, weight, bias = make(frames, batch, 2 * channels), 0.4 * make(channels, 1, taps), make(channels)
    mask = torch.arange(frames) >= torch.tensor([frames - 2 * b for b in range(batch)]).clamp(min=0)[:, None]
    more = [None] * 4
    if chunk is not None:
        more = [0.4 * make(channels, 1, taps // 2 + 1), make(channels), 0.3 * make(2, channels, taps), None]
    if cache:
        more[3] = make(batch, channels, taps // 2)
    return (h, weight, bias, *more[:3], mask, more[3]), -1 if chunk is None else chunk, right


def _run(tensors, chunk, right, grad):
    y, new_cache = kernels.gated_depthwise_conv_forward(*tensors, chunk, right, tensors[3] is not None)
    return y, new_cache, kernels.gated_depthwise_conv_backward(grad.to(y.dtype), *tensors, chunk, right)


def _eager(tensors, chunk, right, grad):
    leaves = [t if t is None or t.dtype is torch.bool else t.clone().requires_grad_() for t in tensors]
    *parameters, mask, cache = leaves
    y, new_cache = (
        gated_depthwise_conv.definition(
            *parameters,
            padding_mask=mask,
            cache=cache,
            chunk_size=chunk,
            activation="swoosh_r" if right else "identity",
            return_cache=True,
        )
        if tensors[3] is not None
        else (
            gated_depthwise_conv.definition(
                *parameters, padding_mask=mask, activation="swoosh_r" if right else "identity"
            ),
            None,
        )
    )
    wanted = [t for t in (*parameters, cache) if t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype)))
    return y.detach(), new_cache, [None if t is None else next(found) for t in (*parameters, cache)]


def _wide(tensors):
    return tuple(t if t is None or t.dtype is torch.bool else t.double() for t in tensors)


def _grad(case):
    torch.manual_seed(1)
    return torch.randn(case[0], case[1], case[2])


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_not_above_that_of_eager(case, dtype):
    tensors, chunk, right = _inputs(*case, dtype)
    grad = _grad(case).to(dtype)
    y, new_cache, gradients = _run(tensors, chunk, right, grad)
    eager_y, eager_cache, eager_gradients = _eager(tensors, chunk, right, grad)
    true_y, true_cache, true_gradients = _eager(_wide(tensors), chunk, right, grad.double())
    pairs = [("y", y, eager_y, true_y)]
    if tensors[3] is not None and case[3] > 1:
        pairs.append(("new cache", new_cache, eager_cache, true_cache))
    pairs += zip(NAMES, gradients, eager_gradients, true_gradients, strict=True)
    for name, a, e, t in pairs:
        if e is None:
            assert not a.numel(), name
            continue
        assert a.dtype == dtype, name
        assert a.shape == e.shape, name
        if not a.numel():
            continue
        comparison = compare(a, e, t)
        # With a handful of elements one more rounding is chance. The interpreter adds up one by one.
        assert comparison.ok or comparison.worst < 4 * comparison.eps, f"{name}: {comparison}"


def test_output_in_the_scales_type():
    """With h in bfloat16 and its parameters in float32, as under autocast, y is float32 and each gradient has its
    tensor's type.
    """
    case = (40, 2, 20, 5, 4, False, True)
    tensors, chunk, right = _inputs(*case, torch.float32)
    tensors = (tensors[0].bfloat16(), *tensors[1:])
    grad = _grad(case)
    y, _, gradients = _run(tensors, chunk, right, grad)
    true_y, _, true_gradients = _eager(_wide(tensors), chunk, right, grad.double())
    assert y.dtype == torch.float32
    assert (y.double() - true_y).abs().max() < 1e-5
    for a, t, like in zip(gradients[:6], true_gradients[:6], tensors[:6], strict=True):
        assert a.dtype == like.dtype
        assert (a.double() - t).abs().max() / t.abs().max() < (4e-3 if like.dtype == torch.bfloat16 else 1e-5)


def test_infinities_stay_within_reach():
    tensors, chunk, right = _inputs(40, 2, 20, 5, 4, False, True, torch.float32)
    for value in (float("inf"), float("nan")):
        tensors[0][9, 0, 3] = value
        y, _, _ = _run(tensors, chunk, right, torch.ones(40, 2, 20))
        true_y, _, _ = _eager(_wide(tensors), chunk, right, torch.ones(40, 2, 20))
        assert torch.equal(y.isfinite(), true_y.isfinite())


@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 0, 4), (3, 2, 0)])
def test_empty(shape):
    tensors, chunk, right = _inputs(*shape, 3, 2, True, True, torch.float32)
    y, cache, gradients = _run(tensors, chunk, right, torch.ones(shape))
    assert y.shape == shape
    assert cache.shape == tensors[7].shape
    assert not any(g.count_nonzero() for g in gradients)


def test_repeats_bit_for_bit():
    tensors, chunk, right = _inputs(40, 2, 66, 5, 4, False, True, torch.float32)
    grad = _grad((40, 2, 66))
    first, second = (_run(tensors, chunk, right, grad) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_address_is_stored_twice(case, writes):
    tensors, chunk, right = _inputs(*case, torch.float32)
    _run(tensors, chunk, right, _grad(case))
    assert writes.clashes == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_read_past_the_end(case, guarded):
    tensors, chunk, right = _inputs(*case, torch.float32)
    at_the_end = tuple(t if t is None else guarded(t) for t in tensors)
    expected = _run(tensors, chunk, right, _grad(case))
    found = _run(at_the_end, chunk, right, guarded(_grad(case)))
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))
