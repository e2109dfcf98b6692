# SPDX-License-Identifier: Apache-2.0
"""whitening_gradient returns a gradient that belongs to no function: it has tests of its own beside the contract."""

import pytest
import torch

import fastasr
from fastasr.ops import whitening_gradient
from fastasr.ops.whitening_gradient import whiten_, whitening_metric
from fastasr.testing import seeded

definition = whitening_gradient.definition
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _case(shape, dtype=torch.float32, order=None):
    generator = torch.Generator().manual_seed(seeded(0))
    x, grad = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    x = x.permute(order) if order else x
    x = 2.0 + x * torch.rand(x.shape[-1], generator=generator, dtype=torch.float64)
    return grad.reshape(x.shape).to(dtype), x.to(dtype)


@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_the_gradient_of_the_metric(groups):
    grad, x = _case((20, 3, 6), torch.float64)
    (slope,) = torch.autograd.grad(whitening_metric(x.requires_grad_(), groups), x)
    expected = grad + 0.1 * grad.norm() / slope.norm() * slope
    found, white = whitening_gradient(grad, x, groups, 1.0, 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not white


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_white_data_keep_their_gradient(dtype):
    grad, x = _case((20, 3, 6), dtype)
    found, white = whitening_gradient(grad, x, 1, 100.0, 0.1)
    assert white
    assert torch.equal(found, grad)
    assert found.data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "order"),
    [((40, 3, 20), None), ((2, 9, 7, 300), (0, 2, 1, 3)), ((61, 20), None), ((2, 300, 10), (2, 0, 1))],
    ids=str,
)
def test_error_against_fp64(shape, order, dtype, groups):
    """Frames lie in any order of memory; channels need not be dense."""
    grad, x = _case(shape, dtype, order)
    groups = groups if x.shape[-1] % groups == 0 else 1
    found, _ = whitening_gradient(grad, x, groups, 1.0, 0.1)
    assert (found.dtype, found.shape) == (dtype, grad.shape)
    exact, eager = (
        definition(*tensors, groups, 1.0, 0.1)[0] for tensors in ((grad.double(), x.double()), (grad, x))
    )
    change = (exact - grad.double()).norm()
    limit = 5e-6 if dtype in (torch.float32, torch.float64) else 0.0
    assert (found.double() - exact).norm() <= max(limit * change, 1.1 * (eager.double() - exact).norm())
    with fastasr.backend("eager"):
        assert torch.equal(whitening_gradient(grad, x, groups, 1.0, 0.1)[0], eager)


def _masked(grad, x, share=0.4):
    """Returns a mask and operands that are NaN where it hides a frame."""
    mask = torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(seeded(1))) < share
    return mask, *(t.masked_fill(mask[..., None], float("nan")) for t in (grad, x))


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "order"),
    [((80, 1, 20), None), ((1, 90, 20), None), ((4, 9, 7, 30), (0, 2, 1, 3)), ((61, 20), None)],
    ids=str,
)
def test_padding_is_left_out(shape, order, dtype, groups):
    """The result is that of the frames alone, and the gradient itself at padding."""
    mask, grad, x = _masked(*_case(shape, dtype, order))
    found, white = whitening_gradient(grad, x, groups, 1.0, 0.1, padding_mask=mask)
    assert (found.dtype, found.shape) == (dtype, grad.shape)
    assert not white
    assert found[mask].isnan().all()
    taken = grad[~mask], x[~mask]
    exact, eager = (
        definition(*tensors, groups, 1.0, 0.1)[0] for tensors in (map(torch.Tensor.double, taken), taken)
    )
    change = (exact - taken[0].double()).norm()
    limit = 5e-6 if dtype is torch.float32 else 1e-12
    error = (found[~mask].double() - exact).norm()
    assert error <= max(limit * change, 1.1 * (eager.double() - exact).norm())


def test_padding_in_place_and_with_flags():
    grad, x = _case((40, 3, 20))
    mask, _, x = _masked(grad, x)
    expected = definition(grad, x, 2, 1.0, 0.1, padding_mask=mask)[0]
    assert not torch.equal(expected[~mask], grad[~mask])
    limits, white = torch.tensor([1.0, 0.1]), torch.tensor([100.0, 0.1])
    for act, numbers, y, is_white in (
        (None, limits, expected, False),
        (torch.ones(1), white, grad, True),
        (torch.zeros(()), white, grad, False),
    ):
        found, verdict = whitening_gradient(grad, x, 2, limits=numbers, act=act, padding_mask=mask)
        assert torch.equal(found, y)
        assert bool(verdict) is is_white
        found, verdict = grad.clone(), torch.zeros((), dtype=torch.bool)
        whiten_(found, x, 2, numbers, act, verdict, mask)
        assert bool(verdict) is is_white
        assert torch.equal(found, y)


@pytest.mark.parametrize("limit", [0.0, 1.5])
def test_every_frame_is_padding(limit):
    """This is as it is where there are no frames."""
    grad, x = _case((20, 3, 8))
    mask, _, x = _masked(grad, x, share=2.0)
    found, white = whitening_gradient(grad, x, 2, limit, 0.1, padding_mask=mask)
    assert torch.equal(found, grad)
    empty = torch.empty(0, 8)
    assert torch.equal(white, whitening_gradient(empty, empty, 2, limit, 0.1)[1])


