# SPDX-License-Identifier: Apache-2.0
"""Samples of zipformer_attention_weights, and its benchmark at the sizes of Zipformer-M's stacks 0, 1 and 3 (16 s of
speech, 4 utterances), and at 60 s of one utterance."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import BATCH, FRAMES, Case, Implementation, case, costs, simple, upstream_member
from fastasr.testing.table import Invalid, Make, OpTable, Sample, sampler


def _call(
    make: Make,
    frames: int,
    batch: int,
    heads: int = 2,
    dim: int = 8,
    pos_dim: int = 4,
    *,
    left: int = 0,
    pos_batch: int = 1,
    position: bool = True,
    scale: float = 0.7,
    starts: tuple[int, ...] | None = None,
    longest: int | None = None,
    **rest: Any,
) -> dict:
    """``longest``: the length of the recordings for which there are positions."""
    offsets = 2 * (longest or frames) - 1 + left if frames else 0
    if starts is not None:
        rest["starts"] = torch.tensor(starts, dtype=torch.int64)
    arguments = {
        "x": make.normal(frames, batch, heads * (2 * dim + pos_dim), scale=scale),
        "pos": make.normal(pos_batch, offsets, heads * pos_dim) if position else None,
        "num_heads": heads,
        "query_head_dim": dim,
    }
    if left:
        arguments["cached_key"] = make.normal(left, batch, heads * dim, scale=scale)
    return arguments | rest


def _random_mask(make: Make, *shape: int) -> torch.Tensor:
    return make.uniform(*shape).float() > 0.6


def _below_the_masked(
    make: Make, others: slice, left_context_chunks: int, starts: tuple[int, ...] | None = None
) -> dict:
    """Makes scores around -1020, so that hidden keys get most of the weight; multiples of 1/4 make products exact."""
    q, k = (make.normal(40, 1, 1).mul(2).round().div(4) + 32 for _ in range(2))
    q[others] = 8.0  # only some blocks of queries need more than their window
    return {
        "x": torch.cat([q, -k], -1),
        "pos": None,
        "num_heads": 1,
        "query_head_dim": 1,
        "chunk_size": 8,
        "left_context_chunks": left_context_chunks,
    } | ({} if starts is None else {"starts": torch.tensor(starts, dtype=torch.int64)})


def _random(make: Make, shape: Shape) -> dict:
    size = shape.size
    frames, batch, heads = min(size(), 40), min(size(), 4), min(max(size(), 1), 4)
    left = shape.choice((0, 0, 3, 17)) if frames else 0
    starts, longest = None, None
    if frames and not left and shape.choice((True, False)):
        starts = tuple(shape.choice(range(-2, frames + 3)) for _ in range(shape.choice(range(1, 6))))
        longest = shape.choice(range(1, frames + 1))
    arguments = _call(
        make, frames, batch, heads, min(max(size(), 1), 40), min(size(), 6), starts=starts, longest=longest,
        left=left, pos_batch=shape.choice((1, batch)), position=shape.choice((True, True, False)), scale=0.5,
    )  # fmt: skip
    if shape.choice((True, False)):
        arguments["chunk_size"] = max(size(), 1)
        arguments["left_context_chunks"] = shape.choice((-1, 0, 1, 3))
    if shape.choice((True, False)):
        arguments["key_padding_mask"] = _random_mask(make, batch, left + frames)
    if shape.choice((True, False)):
        arguments["attn_mask"] = _random_mask(make, frames, left + frames)
    return arguments


def _keys_with_mean(make: Make, mean: float, *sizes: int, **rest: Any) -> dict:
    """Adds ``mean`` to the keys."""
    call = _call(make, *sizes, **rest)
    heads, dim = call["num_heads"], call["query_head_dim"]
    x = call["x"].clone()
    x[..., heads * dim : 2 * heads * dim] += mean
    return call | {"x": x}


_sample = sampler(_call)
TABLE = OpTable(
    op="zipformer_attention_weights",
    samples=(
        _sample("tbc", (7, 3), scale=0.3, thorough=True),
        _sample(
            "padded",
            (17, 3, 2, 3, 1),
            scale=0.3,
            key_padding_mask=lambda m: m.padding(17, [17, 8, 0]),
            thorough=True,
        ),
        _sample(
            "streaming",
            (8, 2, 2, 4, 2),
            left=11,
            scale=0.3,
            key_padding_mask=lambda m: m.padding(19, [19, 12]).flip(1),
            thorough=True,
        ),
        _sample(
            "masked, positions of each sequence",
            (16, 2, 2, 2, 1),
            pos_batch=2,
            scale=0.3,
            attn_mask=lambda m: _random_mask(m, 16, 16),
            thorough=True,
        ),
        _sample("chunks", (50, 2), chunk_size=8, left_context_chunks=2),
        _sample("chunks, all before", (37, 2), chunk_size=16),
        _sample(
            "chunks, padding and a mask of each sequence",
            (45, 3),
            chunk_size=7,
            left_context_chunks=1,
            key_padding_mask=lambda m: m.padding(45, [45, 20, 3]),
            attn_mask=lambda m: _random_mask(m, 3, 45, 45),
        ),
        _sample("chunks and a cache", (24, 2), left=19, chunk_size=8, left_context_chunks=1),
        _sample("no positions", (33, 2), position=False),
        _sample("no position channels", (12, 2), pos_dim=0, position=False),
        _sample("odd sizes", (35, 1, 3, 5, 3)),
        _sample("wide heads", (21, 2, 1, 48, 8), scale=0.4),
        _sample("stack 3", (100, 2, 8, 32, 4), scale=0.5, large=True),
        _sample(
            "stack 0, padded",
            (199, 3, 4, 32, 4),
            key_padding_mask=lambda m: m.padding(199, [199, 150, 33]),
            large=True,
        ),
        # from 256 frames on, the CPU adds gradients of keys and positions over parts of the queries
        _sample("queries in two parts", (300, 1, 1, 8, 4), large=True),
        _sample("several blocks of keys", (70, 1, 1, 32, 4), scale=0.5),
        _sample("penalty", (40, 2, 2, 16), score_penalty=0.01, score_limit=2.5),
        _sample(
            "penalty under masks",
            (40, 2),
            score_penalty=0.02,
            score_limit=1.5,
            chunk_size=8,
            key_padding_mask=lambda m: m.padding(40, [40, 17]),
        ),
        _sample("large scores", (30, 2), scale=3.0),
        # libraries add short chains where a product is small
        Sample(
            "few keys with a mean, wide heads", lambda m: _keys_with_mean(m, 10.0, 7, 1, 2, 64, scale=0.3)
        ),
        Sample("scores below the masked ones", lambda m: _below_the_masked(m, slice(20, None), -1)),
        Sample(
            "scores below the masked ones, keys hidden before alone",
            lambda m: _below_the_masked(m, slice(20), 1),
        ),
        _sample("recordings in a row", (19, 2, 2, 4, 2), scale=0.3, starts=(16, 2, 5, 5, 12), thorough=True),
        _sample(
            "recordings, positions of the longest",
            (23, 2, 2, 4, 3),
            pos_batch=2,
            scale=0.3,
            starts=(0, 9, 13, 20),
            longest=9,
            thorough=True,
        ),
        _sample("recordings longer than their positions", (40, 1), starts=(0, 32, 36), longest=6),
        _sample("recordings without positions", (45, 1), position=False, starts=(3, 20, 41)),
        _sample("starts outside of the frames", (9, 2, 2, 4), starts=(-3, 4, 2**40)),
        _sample("no recording", (5, 1, 1, 4), starts=(3,)),
        _sample(
            "recordings of several tiles, padding",
            (163, 1, 1, 16),
            starts=(5, 70, 71, 150, 158),
            longest=79,
            key_padding_mask=lambda m: _random_mask(m, 1, 163),
        ),
        _sample(
            "recordings, chunks and masks",
            (75, 2),
            starts=(3, 40, 70),
            longest=40,
            chunk_size=7,
            left_context_chunks=1,
            key_padding_mask=lambda m: _random_mask(m, 2, 75),
            attn_mask=lambda m: _random_mask(m, 2, 75, 75),
        ),
        _sample("recordings, chunks", (90, 2), starts=(0, 33, 80), chunk_size=8),
        _sample(
            "recordings, penalty under masks",
            (50, 2),
            starts=(4, 31, 47),
            longest=27,
            score_penalty=0.02,
            score_limit=1.5,
            chunk_size=8,
            key_padding_mask=lambda m: _random_mask(m, 2, 50),
        ),
        Sample(
            "recordings, scores below the masked ones",
            lambda m: _below_the_masked(m, slice(20), 1, (2, 12, 38)),
        ),
        _sample("no frames of recordings", (0, 2), starts=(0, 0)),
        _sample("one frame", (1, 2)),
        _sample("no frames", (0, 2)),
        _sample("no sequences", (5, 0)),
    ),
    invalid=(
        Invalid(
            "recordings behind a cache",
            lambda m: _call(m, 5, 2, left=3, starts=(0, 5)),
            ValueError,
            "cached_key",
        ),
        Invalid(
            "an even number of positions",
            lambda m: _call(m, 5, 2, starts=(0, 5)) | {"pos": m.normal(1, 6, 8)},
            ValueError,
            "pos",
        ),
        Invalid("more positions", lambda m: _call(m, 5, 2, starts=(0, 5), longest=6), ValueError, "pos"),
        Invalid("fewer positions without starts", lambda m: _call(m, 5, 2, longest=4), ValueError, "pos"),
        Invalid("no starts", lambda m: _call(m, 5, 2, starts=()), ValueError, "starts"),
    ),
    penalties=("score_penalty",),
    random=_random,
)


# --- the benchmark

QUERY_DIM, POS_DIM = 32, 4


def _upstream(
    x: Tensor, pos: Tensor, num_heads: int, query_head_dim: int, key_padding_mask: Tensor, **_: object
) -> Implementation:
    """Returns upstream's module without its projections: the rest is what the op computes."""
    cls = upstream_member("zipformer.modules.zipformer.RelPositionMultiheadAttentionWeights")
    dims = {"query_head_dim": query_head_dim, "pos_head_dim": POS_DIM}
    attention = cls(8, pos_dim=8, num_heads=num_heads, **dims).eval()
    attention.in_proj = attention.linear_pos = torch.nn.Identity()
    return simple(lambda x, pos: attention(x, pos, key_padding_mask), x, pos)


