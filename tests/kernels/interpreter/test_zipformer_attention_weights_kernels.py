# SPDX-License-Identifier: Apache-2.0
"""The kernels of zipformer_attention_weights in the interpreter with small tiles, so that every loop runs several
times: two sweeps of keys, blocks of channels, the way out of the chunk window."""

import pytest
import torch

from fastasr.kernels import _rel_position_tiles as rel_position_tiles
from fastasr.kernels import zipformer_attention_weights as kernels
from fastasr.ops import zipformer_attention_weights
from fastasr.testing.tolerance import compare

NAMES = ("weights", "dx", "dpos", "dcached_key")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    def tiles(keys, dim, pos_dim, dtype, hiding=False, penalty=False):
        common = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
        columns, positions = {"BLOCK_D": 16}, {"BLOCK_P": 16}
        offsets = {k: v for k, v in common.items() if k != "BLOCK_N"}
        return {
            "forward": common | columns | {"WHOLE": False},
            "queries": common | columns | positions,
            "keys": common | columns,
            "positions": offsets | positions | {"BLOCK_O": 16},
        }

    monkeypatch.setattr(kernels, "tiles", tiles)
    monkeypatch.setattr(rel_position_tiles, "head_block", lambda dim, dtype: 16)


def _inputs(frames, batch, heads, dim, pos_dim, dtype, *, left=0, shared=True, seed=0, scale=0.5):
    torch.manual_seed(seed)
    x = (scale * torch.randn(frames, batch, heads * (2 * dim + pos_dim))).to(dtype)
    pos = torch.randn(1 if shared else batch, 2 * frames - 1 + left, heads * pos_dim).to(dtype)
    cached = (scale * torch.randn(left, batch, heads * dim)).to(dtype) if left else None
    return [x, pos, cached], (heads, dim)


