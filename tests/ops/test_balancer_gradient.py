# SPDX-License-Identifier: Apache-2.0
"""balancer_gradient returns a gradient that belongs to no function: it has tests of its own beside the contract."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastasr
from fastasr.ops import balancer_gradient
from fastasr.ops.balancer_gradient import balance_
from fastasr.testing import seeded

definition = balancer_gradient.definition

LIMITS = {
    "mean": (-0.1, 0.1, 0.0, 9.0, 0.04),
    "size": (-9.0, 9.0, 2.0, 3.0, 0.04),
    "both": (0.3, 0.4, 0.2, 0.5, 0.1),
    "nothing": (-9.0, 9.0, 0.0, 99.0, 0.04),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _exact(grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim):
    """Computes the formula in extended precision, so that float64 is judged too."""
    g, wide = (np.asarray(t.double().numpy(), np.longdouble) for t in (grad, x))
    axes = tuple(i for i in range(x.dim()) if i != channel_dim % x.dim())
    floor, count = np.longdouble(1e-20), x.numel() // x.shape[channel_dim]
    mean = wide.mean(axes, keepdims=True)
    centred = ((wide - mean) ** 2).mean(axes, keepdims=True)
    square = centred + mean**2
    variance, power = np.maximum(centred, floor), np.maximum(square, floor)
    relative, size = mean / np.sqrt(variance), np.sqrt(power)
    e = np.sign(relative - np.clip(relative, min_mean, max_mean))
    f = np.sign(size - np.clip(size, min_rms, max_rms)) * (square >= floor)
    p = e / np.sqrt(variance) + f * mean / power
    q = f / power - e * (centred >= floor) * relative / variance
    rms = np.sqrt(p**2 + q**2 * centred) / count
    scale = grad_scale / np.maximum(rms, floor) / count
    return torch.from_numpy((g + np.abs(g) * scale * (p + q * (wide - mean))).astype(np.float64))


def _case(shape, dtype=torch.float32, channel_dim=-1, seed=0):
    """Returns channels of different means and sizes, one of them constant."""
    generator = torch.Generator().manual_seed(seeded(seed))
    channels = shape[channel_dim]
    broadcast = [1] * len(shape)
    broadcast[channel_dim] = channels
    mean, scale = torch.randn(2, channels, generator=generator, dtype=torch.float64).view(2, *broadcast)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale.abs() + 3 * mean
    x.select(channel_dim, channels - 1).fill_(0.75)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return grad.to(dtype), x.to(dtype)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [
        ((40, 3, 24), -1),
        ((3, 24, 50), 1),
        ((700, 33), 1),
        ((2, 5, 6, 7), 1),
        ((9, 4), 0),
        ((1, 6), -1),
        ((17, 1), -1),
    ],
    ids=str,
)
def test_error_against_fp64(shape, channel_dim, dtype, limits):
    """The error is never above eager's."""
    grad, x = _case(shape, dtype, channel_dim)
    truth = _exact(grad, x, *limits, channel_dim)
    found = balancer_gradient(grad, x, *limits, channel_dim)
    assert found.dtype == dtype
    assert found.shape == grad.shape
    eager = definition(grad, x, *limits, channel_dim)
    unit = torch.finfo(dtype).eps * truth.abs().max()
    assert (found.double() - truth).abs().max() <= 1.1 * (eager.double() - truth).abs().max() + unit
    with fastasr.backend("eager"):
        assert torch.equal(balancer_gradient(grad, x, *limits, channel_dim), eager)


def _masked(grad, x, channel_dim, share=0.4):
    """Returns a mask, operands that are NaN where it hides a frame, and a function that takes the other frames."""
    shape = x.select(channel_dim, 0).shape
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seeded(1))) < share
    hidden = mask.unsqueeze(channel_dim)
    nan = (t.masked_fill(hidden, float("nan")) for t in (grad, x))
    return mask, *nan, lambda t: t.movedim(channel_dim, -1)[~mask]