def test_metric_at_its_limit():
    """The limit decides by the metric of the kernels, which is that of float64."""
    grad, x = _case((300, 24))
    metric = whitening_metric(x.double(), 1).item()
    for factor, expected in ((1 - 1e-5, False), (1 + 1e-5, True)):
        assert bool(whitening_gradient(grad, x, 1, factor * metric, 0.1)[1]) is expected


def test_one_frame():
    """A frame by itself has no covariance, and so its metric is 0."""
    grad, x = torch.randn(2, 1, 1, 8)
    found, white = whitening_gradient(grad, x, 2, 1.5, 0.1)
    assert white
    assert torch.equal(found, grad)


def test_no_frames():
    x = torch.empty(0, 3, 8)
    found, white = whitening_gradient(x, x, 2, 1.5, 0.1)
    assert found.shape == x.shape
    assert white


def test_metric_of_white_data():
    q, _ = torch.linalg.qr(torch.randn(64, 8, dtype=torch.float64) - 0)
    q = q - q.mean(0)
    q, _ = torch.linalg.qr(q)
    assert whitening_metric(3.0 * q, 1).item() == pytest.approx(1.0, abs=1e-3)
    assert whitening_metric(q * torch.linspace(1, 4, 8, dtype=torch.float64), 1).item() > 1.3


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_numbers_in_tensors(dtype):
    grad, x = _case((40, 3, 20), dtype)
    expected = definition(grad, x, 2, 1.0, 0.1)[0]
    limits, white = torch.tensor([1.0, 0.1]), torch.tensor([100.0, 0.1])
    for act, numbers, y, is_white in (
        (None, limits, expected, False),
        (torch.ones(()), limits, expected, False),
        (torch.ones(1), white, grad, True),
        (torch.zeros(1), limits, grad, False),
        (torch.zeros(1, dtype=torch.bool), white, grad, False),
    ):
        found, verdict = whitening_gradient(grad, x, 2, limits=numbers, act=act)
        torch.testing.assert_close(found, y)
        assert bool(verdict) is is_white
        found, verdict = grad.clone(), torch.zeros((), dtype=torch.bool)
        whiten_(found, x, 2, numbers, act, verdict)
        assert bool(verdict) is is_white
        torch.testing.assert_close(found, y)


def test_operands_are_left_alone():
    grad, x = _case((30, 6))
    copies = grad.clone(), x.clone()
    whitening_gradient(grad, x, 1, 1.0, 0.1)
    assert torch.equal(grad, copies[0])
    assert torch.equal(x, copies[1])


def test_autocast_changes_nothing():
    grad, x = _case((40, 20), torch.float64)
    expected = whitening_gradient(grad, x, 1, 1.0, 0.1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whitening_gradient(grad, x, 1, 1.0, 0.1)[0], expected)


@pytest.mark.parametrize("limit", [1.0, 100.0])
def test_registered_op(limit):
    op = torch.ops.fastasr.whitening_gradient.default
    for dtype in (torch.float32, torch.float64):
        arguments = (*_case((12, 3, 8), dtype), 2, limit, 0.1)
        torch.library.opcheck(op, arguments)
        torch.testing.assert_close(op(*arguments), whitening_gradient(*arguments))


def test_compiles_whole():
    grad, x = _case((12, 3, 8))
    compiled = torch.compile(
        lambda g, x: whitening_gradient(g, x, 2, 1.0, 0.1), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(grad, x), whitening_gradient(grad, x, 2, 1.0, 0.1))


def test_is_not_differentiable():
    grad, x = _case((12, 8))
    y, _ = torch.ops.fastasr.whitening_gradient(grad.requires_grad_(), x, 1, 1.0, 0.1)
    with pytest.raises(RuntimeError, match="whitening_gradient"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "grad: expected dtype"),
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor"),
        ({"x": torch.zeros(3, 6)}, ValueError, r"x: expected shape \(3, 4\)"),
        ({"x": torch.zeros(3, 4, device="meta")}, ValueError, "x: expected device"),
        ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of x's 4 channels, got 3"),
        ({"num_groups": 0}, ValueError, "num_groups: expected at least 1"),
        ({"limit": None}, ValueError, r"limits: expected a tensor \(2,\), or two numbers"),
        ({"limits": torch.zeros(2)}, ValueError, "limits: expected either a tensor or two numbers"),
        ({"limits": torch.zeros(3), "limit": None}, ValueError, r"limits: expected shape \(2,\)"),
        ({"act": torch.zeros(3)}, ValueError, "act: expected shape"),
        ({"padding_mask": torch.zeros(3)}, TypeError, "padding_mask: expected a bool tensor"),
        (
            {"padding_mask": torch.zeros(4, dtype=torch.bool)},
            ValueError,
            r"padding_mask: expected shape \(3,\)",
        ),
    ],
)
def test_refuses(change, error, message):
    arguments = {"grad": torch.zeros(3, 4), "x": torch.zeros(3, 4), "num_groups": 2, "limit": 1.0, **change}
    with pytest.raises(error, match=message):
        whitening_gradient(**arguments, grad_scale=0.1)