def _masks(frames, batch, left, rows=False):
    keys = left + frames
    padding = torch.arange(keys) >= torch.randint(keys // 2, keys + 1, (batch, 1))
    return padding, (torch.rand(batch, frames, keys) > 0.7) if rows else None


def _run(tensors, numbers, masks, window, penalty, grad):
    call = *tensors, *masks, *numbers, *window
    weights = kernels.zipformer_attention_weights_forward(*call)
    return weights, *kernels.zipformer_attention_weights_backward(grad, weights, *call, *penalty)


def _expected(tensors, numbers, masks, window, penalty, grad, dtype):
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    weights = zipformer_attention_weights.definition(
        *leaves[:2], *numbers, cached_key=leaves[2], key_padding_mask=masks[0], attn_mask=masks[1],
        chunk_size=window[0], left_context_chunks=window[1], score_penalty=penalty[0], score_limit=penalty[1],
    )  # fmt: skip
    found = torch.autograd.grad(weights, [t for t in leaves if t is not None], grad.to(dtype))
    return weights.detach(), *found


CASES = {
    "tiles": ((40, 1, 1, 8, 4), {}, False, (-1, -1), (0.0, 25.0)),
    "blocks of channels": ((20, 1, 1, 40, 3), {}, False, (-1, -1), (0.0, 25.0)),
    "masks, a cache and the penalty": ((20, 2, 1, 8, 4), {"left": 13}, True, (8, 1), (0.01, 1.0)),
    "chunks": ((50, 1, 1, 8, 4), {"left": 9}, False, (8, 1), (0.0, 25.0)),
    "positions of each sequence": ((18, 2, 1, 8, 5), {"shared": False}, True, (16, -1), (0.0, 25.0)),
}


def _case(name, dtype, seed=0):
    shape, options, rows, window, penalty = CASES[name]
    tensors, numbers = _inputs(*shape, dtype, **options, seed=seed)
    left = options.get("left", 0)
    masks = _masks(shape[0], shape[1], left, rows) if rows else (None, None)
    grad = torch.randn(numbers[0], shape[1], shape[0], left + shape[0]).to(dtype)
    return tensors, numbers, masks, window, penalty, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_is_not_above_that_of_eager(case, dtype):
    draws = [_case(case, dtype, seed) for seed in range(2 if dtype == torch.float32 else 1)]
    found = [[t for t in _run(*draw) if t.numel()] for draw in draws]
    eager = [_expected(*draw, dtype) for draw in draws]
    truth = [_expected(*draw, torch.float64) for draw in draws]
    for number, name in enumerate(NAMES[: len(found[0])]):
        a, e, t = (torch.cat([run[number].flatten() for run in runs]) for runs in (found, eager, truth))
        assert a.dtype == dtype
        comparison = compare(a, e, t)
        assert comparison.ok, f"{name}: {comparison}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_outside_the_window_weigh_where_nothing_inside_does(dtype):
    """Scores are around -1020, in quarters, so that products are exact."""
    torch.manual_seed(0)
    q, k = (torch.randn(50, 1, 1).mul(2).round().div(4) + 32 for _ in range(2))
    q[20:] = 8.0  # only some blocks of queries need more than their window
    tensors = [torch.cat([q, -k], -1).to(dtype), None, None]
    rest = (1, 1), (None, None), (8, 0), (0.0, 25.0), torch.randn(1, 1, 50, 50).to(dtype)
    weights, dx, *_ = _run(tensors, *rest)
    expected, truth = _expected(tensors, *rest, dtype), _expected(tensors, *rest, torch.float64)
    assert weights[0, 0, 0, 8:].gt(0).all()
    assert weights[0, 0, 40, :40].eq(0).all()
    for a, e, t in zip((weights, dx), expected, truth, strict=True):
        assert (a - t).abs().max() <= 1.1 * (e - t).abs().max() + torch.finfo(dtype).eps * t.abs().max()


def test_padding_of_the_rows_is_not_read():
    """A user may pass weights without padding, or with anything in it."""
    tensors, numbers, masks, window, penalty, grad = _case("chunks", torch.float32)
    weights = _expected(tensors, numbers, masks, window, penalty, grad, torch.float32)[0]
    call = *tensors, *masks, *numbers, *window, *penalty
    padded = torch.full((*weights.shape[:-1], 80), float("nan"))
    padded[..., : weights.shape[-1]] = weights
    one = kernels.zipformer_attention_weights_backward(grad, weights, *call)
    two = kernels.zipformer_attention_weights_backward(grad, padded[..., : weights.shape[-1]], *call)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_repeats_bit_for_bit():
    draw = _case("masks, a cache and the penalty", torch.float32)
    for a, b in zip(_run(*draw), _run(*draw), strict=True):
        assert torch.equal(a, b)


def test_weights_may_be_changed_in_place():
    """They are no view of a padded tensor."""
    tensors, numbers, masks, window, *_ = _case("tiles", torch.float32)
    weights = kernels.zipformer_attention_weights_forward(*tensors, *masks, *numbers, *window)
    assert not weights._is_view()
    assert weights.stride(2) % kernels.ROW == 0


@pytest.mark.parametrize("case", CASES)
def test_no_address_is_stored_twice(case, writes):
    draw = _case(case, torch.bfloat16)
    _run(*draw)
    assert writes.clashes == 0
    assert writes.count >= 2 * draw[-1].numel() + draw[0][0].numel()


@pytest.mark.parametrize("case", CASES)
def test_no_read_past_the_end(case, guarded):
    tensors, numbers, masks, window, penalty, grad = _case(case, torch.bfloat16)
    expected = _run(tensors, numbers, masks, window, penalty, grad)
    tensors, masks = ([None if t is None else guarded(t) for t in ts] for ts in (tensors, masks))
    call = *tensors, *masks, *numbers, *window
    weights = guarded(expected[0].contiguous())
    found = kernels.zipformer_attention_weights_backward(guarded(grad), weights, *call, *penalty)
    assert torch.equal(kernels.zipformer_attention_weights_forward(*call), expected[0])
    for a, b in zip(found, expected[1:], strict=True):
        assert torch.equal(a, b)
