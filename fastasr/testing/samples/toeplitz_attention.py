# SPDX-License-Identifier: Apache-2.0
"""Samples of toeplitz_attention, and its benchmark at the sizes of ESPnet's MEGA decoder: size 512, queries and keys of
128, values of 1024."""

from functools import partial
from typing import Any

import torch

from fastasr.ops import _activation
from fastasr.ops.toeplitz_attention import chunks
from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import Case, case, costs
from fastasr.testing.table import Make, OpTable, Sample


def _call(
    make: Make, length: int, batch: int, d: int, v: int, positions: int | None = None, **more: Any
) -> dict:
    size = chunks(length, more.get("chunk_size", 0))[0]
    return {
        "query_key": make.normal(length, batch, d, scale=1.5),
        "gate": make.normal(length, batch, v),
        "value": make.normal(length, batch, v),
        "qk_weight": make.normal(2, d, scale=0.5),
        "qk_bias": make.normal(2, d, scale=0.3),
        "position_bias": make.normal(2 * (positions or size) - 1, scale=0.5),
    } | more


def _activated(name: str, length: int, batch: int, keys: int, values: int, make: Make) -> dict:
    return _call(make, length, batch, keys, values, activation=name, activate_value=True)


def _slices(
    make: Make, length: int, batch: int, d: int, v: int, before: int = 5, after: int = 6, **more: Any
) -> dict:
    """Makes query_key and gate as slices of one projection, as in a MEGA block."""
    base = make.normal(length, batch, before + d + v + after)
    call = _call(make, length, batch, d, v, **more)
    return call | {
        "query_key": base[..., before : before + d],
        "gate": base[..., before + d : before + d + v],
    }


def _padding(*lengths: int) -> torch.Tensor:
    """Makes padding behind each length and one padded key in the middle of the first sequence."""
    mask = torch.arange(max(lengths))[None] >= torch.tensor(lengths)[:, None]
    mask[0, lengths[0] // 2] = True
    return mask


def _dropout(make: Make, length: int, batch: int, d: int, v: int, chunk_size: int = 0, **more: Any) -> dict:
    size, count = chunks(length, chunk_size)
    keep = make.uniform(batch, count, size, size) > 0.2
    return _call(make, length, batch, d, v, chunk_size=chunk_size, weights_dropout=keep, **more)


def _infinite(make: Make) -> dict:
    call = _call(make, 5, 2, 8, 12)
    call["query_key"][0, 0, 3] = -float("inf")
    return call


def _random(make: Make, shape: Shape) -> dict:
    length, batch, size = shape.size() % 70, shape.size() % 5, 1 + shape.size() % 40
    chunk = shape.choice((0, 0, 1, 7, 32, 40))
    return _call(
        make,
        length,
        batch,
        size,
        shape.size() % 50,
        positions=max(1, length) + shape.choice((0, 3)),
        chunk_size=chunk,
        causal=shape.choice((True, False)),
        activation=shape.choice(_activation.NAMES),
        activate_value=shape.choice((True, False)),
    )


TABLE = OpTable(
    op="toeplitz_attention",
    samples=(
        Sample("an infinite frame", _infinite, exact=False),
        Sample("causal", lambda m: _call(m, 13, 3, 16, 20), thorough=True),
        Sample(
            "slices, value before the activation",
            lambda m: _slices(m, 9, 2, 16, 20, activate_value=True),
            thorough=True,
        ),
        Sample("dropout", lambda m: _dropout(m, 6, 2, 16, 24), thorough=True),
        Sample(
            "chunks of which the last is short",
            lambda m: _call(m, 10, 2, 8, 12, chunk_size=4, padding_mask=_padding(10, 7)),
            thorough=True,
        ),
        Sample("both ways", lambda m: _call(m, 65, 2, 64, 96, causal=False), large=True),
        Sample("padding", lambda m: _call(m, 70, 3, 64, 97, padding_mask=_padding(70, 40, 1)), large=True),
        Sample(
            "several tiles, padding, dropout",
            lambda m: _dropout(m, 35, 2, 20, 18, padding_mask=_padding(35, 20)),
            draws=8,
        ),
        Sample("several tiles both ways", lambda m: _call(m, 35, 1, 20, 18, causal=False), draws=8),
        Sample(
            "several tiles, chunks, a long bias",
            lambda m: _call(
                m, 44, 1, 16, 20, chunk_size=20, positions=30, padding_mask=_padding(44), causal=False
            ),
            draws=8,
        ),
        *(
            Sample(f"{name}, few frames", partial(_activated, name, 17, 1, 20, 18), draws=8)
            for name in _activation.NAMES
        ),
        Sample(
            "padding both ways",
            lambda m: _call(m, 70, 3, 64, 97, padding_mask=_padding(70, 40, 1), causal=False),
            large=True,
        ),
        Sample(
            "nothing but padding",
            lambda m: _call(m, 12, 2, 8, 12, padding_mask=torch.tensor([[True] * 12, [False] * 12])),
        ),
        Sample("chunks", lambda m: _call(m, 192, 2, 64, 96, chunk_size=64), large=True),
        Sample("a long bias", lambda m: _call(m, 40, 2, 16, 32, positions=64)),
        Sample("dropout in chunks", lambda m: _dropout(m, 256, 3, 128, 160, 64, causal=False), large=True),
        *(
            Sample(name, partial(_activated, name, 100, 2, 128, 129), large=True)
            for name in _activation.NAMES
        ),
        Sample("block", lambda m: _slices(m, 100, 2, 128, 256), large=True),
        Sample("long", lambda m: _call(m, 300, 1, 64, 64), large=True),
        Sample("one frame", lambda m: _call(m, 1, 3, 8, 12)),
        Sample("no frames", lambda m: _call(m, 0, 3, 8, 12, padding_mask=torch.ones(3, 0).bool())),
        Sample("no sequences", lambda m: _call(m, 5, 0, 8, 12)),
        Sample("no values", lambda m: _call(m, 5, 2, 8, 0)),
        Sample(
            "a query without a key",
            lambda m: _call(m, 4, 1, 8, 12, padding_mask=torch.tensor([[True, True, False, False]])),
            exact=False,
        ),
    ),
    unread=("value",),
    random=_random,
)


# --- the benchmark


def sized(L: int = 200, B: int = 4, D: int = 128, V: int = 1024) -> Case:
    between = 512  # the projection's other columns, between query_key and gate

    def arguments(make: Make) -> dict:
        return _slices(make, L, B, D, V, between, between, activate_value=True)

    frames, pairs = L * B, B * L * (L + 1) // 2  # causal
    passes = costs(
        (frames * (D + 3 * V), 2 * pairs * (D + V)),
        # scores again; weights' gradient and the values'; the queries' and the keys'
        (frames * (2 * D + 6 * V), 2 * pairs * (3 * D + 2 * V)),
    )
    return case("toeplitz_attention", f"{L}x{B}, {D}, {V}", arguments, passes, shape=f"{L}x{B}x{V}")


CASES = ON_DEVICE = (sized(), sized(1024))
WATCH = "unaligned loads in the bias's gradient; float64 sums for float32; 150 channels"
