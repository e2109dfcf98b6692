# SPDX-License-Identifier: Apache-2.0
"""Dropout of attention weights by a hash of a seed and of a weight's place; fastasr/ops/_weights_dropout.py gives the
formula.

A caller without dropout passes None for SEED, and nothing of this is compiled.
"""

import triton
import triton.language as tl

STEP = tl.constexpr(0x9E3779B9)
FIRST = tl.constexpr(0x7FEB352D)
SECOND = tl.constexpr(0x846CA68B)
WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _plus(x, y):  # in debug mode Triton's own + and * report overflow, which the hash needs
    return tl.add(x, y, sanitize_overflow=False)


@triton.jit
def _times(x, y):
    return tl.mul(x, y, sanitize_overflow=False)


@triton.jit
def _mixed(x):
    x = _times(x ^ (x >> 16), FIRST)
    x = _times(x ^ (x >> 15), SECOND)
    return x ^ (x >> 16)


@triton.jit
def row_words(SEED, row):
    """Returns the two words that all keys of a row of weights share."""
    first, second = row, row
    if SEED is not None:
        seed = tl.load(SEED)
        low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        n = row.to(tl.uint32)
        first = _mixed(_mixed(n ^ low) ^ high)
        second = _mixed(_plus(_plus(_mixed(n ^ (high ^ WORD)), low), STEP))
    return first, second


@triton.jit
def dropped(values, SEED, words, j, threshold, factor):
    """Returns [rows, keys] values times ``factor`` where the weight is kept, else times 0."""
    if SEED is not None:
        first, second = words
        z = _plus(first[:, None], _times(j.to(tl.uint32), STEP)[None, :])
        z = _times(z ^ (z >> 16), FIRST)
        z = _times(z ^ (z >> 15) ^ second[:, None], SECOND)
        values = values * tl.where(z >= (tl.cast(threshold, tl.uint32) << 1), factor, 0.0)
    return values


def constants(p: float) -> tuple[int, float]:
    """Returns the threshold and the factor of ``dropped``."""
    return int(p * 2**31), 1 / (1 - p)