MASKED = [
    ((40, 1, 24), -1),
    ((1, 24, 50), 1),
    ((2, 5, 6, 7), 1),
    ((70, 33), 1),
    ((9, 40), 0),
    ((60, 2, 1), 2),
]


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), MASKED, ids=str)
def test_padding_is_left_out(shape, channel_dim, dtype, limits):
    """The result is that of the frames alone, and the gradient itself at padding."""
    grad, x = _case(shape, dtype, channel_dim)
    mask, grad, x, taken = _masked(grad, x, channel_dim)
    found = balancer_gradient(grad, x, *limits, channel_dim, padding_mask=mask)
    assert (found.dtype, found.shape) == (dtype, grad.shape)
    assert found.movedim(channel_dim, -1)[mask].isnan().all()
    truth = _exact(taken(grad), taken(x), *limits, -1)
    eager = definition(taken(grad), taken(x), *limits)
    unit = torch.finfo(dtype).eps * truth.abs().max()
    error, allowed = ((y.double() - truth).abs().max() for y in (taken(found), eager))
    assert error <= 1.1 * allowed + unit
    if dtype is torch.float64:
        torch.testing.assert_close(taken(found), eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_padding_in_place_and_with_flags(channel_dim):
    grad, x = _case((6, 8, 10), channel_dim=channel_dim)
    mask, _, x, taken = _masked(grad, x, channel_dim)
    limits = torch.tensor(LIMITS["both"])
    expected = balancer_gradient(grad, x, *LIMITS["both"], channel_dim, padding_mask=mask)
    assert not torch.equal(taken(expected), taken(grad))
    for act, y in ((None, expected), (torch.ones(1), expected), (torch.zeros(()), grad)):
        found = balancer_gradient(grad, x, channel_dim=channel_dim, limits=limits, act=act, padding_mask=mask)
        torch.testing.assert_close(found, y)
        changed = grad.clone()
        balance_(changed, x, channel_dim, limits, act, mask)
        assert torch.equal(changed, found)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_every_frame_is_padding(channel_dim):
    grad, x = _case((6, 8, 10), channel_dim=channel_dim)
    mask, _, x, _ = _masked(grad, x, channel_dim, share=2.0)
    assert torch.equal(balancer_gradient(grad, x, *LIMITS["both"], channel_dim, padding_mask=mask), grad)


@pytest.mark.parametrize("channel_dim", [0, 1, 2])
def test_strides(channel_dim):
    limits = LIMITS["both"]
    grad, x = _case((6, 8, 10), channel_dim=channel_dim)
    expected = balancer_gradient(grad, x, *limits, channel_dim)
    for layout in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1)):
        inverse = [layout.index(i) for i in range(3)]
        strided = [t.permute(layout).contiguous().permute(inverse) for t in (grad, x)]
        torch.testing.assert_close(balancer_gradient(*strided, *limits, channel_dim), expected)
    wide = torch.stack((x, x), -1).flatten(-2)[..., ::2]  # no two elements side by side
    torch.testing.assert_close(balancer_gradient(grad, wide, *limits, channel_dim), expected)
    halves = torch.cat((x, x), -1).chunk(2, -1)[1]  # a row stride
    torch.testing.assert_close(balancer_gradient(grad, halves, *limits, channel_dim), expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.data())
def test_any_shape(shape, data):
    channel_dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    generator = torch.Generator().manual_seed(seeded(0))
    grad, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    limits = LIMITS["size"]
    found = balancer_gradient(grad, x, *limits, channel_dim)
    torch.testing.assert_close(found, definition(grad, x, *limits, channel_dim))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_numbers_in_tensors(dtype, channel_dim):
    grad, x = _case((6, 8, 10), dtype, channel_dim)
    expected = definition(grad, x, *LIMITS["both"], channel_dim)
    limits = torch.tensor(LIMITS["both"])
    acts = None, torch.ones(()), torch.zeros(1), torch.zeros((), dtype=torch.bool)
    for act, y in zip(acts, (expected, expected, grad, grad), strict=True):
        found = balancer_gradient(grad, x, channel_dim=channel_dim, limits=limits, act=act)
        torch.testing.assert_close(found, y)
        found = grad.clone()
        balance_(found, x, channel_dim, limits, act)
        torch.testing.assert_close(found, y)


