# SPDX-License-Identifier: Apache-2.0
"""The gradients of balancers and whitening, which the contract leaves out, beside float64 and eager."""

import pytest
import torch
from every_two import every_two

from fastasr import backend, ops
from fastasr.ops.balancer_gradient import balance_
from fastasr.ops.whitening_gradient import whiten_
from fastasr.testing import seeded

DTYPES = torch.float32, torch.bfloat16, torch.float16
LIMITS = (-0.05, 0.05, 0.2, 0.5, 0.04)
WHITENING = (1.0, 0.1)  # all but frames without covariance exceed this limit
each_dtype = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
BLOCKS = {"large blocks": False, "small blocks": True}


def each_call(*calls):
    """Parametrises over tuples of layout, shape and option, dtypes, and blocks."""
    cases = {
        f"{layout.__name__.strip('_<>')}, {shape}, {option}": (layout, shape, option)
        for layout, shape, option in calls
    }
    return pytest.mark.parametrize(("call", "dtype", "small"), every_two(cases, DTYPES[:2], BLOCKS))


@pytest.fixture(autouse=True)
def _blocks(request):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("small"):
        request.getfixturevalue("small_blocks")


def _dense(m, *shape):
    return m(*shape)


def _slices(m, *shape):
    """Rows that lie apart, as those of a third of a projection do."""
    return m(*shape[:-1], 3 * shape[-1]).chunk(3, -1)[1]


LAYOUTS = {"dense": _dense, "slices": _slices}


def _maps(m, *shape):
    """Channels last in memory and second in shape."""
    return m(*shape).contiguous(memory_format=torch.channels_last)


def _randn(dtype, generator):
    return lambda *shape: (1.0 + 2.0 * torch.randn(shape, generator=generator)).to(dtype)


def _tensors(layout, shape, dtype, mix=False):
    generator = torch.Generator().manual_seed(seeded(0))
    make = _randn(dtype, generator)
    x = layout(make, *shape)
    if mix:
        x = x * torch.rand(x.shape[-1], generator=generator).add(0.1).to(dtype)
    return torch.randn(x.shape, generator=generator).to(dtype), x


def _judge(found, grad, eager, exact):
    """No result is further from float64 than eager's, but for single roundings."""
    assert (found.dtype, found.shape) == (grad.dtype, grad.shape)
    change = (exact - grad.double()).norm()
    ours, theirs = ((y.double() - exact).norm() for y in (found, eager))
    assert ours <= 1.1 * theirs + 1e-7 * change


@each_call(
    (_dense, (70, 3, 24), -1),
    (_dense, (3, 24, 50), 1),
    (_dense, (2, 5, 6, 7), 1),
    (_dense, (700, 33), 1),
    (_dense, (9, 4), 0),
    (_dense, (1, 6), -1),
    (_dense, (17, 1), -1),
    (_slices, (50, 2, 40), -1),
    (_maps, (2, 8, 9, 11), 1),
)
def test_balancer(call, dtype, small):
    layout, shape, dim = call
    grad, x = _tensors(layout, shape, dtype)
    with backend("triton"):
        found = ops.balancer_gradient(grad, x, *LIMITS, dim)
        again = ops.balancer_gradient(grad, x, channel_dim=dim, limits=torch.tensor(LIMITS))
    definition = ops.balancer_gradient.definition
    exact = definition(grad.double(), x.double(), *LIMITS, dim)
    _judge(found, grad, definition(grad, x, *LIMITS, dim), exact)
    assert torch.equal(found, again)


# A random half, a frame behind those that a kernel looks at first, and no frame.
VISIBLE = {
    "half": lambda n: torch.rand(n) < 0.5,
    "few": lambda n: torch.arange(n) % 35 == 33,
    "none": lambda n: torch.zeros(n) > 0,
}


def _masked(grad, x, dim, visible):
    """Returns a padding mask, and operands that are NaN where it hides a frame."""
    shape = x.select(dim, 0).shape
    mask = ~VISIBLE[visible](shape.numel()).view(shape)
    return mask, *(t.masked_fill(mask.unsqueeze(dim), float("nan")) for t in (grad, x))


def _frames(t, dim, mask):
    return t.movedim(dim, -1)[mask]


def _judge_frames(found, grad, eager, exact, dim, mask):
    """Hidden frames keep their gradients, NaN here, and the others pass ``_judge``."""
    assert _frames(found, dim, mask).isnan().all()
    _judge(*(_frames(t, dim, ~mask) for t in (found, grad, eager, exact)))


