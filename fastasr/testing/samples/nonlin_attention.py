# SPDX-License-Identifier: Apache-2.0
"""Samples of nonlin_attention, and its benchmark at the sizes of Zipformer-M's stacks 0 and 3, 16 s."""

import torch

from fastasr.testing.speed import BATCH, FRAMES, Case, case, costs
from fastasr.testing.table import Make, OpTable, Sample


def _call(make: Make, frames: int, batch: int, width: int) -> dict:
    weights = torch.softmax(make.normal(batch, frames, frames, scale=2.0), dim=-1)
    return {"weights": weights, "projected": make.normal(frames, batch, 3 * width)}


def _padded_rows(make: Make) -> dict:
    """Makes weights whose row stride is a multiple of 16 elements, as zipformer_attention_weights does."""
    call = _call(make, 13, 2, 8)
    weights = call["weights"].new_zeros(2, 13, 16)
    weights[..., :13] = call["weights"]
    return call | {"weights": weights[..., :13]}


def _slice(make: Make) -> dict:
    call = _call(make, 6, 3, 8)
    wide = torch.cat([call["projected"], make.normal(6, 3, 5)], dim=-1)
    return call | {"projected": wide[..., :24]}


TABLE = OpTable(
    op="nonlin_attention",
    samples=(
        Sample("tbc", lambda m: _call(m, 7, 3, 8), thorough=True),
        Sample("one sequence, odd width", lambda m: _call(m, 11, 1, 13), thorough=True),
        Sample("one frame", lambda m: _call(m, 1, 4, 16)),
        Sample("rows of weights apart", _padded_rows),
        Sample("a slice of a projection", _slice),
        Sample("stack 3", lambda m: _call(m, 50, 4, 384), large=True),
        Sample("wide", lambda m: _call(m, 40, 2, 144)),
        Sample(
            "saturated gates", lambda m: _call(m, 6, 2, 8) | {"projected": m.normal(6, 2, 24, scale=30.0)}
        ),
        Sample("no frames", lambda m: _call(m, 0, 3, 8)),
        Sample("no channels", lambda m: _call(m, 4, 2, 0)),
        Sample("no sequences", lambda m: _call(m, 4, 0, 5)),
    ),
    thread_invariant=False,
    random=lambda m, shape: _call(m, (shape() or (3,))[0], 2, 5),
)


# --- the benchmark


def sized(T: int = 796, B: int = 4, D: int = 144) -> Case:
    scores, rows = B * T * T, T * B * D
    passes = costs(
        (scores + 8 * rows, 2 * scores * D),  # W; s, v, x, x, o, o, z, y
        (2 * scores + 20 * rows, 4 * scores * D),
    )
    return case("nonlin_attention", (T, B, D), lambda m: _call(m, T, B, D), passes)


CASES = (sized(796, 4, 144), sized(100, 4, 384))
ON_DEVICE = (sized(FRAMES, BATCH, 144), sized(188, BATCH, 384))
WATCH = "the gate's tanh; rows of two layouts"
