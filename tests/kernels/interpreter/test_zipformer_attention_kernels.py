# SPDX-License-Identifier: Apache-2.0
"""The kernels of zipformer_attention in the interpreter with small tiles and pieces, so that every loop runs several
times: blocks of channels and of columns, the way out of the chunk window, pieces of dS."""

import pytest
import torch

from fastasr.kernels import _rel_position_tiles as rel_position_tiles
from fastasr.kernels import zipformer_attention as kernels
from fastasr.ops import zipformer_attention
from fastasr.testing.tolerance import compare

NAMES = ("y", "dx", "dpos", "dvalue", "dcached_key")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    def tiles(dim, pos_dim, value_dim, dtype, hiding=False):
        common = {"BLOCK_M": 16, "num_warps": 4, "num_stages": 2}
        inner = common | {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_V": 16}
        positions = {"BLOCK_P": 16}
        return {
            "forward": inner,
            "queries": inner | positions,
            "keys": inner,
            "positions": common | positions | {"BLOCK_O": 16},
        }

    monkeypatch.setattr(kernels, "tiles", tiles)
    monkeypatch.setattr(kernels, "PIECE_BYTES", 1)  # a block of queries at a time
    monkeypatch.setattr(rel_position_tiles, "head_block", lambda dim, dtype: 16)


CASES = {
    "tiles": ((40, 1, 1, 8, 4, 5), 1, {}),
    "blocks of channels": ((20, 1, 1, 20, 3, 24), 1, {}),
    "masks and a cache, two of three heads": (
        (20, 2, 3, 8, 4, 3),
        2,
        {"left": 13, "rows": True, "chunk": (8, 1)},
    ),
    "chunks": ((50, 1, 1, 8, 4, 4), 1, {"left": 9, "chunk": (8, 1)}),
    "positions of each sequence": (
        (18, 2, 1, 8, 5, 4),
        1,
        {"shared": False, "rows": True, "chunk": (16, -1)},
    ),
}


def _case(name, dtype, seed=0):
    (frames, batch, heads, dim, pos_dim, value_dim), value_heads, options = CASES[name]
    torch.manual_seed(seed)
    left = options.get("left", 0)
    keys = left + frames
    x = 0.5 * torch.randn(frames, batch, heads * (2 * dim + pos_dim))
    pos = torch.randn(1 if options.get("shared", True) else batch, keys + frames - 1, heads * pos_dim)
    value = torch.randn(keys, batch, value_heads * value_dim)
    cached = 0.5 * torch.randn(left, batch, heads * dim) if left else None
    padding = mask = None
    if options.get("rows"):
        padding = torch.arange(keys) >= torch.randint(keys // 2, keys + 1, (batch, 1))
        mask = torch.rand(batch, frames, keys) > 0.7
    tensors = [None if t is None else t.to(dtype) for t in (x, pos, value, cached)]
    numbers = heads, dim, value_heads, *options.get("chunk", (-1, -1))
    return torch.randn(frames, batch, value_heads * value_dim).to(dtype), tensors, (padding, mask), numbers


def _run(grad, tensors, masks, numbers):
    call = *tensors, *masks, *numbers
    y = kernels.zipformer_attention_forward(*call)
    return y, *kernels.zipformer_attention_backward(grad, *call)


def _expected(grad, tensors, masks, numbers, dtype):
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    heads, dim, value_heads, chunk, left_chunks = numbers
    y = zipformer_attention.definition(
        *leaves[:3], heads, dim, value_heads=value_heads, cached_key=leaves[3], key_padding_mask=masks[0],
        attn_mask=masks[1], chunk_size=chunk, left_context_chunks=left_chunks,
    )  # fmt: skip
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(dtype))


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


def test_keys_outside_the_window_weigh_where_nothing_inside_does():
    """Scores are around -1020, in quarters, so that products are exact."""
    torch.manual_seed(0)
    q, k = (torch.randn(40, 1, 1).mul(2).round().div(4) + 32 for _ in range(2))
    q[20:] = 8.0  # only some blocks of queries need more than their window
    tensors = [torch.cat([q, -k], -1), None, torch.randn(40, 1, 4), None]
    call = torch.randn(40, 1, 4), tensors, (None, None), (1, 1, 1, 8, 0)
    truth = _expected(*call, torch.float64)
    found = [t for t in _run(*call) if t.numel()]
    for a, e, t in zip(found, _expected(*call, torch.float32), truth, strict=True):
        assert (a - t).abs().max() <= 1.1 * (e - t).abs().max() + 1e-6 * t.abs().max()


def test_pieces_change_rounding_alone(monkeypatch):
    draw = _case("chunks", torch.float32)
    pieces = _run(*draw)
    monkeypatch.setattr(kernels, "PIECE_BYTES", 1 << 26)
    for name, a, b in zip(NAMES, _run(*draw), pieces, strict=True):
        if name == "dpos":
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("case", CASES)
def test_no_address_is_stored_twice_and_results_repeat(case, writes):
    draw = _case(case, torch.bfloat16)
    first = _run(*draw)
    assert writes.clashes == 0
    assert writes.count >= first[0].numel() + first[1].numel() * draw[3][2] // draw[3][0]
    for a, b in zip(_run(*draw), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", list(CASES)[1:3])
def test_no_read_past_the_end(case, guarded):
    grad, tensors, masks, numbers = _case(case, torch.bfloat16)
    expected = _run(grad, tensors, masks, numbers)
    tensors, masks = ([None if t is None else guarded(t) for t in ts] for ts in (tensors, masks))
    for a, b in zip(_run(guarded(grad), tensors, masks, numbers), expected, strict=True):
        assert torch.equal(a, b)
