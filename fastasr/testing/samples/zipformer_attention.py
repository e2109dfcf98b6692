# SPDX-License-Identifier: Apache-2.0
"""Samples of zipformer_attention, the samples of zipformer_attention_weights with values, and its benchmark: one
self-attention of Zipformer-M's stack 0 with 16 s of four utterances, and 60 s of one."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastasr.testing.fuzz import Shape
from fastasr.testing.samples import zipformer_attention_weights as weights
from fastasr.testing.speed import BATCH, FRAMES, Case
from fastasr.testing.table import Make, OpTable, Sample, invalid, sampler


def _valued(make: Make, arguments: dict, heads: int | None = None, dim: int = 3) -> dict:
    x, cached = arguments["x"], arguments.get("cached_key")
    keys = x.shape[0] + (0 if cached is None else cached.shape[0])
    if heads is not None:
        arguments["value_heads"] = heads
    count = arguments["num_heads"] if heads is None else heads
    return arguments | {"value": make.normal(keys, x.shape[1], count * dim)}


# A few gradients that sum 3 values each have a largest error by chance; over 60 draws ours is below eager's.
_VALUE_DIM = {"wide heads": 12, "stack 3": 12}


def _sample(sample: Sample) -> Sample:
    dim = _VALUE_DIM.get(sample.name, 3)
    return replace(sample, arguments=lambda m: _valued(m, sample.arguments(m), dim=dim))


def _decision(yes: bool | None) -> Tensor | None:
    return None if yes is None else torch.tensor([yes])


def _random(make: Make, shape: Shape) -> dict:
    arguments = weights._random(make, shape)
    arguments["x"] = arguments["x"] * 0.7  # no weight that is seen rounds to 0 in float16
    if shape.choice((True, False)):
        arguments |= {
            "score_penalty": 0.02,
            "score_limit": shape.choice((0.0, 1.5)),
            "act": _decision(shape.choice((None, False, True))),
        }
    arguments["equal"] = _decision(shape.choice((None, False, True)))
    heads = shape.choice((None, 1, arguments["num_heads"]))
    return _valued(make, arguments, heads, min(max(shape.size(), 1), 40))


def _training(
    make: Make,
    *sizes: int,
    act: bool | None = None,
    equal: bool | None = None,
    value_heads: int | None = None,
    **rest: Any,
) -> dict:
    """Makes a call of training, with the decisions on the penalty and on equal weights."""
    call = weights._call(make, *sizes, scale=0.5, **rest) | {"act": _decision(act), "equal": _decision(equal)}
    return _valued(make, call, value_heads)


_trained = sampler(_training)
_PENALTY = {"score_penalty": 0.02, "score_limit": 1.0}
_ROW = {"starts": (4, 31, 31, 47), "longest": 27}
_TRAINED = (
    _trained("equal weights", (20, 2, 3, 5, 2), equal=True, value_heads=1, thorough=True),
    _trained("weights that are not equal", (17, 2, 2, 4, 2), equal=False),
    _trained("no penalty", (17, 2, 2, 4, 2), act=False, **_PENALTY),
    _trained(
        "equal weights and a penalty under masks",
        (45, 3),
        act=True,
        equal=True,
        chunk_size=7,
        left_context_chunks=1,
        key_padding_mask=lambda m: m.padding(45, [45, 20, 3]),
        attn_mask=lambda m: weights._random_mask(m, 3, 45, 45),
        **_PENALTY,
    ),
    _trained(
        "a penalty behind a cache",
        (24, 2),
        act=True,
        equal=False,
        left=19,
        chunk_size=8,
        left_context_chunks=1,
        **_PENALTY,
    ),
    _trained("recordings, equal weights", (50, 2), equal=True, chunk_size=8, left_context_chunks=1, **_ROW),
    _trained(
        "recordings, equal weights and a penalty under masks",
        (50, 2),
        act=True,
        equal=True,
        key_padding_mask=lambda m: weights._random_mask(m, 2, 50),
        **_ROW,
        **_PENALTY,
    ),
    _trained(
        "recordings, a penalty outside of chunks",
        (50, 2),
        act=True,
        equal=False,
        chunk_size=4,
        **_ROW,
        **_PENALTY,
    ),
    _trained(
        "recordings, two of three heads",
        (23, 2, 3, 4, 3),
        act=True,
        starts=(0, 9, 13, 20),
        longest=9,
        pos_batch=2,
        value_heads=2,
        **_PENALTY,
    ),
)


def _with_mean(make: Make) -> dict:
    """Makes a call in which dS k needs rows of dS that add up to 0."""
    call = _valued(make, weights._keys_with_mean(make, 1.0, 60, 1, 2, 16, 4, scale=0.3), dim=12)
    return call | {"value": call["value"] + 1}


TABLE = OpTable(
    op="zipformer_attention",
    samples=(
        *(_sample(s) for s in weights.TABLE.samples if s.name != "several blocks of keys"),
        Sample(
            "the first head, wide values",
            lambda m: _valued(m, weights._call(m, 20, 2, 4, 4, 2, scale=0.4), 1, 144),
        ),
        Sample(
            "two of three heads",
            lambda m: _valued(m, weights._call(m, 9, 2, 3, 4, 2, left=3, scale=0.4), 2, 5),
            thorough=True,
        ),
        *_TRAINED,
        Sample("keys and values with a mean", _with_mean, thorough=True),
        Sample("values of 48 channels", lambda m: _valued(m, weights._call(m, 40, 1, 2, 8, 4), None, 48)),
        Sample(
            "several blocks of keys",
            lambda m: _valued(
                m, weights._call(m, 600, 1, 1, 8, 4, left=70, key_padding_mask=m.padding(670, [650])), None, 4
            ),
            large=True,
        ),
        Sample(
            "several blocks of keys, chunks",
            lambda m: _valued(m, weights._call(m, 700, 1, 1, 8, 4, chunk_size=32, left_context_chunks=3)),
            large=True,
        ),
    ),
    invalid=invalid(
        lambda m: _valued(m, weights._call(m, 5, 2)),
        ("value does not divide", "value", lambda m: m.normal(5, 2, 7)),
        ("values of three heads", "value_heads", 3),
    ),
    penalties=("score_penalty",),
    unread=("value",),  # the op may skip hidden keys
    random=_random,
)


# --- the benchmark


def sized(
    T: int = 796, B: int = 4, num_heads: int = 4, query_head_dim: int = weights.QUERY_DIM, E: int = 48
) -> Case:
    if E % num_heads:
        raise ValueError(f"E: expected a multiple of num_heads = {num_heads}, got {E}")
    pos, dim = weights.POS_DIM, E // num_heads
    scores, rows = num_heads * B * T * T, T * B * num_heads
    values, result = rows * (2 * query_head_dim + pos + dim), rows * dim
    product, weighting = 2 * scores * (query_head_dim + pos), 2 * scores * dim
    forward = values + result, product + weighting
    backward = 2 * values + result, 3 * product + 2 * weighting

    def arguments(make: Make, frames: int, batch: int, heads: int) -> dict:
        return _valued(make, weights.ragged(make, frames, batch, heads, query_head_dim), dim=dim)

    return weights.measured("zipformer_attention", arguments, forward, backward, T, B, num_heads)


CASES = (sized(), sized(2998, 1))
ON_DEVICE = (sized(FRAMES, BATCH), sized(188, BATCH, 8, E=96))
WATCH = (
    "tiles under a running maximum with four warps; sums that the forward pass keeps; in 16 bits delta from y and its "
    "remainder; pieces of dS added in order; recordings in a row; a penalty and equal weights that numbers on the "
    "device decide"
)
