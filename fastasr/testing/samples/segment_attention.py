# SPDX-License-Identifier: Apache-2.0
"""Samples of segment_attention, and its benchmark at the size of torchaudio's base RNN-T: 400 frames, 8 heads of 64
channels, left context 30."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr.ops._segments import rows_of
from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import Case, case, computed, costs, upstream_member
from fastasr.testing.table import Invalid, Make, OpTable, Sample, changed, sampler

_NAMES = ("frames", "segment_length", "left_context_length", "right_context_length", "max_memory_size")


def _call(make: Make, batch: int, heads: int, width: int, *sizes: int, **more: Any) -> dict:
    """Makes a call. ``sizes``: frames, segment, left, right, memory."""
    frames, segment, _, right, memory = sizes
    queries, keys = rows_of(
        frames, segment, right, memory, more.get("past_frames", 0), more.get("past_memory", 0)
    )
    return {
        "query": make.normal(queries, batch, heads * width, scale=1.5),
        "key": make.normal(keys, batch, heads * width),
        "value": make.normal(keys, batch, heads * width),
        "num_heads": heads,
        **dict(zip(_NAMES, sizes, strict=True)),
    } | more


def _slices(make: Make, *shape: int) -> dict:
    """Makes key and value as halves of one projection, as in an Emformer layer."""
    call = _call(make, *shape)
    both = torch.cat([call["key"], call["value"]], -1)
    return call | dict(zip(("key", "value"), both.chunk(2, -1), strict=True))


def _dropout(make: Make, batch: int, heads: int, width: int, *sizes: int, **more: Any) -> dict:
    call = _call(make, batch, heads, width, *sizes, **more)
    _, segment, left, right, memory = sizes
    keep = make.uniform(batch, heads, call["query"].shape[0], memory + right + left + segment) > 0.2
    return call | {"weights_dropout": keep}


def _lengths(*lengths: int) -> torch.Tensor:
    return torch.tensor(lengths)


def _infinite(make: Make) -> dict:
    call = _call(make, 2, 2, 4, 7, 3, 2, 1, 0)
    call["query"][1, 0, 3] = float("inf")
    return call


def _minus_infinite(make: Make) -> dict:
    call = _call(make, 1, 1, 4, 8, 4, 0, 0, 1, lengths=_lengths(3))
    call["query"][0], call["key"][:, 0] = -float("inf"), call["key"][:, 0].abs()
    return call


_with = partial(changed, lambda m: _call(m, 2, 2, 4, 7, 3, 2, 1, 2))


def _random(make: Make, shape: Shape) -> dict:
    memory, frames = shape.choice((0, 0, 1, 3)), shape.size() % 90
    past = (shape.size() % 9, shape.size() % 4 if memory else 0)
    batch, segment = shape.size() % 4, 1 + shape.size() % 40
    call = _call(
        make, batch, 1 + shape.size() % 3, 1 + shape.size() % 40,
        frames, segment, shape.size() % 35, shape.size() % 6, memory, past_frames=past[0], past_memory=past[1],
    )  # fmt: skip
    if shape.choice((True, False)):
        call["lengths"] = torch.tensor([shape.size() % (frames + 2) for _ in range(batch)], dtype=torch.int64)
    if shape.choice((True, False)):
        call["history"] = torch.tensor([shape.size() % (n + 2) for n in past])
    return call


_sample = sampler(_call)
_small = sampler(_call, draws=8)  # a few hundred numbers, whose errors are compared over several draws


TABLE = OpTable(
    op="segment_attention",
    samples=(
        Sample("an infinite query", _infinite, exact=False),
        _small("left and right context", (2, 2, 8, 11, 4, 5, 2, 0), thorough=True),
        _small("memory", (2, 2, 8, 10, 3, 2, 1, 2), thorough=True),
        _small(
            "ragged with memory", (3, 1, 5, 9, 2, 3, 1, 1), lengths=lambda _: _lengths(9, 4, 1), thorough=True
        ),
        Sample(
            "dropout",
            lambda m: _dropout(m, 2, 2, 4, 7, 3, 2, 1, 2, lengths=_lengths(7, 5)),
            thorough=True,
            draws=8,
        ),
        _small(
            "a step of a stream",
            (2, 2, 8, 4, 4, 6, 2, 3),
            past_frames=6,
            past_memory=3,
            history=lambda _: torch.tensor([5, 2]),
            thorough=True,
        ),
        Sample("halves of a projection", lambda m: _slices(m, 2, 2, 24, 21, 4, 6, 1, 2), draws=8),
        _small("windows that hold nothing", (2, 2, 8, 9, 3, 0, 0, 1), lengths=lambda _: _lengths(9, 2)),
        _small("a segment longer than a tile", (1, 2, 16, 90, 70, 9, 3, 1), large=True),
        _small("a segment of two blocks", (1, 1, 16, 25, 21, 9, 3, 1)),
        _small("segments per block", (1, 2, 16, 30, 4, 18, 1, 4), lengths=lambda _: _lengths(27)),
        Sample("blocks of channels, dropout", lambda m: _dropout(m, 1, 1, 37, 14, 9, 6, 2, 1), draws=8),
        _small("one segment", (2, 2, 16, 5, 8, 4, 2, 3)),
        _small("no right context", (2, 2, 8, 12, 4, 3, 0, 0)),
        _small("no context", (2, 2, 8, 12, 4, 0, 0, 0)),
        Sample("scores of minus infinity", _minus_infinite, exact=False),
        _small("a stream of several segments", (2, 2, 8, 9, 4, 6, 2, 3), past_frames=9, past_memory=2),
        _small("an odd width", (1, 2, 37, 20, 4, 6, 1, 0)),
        _sample("base, segment 16", (2, 8, 64, 120, 16, 30, 4, 0), large=True),
        _sample(
            "base, segment 4", (2, 8, 64, 100, 4, 30, 1, 0), lengths=lambda _: _lengths(100, 71), large=True
        ),
        Sample("base, memory", lambda m: _slices(m, 2, 8, 64, 100, 4, 30, 1, 4), large=True),
        Sample("base, dropout", lambda m: _dropout(m, 2, 8, 64, 80, 16, 30, 4, 2), large=True),
        _sample("no frames", (2, 2, 8, 0, 4, 6, 1, 2)),
        _sample("no sequences", (0, 2, 8, 7, 4, 6, 1, 2)),
    ),
    invalid=(
        Invalid("query without summaries", _with(query=lambda m: m.normal(10, 2, 8)), ValueError, "query"),
        Invalid(
            "past memory without memory", _with(max_memory_size=0, past_memory=2), ValueError, "past_memory"
        ),
    ),
    random=_random,
)


# --- the benchmark

HEADS, WIDTH, LEFT = 8, 64, 30


def upstream(
    segment: int, right: int, frames: int, batch: int, heads: int, width: int, left: int, device: str
) -> Callable:
    """Does what torchaudio's layer does between its projections: dense scores and a mask, built once per forward."""
    emformer = upstream_member("torchaudio.models.emformer.Emformer")
    context = {"left_context_length": left, "right_context_length": right}
    model = emformer(heads * width, heads, 8, 1, segment, **context)
    attention = model.emformer_layers[0].attention
    mask = model._gen_attention_mask(torch.empty(frames, batch, 1, device=device))

    def run(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        rows = query.shape[0]
        q, k, v = (t.contiguous().view(-1, batch * heads, width).transpose(0, 1) for t in (query, key, value))
        scores = torch.bmm(q * attention.scaling, k.transpose(1, 2))
        mixed = torch.bmm(attention._gen_attention_probs(scores, mask, None), v)
        return mixed.transpose(0, 1).contiguous().view(rows, batch, heads * width)

    return run


def sized(
    frames: int = 400,
    B: int = 4,
    num_heads: int = HEADS,
    D: int = WIDTH,
    segment_length: int = 16,
    left_context_length: int = LEFT,
    right_context_length: int = 4,
) -> Case:
    segment, left, right = segment_length, left_context_length, right_context_length
    queries, keys = rows_of(frames, segment, right, 0)
    row, pairs = B * num_heads * D, 0
    for start in range(0, frames, segment):
        end = min(start + segment, frames)
        pairs += B * num_heads * (right + end - start) * (right + end - max(0, start - left))
    passes = costs(
        ((2 * queries + 2 * keys) * row, 4 * D * pairs), ((3 * queries + 4 * keys) * row, 10 * D * pairs)
    )
    name, shape = f"{frames}x{B}, segment {segment}, right {right}", f"{frames}x{B}x{num_heads * D}"
    sizes = B, num_heads, D, frames, segment, left, right, 0
    others = {
        "upstream": lambda **call: computed(
            upstream(segment, right, frames, B, num_heads, D, left, call["query"].device), call
        )
    }
    return case("segment_attention", name, lambda m: _slices(m, *sizes), passes, shape=shape, others=others)


CASES = ON_DEVICE = (sized(), sized(segment_length=4, right_context_length=1))
WATCH = "rows gathered by segment; intervals as masks; more than one block of channels"
