# SPDX-License-Identifier: Apache-2.0
"""The kernels of rel_attention in the interpreter: tiles twice as high as wide, pieces of dS, blocks of channels."""

import pytest
import torch

from fastasr.kernels import rel_attention as kernels
from fastasr.ops import rel_attention
from fastasr.testing.tolerance import compare

NAMES = ("y", "dq", "dk", "dv", "dpos", "dbias_u", "dbias_v")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Makes tiles so small that every loop runs several times, and each block of queries is a piece of
    its own.
    """

    def tiles(dim, value_dim, dtype, hopper, hiding):
        common = {"BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
        square = common | {"BLOCK": 16}
        wide = square | {"BLOCK_V": 16}
        forward = common | {"BLOCK_M": 16 if hiding else 32, "BLOCK_N": 16, "BLOCK_V": 16}
        products = dict.fromkeys(("offsets", "positions"), square)
        return {"forward": forward} | dict.fromkeys(("statistics", "queries", "keys"), wide) | products

    monkeypatch.setattr(kernels, "tiles", tiles)
    monkeypatch.setattr(kernels, "PIECE_BYTES", 1)


def _inputs(batch, frames, heads, dim, value_dim, dtype, masks=False):
    torch.manual_seed(0)
    shapes = (batch, frames, heads, dim), (2 * frames - 1, heads, dim), (heads, dim), (heads, dim)
    q, pos, u, w = (torch.randn(shape).to(dtype) for shape in shapes)
    k, v = (
        torch.randn(batch, frames, heads, dim).to(dtype),
        torch.randn(batch, frames, heads, value_dim).to(dtype),
    )
    padding = mask = None
    if masks:
        padding = torch.arange(frames) >= torch.randint(frames // 2, frames, (batch, 1))
        mask = torch.rand(batch, frames, frames) < 0.4
        mask[:, frames // 2] = True  # a query that sees nothing
    return torch.randn(batch, frames, heads, value_dim).to(dtype), (q, k, v, pos, u, w), (padding, mask)


def _run(grad, tensors, masks):
    y, lse = kernels.rel_attention_forward(*tensors, *masks)
    return y, *kernels.rel_attention_backward(grad, *tensors, *masks, y, lse)


def _expected(grad, tensors, masks, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    y = rel_attention.definition(*leaves, key_padding_mask=masks[0], attn_mask=masks[1])
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))


CASES = {"high tiles": ((1, 40, 1, 8, 20), False), "blocks of channels, masks": ((2, 21, 1, 20, 24), True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_is_not_above_that_of_eager(case, dtype):
    shape, masks = CASES[case]
    arguments = _inputs(*shape, dtype, masks)
    found, eager, truth = _run(*arguments), _expected(*arguments, dtype), _expected(*arguments, torch.float64)
    for name, a, e, t in zip(NAMES, found, eager, truth, strict=True):
        assert a.dtype == dtype
        comparison = compare(a, e, t)
        assert comparison.ok, f"{name}: {comparison}"


def test_no_address_is_stored_twice_and_results_repeat(writes, monkeypatch):
    """The exception is dR, which is added up over the pieces."""
    arguments = _inputs(2, 21, 1, 8, 20, torch.bfloat16, True)
    first = _run(*arguments)
    for launch in writes.launches:
        addresses = [a for store in launch for a in store.tolist()]
        assert len(addresses) == len(set(addresses))
    assert writes.count > sum(t.numel() for t in first)
    for a, b in zip(_run(*arguments), first, strict=True):
        assert torch.equal(a, b)


def test_no_read_past_the_end(guarded):
    grad, tensors, masks = _inputs(1, 21, 1, 20, 24, torch.bfloat16, True)
    expected = _run(grad, tensors, masks)
    again = guarded(grad), [guarded(t) for t in tensors], [guarded(t) for t in masks]
    for a, b in zip(_run(*again), expected, strict=True):
        assert torch.equal(a, b)