def test_limits_are_given_once():
    grad, x = _case((12, 8))
    with pytest.raises(ValueError, match=r"limits: expected a tensor \(5,\), or five numbers, got None"):
        balancer_gradient(grad, x, -1.0)
    with pytest.raises(ValueError, match="limits: expected either a tensor or five numbers, got both"):
        balancer_gradient(grad, x, *LIMITS["both"], limits=torch.zeros(5))


def test_threads_change_nothing():
    before = torch.get_num_threads()
    try:
        for shape, dim in (((3000, 64), -1), ((6, 40, 300), 1)):
            grad, x = _case(shape, channel_dim=dim)
            results = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                results.append(balancer_gradient(grad, x, *LIMITS["both"], dim))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)


def test_operands_are_left_alone():
    grad, x = _case((30, 5))
    copies = grad.clone(), x.clone()
    balancer_gradient(grad, x, *LIMITS["both"])
    assert torch.equal(grad, copies[0])
    assert torch.equal(x, copies[1])


def test_non_finite_values_stay_in_their_channel():
    grad, x = _case((30, 6))
    expected = balancer_gradient(grad, x, *LIMITS["both"])
    x[3, 2] = float("nan")
    found = balancer_gradient(grad, x, *LIMITS["both"])
    assert found[:, 2].isnan().all()
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(found[:, keep], expected[:, keep])


def test_registered_op():
    op = torch.ops.fastasr.balancer_gradient.default
    for shape, dim in (((12, 3, 8), 2), ((3, 8, 12), 1)):
        arguments = (*_case(shape, channel_dim=dim), *LIMITS["both"], dim)
        torch.library.opcheck(op, arguments)
        torch.testing.assert_close(op(*arguments), balancer_gradient(*arguments))


def test_compiles_whole():
    grad, x = _case((12, 3, 8))
    compiled = torch.compile(
        lambda g, x: balancer_gradient(g, x, *LIMITS["both"]), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(grad, x), balancer_gradient(grad, x, *LIMITS["both"]))


def test_is_not_differentiable():
    grad, x = _case((12, 8))
    y = torch.ops.fastasr.balancer_gradient(grad.requires_grad_(), x, *LIMITS["both"], 1)
    with pytest.raises(RuntimeError, match="balancer_gradient"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "grad: expected dtype"),
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor"),
        ({"x": torch.zeros(3, 5)}, ValueError, r"x: expected shape \(3, 4\)"),
        ({"x": torch.zeros(3, 4, device="meta")}, ValueError, "x: expected device"),
        ({"padding_mask": torch.zeros(3)}, TypeError, "padding_mask: expected a bool tensor"),
        (
            {"padding_mask": torch.zeros(4, dtype=torch.bool)},
            ValueError,
            r"padding_mask: expected shape \(3,\)",
        ),
        (
            {"padding_mask": torch.zeros(3, dtype=torch.bool, device="meta")},
            ValueError,
            "padding_mask: expected device",
        ),
        ({"channel_dim": 2}, ValueError, "channel_dim: expected a dimension"),
        ({"channel_dim": 1.0}, TypeError, "channel_dim: expected an int"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"grad": torch.zeros(3, 4), "x": torch.zeros(3, 4), "channel_dim": 1, **change}
    grad, x = arguments.pop("grad"), arguments.pop("x")
    with pytest.raises(error, match=message):
        balancer_gradient(grad, x, *LIMITS["both"], **arguments)
