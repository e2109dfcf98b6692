# SPDX-License-Identifier: Apache-2.0
"""Samples of linear."""

from fastasr.testing.table import Invalid, Make, OpTable, Sample


def affine(make: Make, shape: tuple[int, ...], n: int, bias: bool = True) -> dict:
    """x of this shape with a weight for n outputs, scaled as an initialised layer's."""
    k = shape[-1]
    scale = max(k, 1) ** -0.5
    return {
        "x": make.normal(*shape),
        "weight": make.normal(n, k, scale=scale),
        "bias": make.normal(n, scale=scale) if bias else None,
    }


def invalid_affine() -> tuple[Invalid, ...]:
    """Calls that every op with a linear layer refuses."""
    return (
        Invalid(
            "weight of another K",
            lambda m: affine(m, (3, 8), 5) | {"weight": m.normal(5, 7)},
            ValueError,
            "x",
        ),
        Invalid(
            "weight is a vector",
            lambda m: affine(m, (3, 8), 5) | {"weight": m.normal(8)},
            ValueError,
            "weight",
        ),
        Invalid(
            "weight is sparse",
            lambda m: affine(m, (3, 8), 5) | {"weight": m.normal(5, 8).to_sparse()},
            TypeError,
            "weight",
        ),
        Invalid(
            "bias is sparse",
            lambda m: affine(m, (3, 8), 5) | {"bias": m.normal(5).to_sparse()},
            TypeError,
            "bias",
        ),
        Invalid(
            "bias of another N", lambda m: affine(m, (3, 8), 5) | {"bias": m.normal(4)}, ValueError, "bias"
        ),
        Invalid(
            "bias is a matrix", lambda m: affine(m, (3, 8), 5) | {"bias": m.normal(1, 5)}, ValueError, "bias"
        ),
        Invalid("x has no dimensions", lambda m: affine(m, (3, 8), 5) | {"x": m.normal()}, ValueError, "x"),
        Invalid(
            "weight of another dtype",
            lambda m: affine(m, (3, 8), 5) | {"weight": m.normal(5, 8).half()},
            TypeError,
            "weight",
        ),
        Invalid(
            "bias of another dtype",
            lambda m: affine(m, (3, 8), 5) | {"bias": m.normal(5).double()},
            TypeError,
            "bias",
        ),
    )


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
    invalid=invalid_affine(),
    rows=("x",),
    thread_invariant=False,
    random=lambda m, shape: affine(m, shape() or (3,), shape.size()),
)
