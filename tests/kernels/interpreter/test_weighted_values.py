# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of values: the kernels beside torch's products, and both in float64."""

import pytest
import torch

from fastasr import backend, ops
from fastasr.models.zipformer.self_attention import weighted
from fastasr.ops import _weighted_values

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights_of(heads, batch, targets, sources, dtype, row):
    """Returns weights whose rows lie ``row`` numbers apart, with NaN between them."""
    rows = torch.full((heads, batch, targets, row), float("nan"))
    rows[..., :sources] = torch.softmax(2.0 * torch.randn(heads, batch, targets, sources), -1)
    return rows.to(dtype)[..., :sources]


def off(found, exact):
    return (found.double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiple", [1, 16])  # of which rows begin at one
@pytest.mark.parametrize(
    ("sizes", "dim"),
    [((3, 2, 70, 70), 12), ((1, 1, 5, 133), 20), ((2, 3, 1, 1), 1), ((2, 1, 64, 128), 32)],
    ids=str,
)
def test_kernels_are_as_exact_as_torch(sizes, dim, multiple, dtype):
    heads, batch, targets, sources = sizes
    row = -(-(sources + 6) // multiple) * multiple
    weights = weights_of(*sizes, dtype, row).requires_grad_()
    values = torch.randn(sources, batch, heads * dim).to(dtype).requires_grad_()
    grad = torch.randn(targets, batch, heads * dim).to(dtype)

    def step(weights, values):
        y = weighted(weights, values)
        return y.detach(), *torch.autograd.grad(y, (weights, values), grad.to(y.dtype))

    exact = step(*(t.detach().double().requires_grad_() for t in (weights, values)))
    with backend("eager"):
        eager = step(weights, values)
    with backend("triton"):
        assert _weighted_values.launchers(weights, values) is not None
        ours = step(weights, values)
    for name, a, b, c in zip(("y", "dweights", "dvalues"), ours, eager, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert off(a, c) <= 1.1 * off(b, c) + 1e-7 * c.abs().max().item(), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("frames", [40, 43])
def test_gradients_of_consumers_are_added_in_place(frames, dtype):
    sizes = heads, batch, _, _ = 3, 2, frames, frames
    weights = weights_of(*sizes, dtype, 48)
    values, grad = (torch.randn(frames, batch, heads * 12).to(dtype) for _ in range(2))
    before = torch.randn(sizes).to(dtype)
    rows = torch.full((2, *sizes[:3], 48), float("nan")).to(dtype)
    total, alone = rows[..., :frames]
    total.copy_(before)
    with backend("triton"):
        _, first = _weighted_values.products(weights, values).backward(grad, weights, values, alone, False)
        _, again = _weighted_values.products(weights, values).backward(grad, weights, values, total, True)
    assert torch.equal(first, again)
    assert rows[..., frames:].isnan().all()  # no kernel writes between rows
    g, v = (t.unflatten(2, (heads, -1)).permute(2, 1, 0, 3).double() for t in (grad, values))
    # a result is rounded once: bfloat16 has 8 bits
    tolerance = {"rtol": {torch.float32: 0, torch.bfloat16: 2**-8}[dtype], "atol": 1e-5}
    torch.testing.assert_close(alone.double(), g @ v.mT, **tolerance)
    torch.testing.assert_close(total.double(), before.double() + g @ v.mT, **tolerance)


def test_repeated_weights_and_other_dtypes_run_in_torch():
    weights, values = torch.rand(2, 3, 5, 5), torch.randn(5, 3, 8)
    with backend("triton"):
        assert _weighted_values.launchers(weights, values) is not None
        assert _weighted_values.launchers(weights[:1].expand(2, -1, -1, -1), values) is None
        assert _weighted_values.launchers(weights, values.bfloat16()) is None
        assert _weighted_values.launchers(weights.mT, values) is None
        assert _weighted_values.launchers(weights, torch.randn(5, 3, 2 * 33)) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert _weighted_values.launchers(weights, values) is None


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("lies", ["with NaN between rows", "as one row", "cut behind the last row"])
def test_gradients_of_weights_are_read_where_they_lie(lies, dtype):
    frames, batch, heads = 67, 2, 3
    x = (2.0 * torch.randn(frames, batch, heads * 20)).to(dtype)
    pos = torch.randn(1, 2 * frames - 1, heads * 4).to(dtype)
    if lies == "as one row":
        grad = torch.randn(frames).to(dtype).expand(heads, batch, frames, frames)
    else:
        grad = torch.randn(heads, batch, frames, frames).to(dtype)
        padded = torch.full((heads, batch, frames, 80), float("nan"), dtype=dtype)
        padded[..., :frames] = grad
        if lies == "cut behind the last row":
            padded = padded.flatten()[: frames - 80].clone()
        grad = padded.as_strided(grad.shape, (batch * frames * 80, frames * 80, 80, 1))

    def step(x, pos, grad):
        leaves = x.clone().requires_grad_(), pos.clone().requires_grad_()
        weights = ops.zipformer_attention_weights(*leaves, num_heads=heads, query_head_dim=8)
        return torch.autograd.grad(weights, leaves, grad)

    with backend("eager"):
        exact = step(x.double(), pos.double(), grad.double())
        eager = step(x, pos, grad)
    with backend("triton"):
        ours = step(x, pos, grad)
    for a, b, c in zip(ours, eager, exact, strict=True):
        assert off(a, c) <= 1.1 * off(b, c) + 1e-7 * c.abs().max().item()