@each_call(
    *((_dense, (70, 1, 24), (-1, v)) for v in VISIBLE),
    *((_dense, (1, 24, 70), (1, v)) for v in VISIBLE),
    *((layout, (2, 8, 9, 11), (1, "half")) for layout in (_dense, _maps)),
    (_dense, (700, 33), (1, "few")),
    (_dense, (40, 20), (0, "half")),
    (_slices, (50, 2, 40), (-1, "half")),
)
def test_balancer_of_padding(call, dtype, small):
    layout, shape, (dim, visible) = call
    grad, x = _tensors(layout, shape, dtype)
    mask, grad, x = _masked(grad, x, dim, visible)
    with backend("triton"):
        found = ops.balancer_gradient(grad, x, *LIMITS, dim, padding_mask=mask)
        again = grad.clone()
        balance_(again, x, dim, torch.tensor(LIMITS), None, mask)
    definition = ops.balancer_gradient.definition
    exact, eager = (
        definition(*t, *LIMITS, dim, padding_mask=mask) for t in ((grad.double(), x.double()), (grad, x))
    )
    _judge_frames(found, grad, eager, exact, dim, mask)
    torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("dim", [1, 2])
def test_balancer_of_distant_channels_and_padding(dim, visible, small_blocks):
    grad, x = torch.randn(2, 1, 70, 70)
    mask, grad, x = _masked(grad, 1000.0 + 0.1 * x, dim, visible)
    limits = (0.6, 0.7, 0.0, 9.0, 0.1)
    with backend("triton"):
        found = ops.balancer_gradient(grad, x, *limits, dim, padding_mask=mask)
    definition = ops.balancer_gradient.definition
    exact, eager = (
        definition(*t, *limits, dim, padding_mask=mask) for t in ((grad.double(), x.double()), (grad, x))
    )
    _judge_frames(found, grad, eager, exact, dim, mask)


@pytest.mark.parametrize("limits", [(-9.0, 9.0, 2.5, 3.0, 0.04), (0.6, 0.7, 0.0, 9.0, 0.1), LIMITS])
def test_balancer_of_constant_and_distant_channels(limits):
    grad, x = torch.randn(2, 300, 6)
    x[:, 0], x[:, 1], x[:, 2] = 0.75, 0.0, 1000.0 + 0.1 * x[:, 2]
    with backend("triton"):
        found = ops.balancer_gradient(grad, x, *limits)
    definition = ops.balancer_gradient.definition
    exact = definition(grad.double(), x.double(), *limits)
    unit = torch.finfo(torch.float32).eps * exact.abs().max()
    eager = definition(grad, x, *limits)
    assert (found - exact).abs().max() <= 1.1 * (eager - exact).abs().max() + unit


def test_balancer_keeps_nan_in_its_channel():
    grad, x = torch.randn(2, 30, 6)
    with backend("triton"):
        expected = ops.balancer_gradient(grad, x, *LIMITS)
        x[3, 2], x[5, 4] = float("nan"), float("inf")
        found = ops.balancer_gradient(grad, x, *LIMITS)
    assert found[:, [2, 4]].isnan().all()
    assert torch.equal(found[:, [0, 1, 3, 5]], expected[:, [0, 1, 3, 5]])


@each_call(
    (_dense, (70, 3, 24), 1),
    (_dense, (40, 3, 24), 3),
    (_dense, (300, 64), 8),
    (_dense, (31, 18), 1),
    (_dense, (40, 1), 1),
    (_slices, (50, 2, 40), 1),
    (lambda *a: _maps(*a).transpose(1, 3), (2, 8, 9, 11), 1),
)
def test_whitening(call, dtype, small):
    layout, shape, groups = call
    grad, x = _tensors(layout, shape, dtype, mix=True)
    limit = 1.0 if x.shape[-1] > groups else 0.5
    with backend("triton"):
        found, white = ops.whitening_gradient(grad, x, groups, limit, 0.1)
        again, _ = ops.whitening_gradient(grad, x, groups, limits=torch.tensor((limit, 0.1)))
    definition = ops.whitening_gradient.definition
    exact, exact_white = definition(grad.double(), x.double(), groups, limit, 0.1)
    assert bool(white) is bool(exact_white) is False
    assert torch.equal(found, again)
    if x.shape[-1] > groups:  # else the change has no direction
        _judge(found, grad, definition(grad, x, groups, limit, 0.1)[0], exact)


@each_call(
    *((_dense, (70, 1, 24), (groups, v)) for groups in (1, 3) for v in VISIBLE),
    (_dense, (700, 33), (1, "few")),
    (_slices, (50, 2, 40), (1, "half")),
    (lambda *a: _maps(*a).transpose(1, 3), (2, 8, 9, 11), (1, "half")),
)
def test_whitening_of_padding(call, dtype, small):
    layout, shape, (groups, visible) = call
    grad, x = _tensors(layout, shape, dtype, mix=True)
    mask, grad, x = _masked(grad, x, -1, visible)
    with backend("triton"):
        found, white = ops.whitening_gradient(grad, x, groups, *WHITENING, padding_mask=mask)
        again, verdict = grad.clone(), torch.zeros((), dtype=torch.bool)
        whiten_(again, x, groups, torch.tensor(WHITENING), None, verdict, mask)
    assert bool(white) is bool(verdict) is (visible == "none")
    torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)
    definition = ops.whitening_gradient.definition
    exact, eager = (
        definition(*t, groups, *WHITENING, padding_mask=mask)[0]
        for t in ((grad.double(), x.double()), (grad, x))
    )
    if (~mask).sum() > 2:  # else the change has no direction
        _judge_frames(found, grad, eager, exact, -1, mask)
    assert _frames(found, -1, ~mask).isfinite().all()


