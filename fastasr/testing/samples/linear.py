# SPDX-License-Identifier: Apache-2.0
"""Samples of linear."""

from fastasr.testing.table import Make, OpTable, Sample


def affine(make: Make, shape: tuple[int, ...], n: int, bias: bool = True) -> dict:
    """Makes x of this shape and a weight for n outputs with the scale of an initialised layer."""
    k = shape[-1]
    scale = max(k, 1) ** -0.5
    return {
        "x": make.normal(*shape),
        "weight": make.normal(n, k, scale=scale),
        "bias": make.normal(n, scale=scale) if bias else None,
    }


TABLE = OpTable(
    op="linear",
    samples=(
        Sample("tbc", lambda m: affine(m, (6, 2, 16), 12), thorough=True),
        Sample("no bias", lambda m: affine(m, (7, 9), 5, bias=False), thorough=True),
        Sample("vector", lambda m: affine(m, (16,), 8)),
        Sample("one row", lambda m: affine(m, (1, 64), 48)),
        Sample("one output", lambda m: affine(m, (5, 64), 1)),
        Sample("one channel", lambda m: affine(m, (5, 1), 3)),
        Sample("skinny", lambda m: affine(m, (16, 384), 256)),
        Sample("feed-forward", lambda m: affine(m, (200, 4, 192), 128)),
        Sample("strided bias", lambda m: affine(m, (5, 64), 32) | {"bias": m.normal(64)[::2]}),
        Sample("no rows", lambda m: affine(m, (0, 3, 8), 5)),
        Sample("no outputs", lambda m: affine(m, (4, 8), 0)),
        Sample("no channels", lambda m: affine(m, (4, 0), 5)),
    ),
    rows=("x",),
    thread_invariant=False,
    random=lambda m, shape: affine(m, shape() or (3,), shape.size()),
)