def ragged(make: Make, frames: int, batch: int, heads: int, query: int = QUERY_DIM) -> dict:
    """Makes sequences that are padded up to 30 %."""
    padding = make.padding(frames, torch.linspace(frames, frames * 0.7, batch).long().tolist())
    return _call(make, frames, batch, heads, query, POS_DIM, scale=0.5, key_padding_mask=padding)


def measured(
    op: str,
    arguments: Callable,
    forward: tuple[int, int],
    backward: tuple[int, int],
    *sizes: int,
    **options: Any,
) -> Case:
    """Returns the case of an attention of these numbers of frames, sequences and heads, from its costs."""
    frames, batch, heads = sizes
    name = f"{frames}x{batch}, {heads} heads"
    passes = costs(forward, backward)
    return case(op, name, lambda m: arguments(m, *sizes), passes, **options)


def sized(T: int = 796, B: int = 4, num_heads: int = 4, query_head_dim: int = QUERY_DIM) -> Case:
    scores, values = num_heads * B * T * T, T * B * num_heads * (2 * query_head_dim + POS_DIM)
    product = 2 * scores * (query_head_dim + POS_DIM)
    forward = scores + values, product  # W; x
    backward = 2 * scores + 2 * values, 2 * product  # W, dW; x, dx
    others = {"upstream": _upstream}
    name, arguments = "zipformer_attention_weights", partial(ragged, query=query_head_dim)
    return measured(name, arguments, forward, backward, T, B, num_heads, others=others)


CASES = (sized(), sized(398), sized(100, 4, 8), sized(2998, 1))
ON_DEVICE = (sized(FRAMES, BATCH), sized(188, BATCH, 8))
WATCH = "packed 64-bit loads of R; keys outside the chunk window; 16×512 in one piece; recordings in a row"