def test_whitening_of_distant_channels_and_padding(small_blocks):
    """The visible frames are not those that float32 is shifted by at first."""
    grad, x = _tensors(_dense, (300, 24), torch.float32, mix=True)
    mask, grad, x = _masked(grad, x + 100.0, -1, "few")
    with backend("triton"):
        found, _ = ops.whitening_gradient(grad, x, 1, *WHITENING, padding_mask=mask)
    definition = ops.whitening_gradient.definition
    exact, eager = (
        definition(*t, 1, *WHITENING, padding_mask=mask)[0] for t in ((grad.double(), x.double()), (grad, x))
    )
    _judge_frames(found, grad, eager, exact, -1, mask)


@pytest.mark.parametrize(("channels", "dtype"), [(140, torch.float32), (200, torch.bfloat16)], ids=str)
def test_whitening_of_several_tiles(channels, dtype):
    """More than 192 channels of 16-bit numbers have wider tiles of products than of the other kernels."""
    test_whitening((_dense, (300, channels), 1), dtype, False)


def test_whitening_metric_at_its_limit():
    grad, x = torch.randn(2, 300, 24)
    x += 3.0
    metric = ops.whitening_gradient.op.definition.__globals__["whitening_metric"](x.double(), 1).item()
    with backend("triton"):
        for factor, expected in ((1 - 1e-5, False), (1 + 1e-5, True)):
            assert bool(ops.whitening_gradient(grad, x, 1, factor * metric, 0.1)[1]) is expected


@pytest.mark.parametrize("x", [torch.zeros(1, 8).add(2.5), torch.full((50, 8), 0.1), torch.zeros(50, 8)])
@each_dtype
def test_whitening_without_covariance(x, dtype):
    grad, x = torch.randn(x.shape).to(dtype), x.to(dtype)
    with backend("triton"):
        found, white = ops.whitening_gradient(grad, x, 2, 1.5, 0.1)
    assert found.isfinite().all()
    if dtype is torch.float32 or len(x) == 1 or not x.any():  # products of 16-bit numbers differ in rounding
        assert white
        assert torch.equal(found, grad)


def test_whitening_of_nan():
    grad, x = torch.randn(2, 40, 8)
    x[3, 2] = float("nan")
    with backend("triton"):
        found, white = ops.whitening_gradient(grad, x, 1, 1.5, 0.1)
    assert found.isnan().all()
    assert not white


ACTS = None, torch.ones(()), torch.zeros(1), torch.zeros((), dtype=torch.bool)


@pytest.mark.parametrize(("act", "dtype", "layout"), every_two(ACTS, DTYPES[:2], LAYOUTS))
def test_in_place_and_flags(layout, act, dtype):
    acts = act is None or bool(act)
    grad, x = _tensors(layout, (40, 2, 20), dtype, mix=True)
    limits, numbers = torch.tensor(LIMITS), torch.tensor(WHITENING)
    with backend("triton"):
        expected = ops.balancer_gradient(grad, x, *LIMITS) if acts else grad
        assert torch.equal(ops.balancer_gradient(grad, x, limits=limits, act=act), expected)
        for order in (_dense, _slices):
            found = order(lambda *shape: torch.zeros(shape, dtype=dtype), *grad.shape).copy_(grad)
            balance_(found, x, -1, limits, act)
            assert torch.equal(found, expected)
        for limit in (1.0, 100.0):
            numbers[0] = limit
            expected, white = (
                ops.whitening_gradient(grad, x, 1, limit, 0.1) if acts else (grad, torch.tensor(False))
            )
            found, verdict = ops.whitening_gradient(grad, x, 1, limits=numbers, act=act)
            assert torch.equal(found, expected)
            assert bool(verdict) == bool(white) == (acts and limit > 1.0)
            for order in (_dense, _slices):
                found = order(lambda *shape: torch.zeros(shape, dtype=dtype), *grad.shape).copy_(grad)
                verdict = torch.ones((), dtype=torch.bool)
                whiten_(found, x, 1, numbers, act, verdict)
                assert bool(verdict) == bool(white)
                assert torch.equal(found, expected)


def test_whitening_repeats_bit_for_bit(small_blocks):
    grad, x = _tensors(_dense, (200, 40), torch.float32, mix=True)
    with backend("triton"):
        one, other = (ops.whitening_gradient(grad, x, 2, *WHITENING)[0] for _ in range(2))
    assert torch.equal(one, other)
