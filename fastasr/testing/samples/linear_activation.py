# SPDX-License-Identifier: Apache-2.0
"""Samples of linear_activation, and its benchmark: the first projections of the cgMLP (GELU) and of the feed-forward
blocks (SiLU) of an E-Branchformer layer of 512 channels, and the SwiGLU of Phi-4-multimodal's audio encoder."""

import math

from fastasr.testing.fuzz import Shape
from fastasr.testing.samples.linear import affine
from fastasr.testing.samples.rnnt_joiner import dropout
from fastasr.testing.speed import BACKWARD, BATCH, BOTH, FORWARD, FRAMES, Case, Cost, case
from fastasr.testing.table import Invalid, Make, OpTable, Sample


def _random(make: Make, shape: Shape) -> dict:
    gated = shape.choice((False, True))
    arguments = affine(make, shape() or (3,), shape.size() * (1 + gated))
    arguments |= {"activation": shape.choice(("silu", "tanh", "gelu")), "gated": gated}
    if shape.choice((True, False)):
        arguments |= dropout(make, shape.size() % 10 / 10, shape.size())
    return arguments


TABLE = OpTable(
    op="linear_activation",
    samples=(
        Sample("silu", lambda m: affine(m, (6, 2, 16), 12), thorough=True),
        Sample(
            "gelu, no bias", lambda m: affine(m, (7, 9), 5, False) | {"activation": "gelu"}, thorough=True
        ),
        Sample("tanh", lambda m: affine(m, (40, 24), 33) | {"activation": "tanh"}),
        Sample("identity", lambda m: affine(m, (40, 24), 33) | {"activation": "identity"}),
        Sample("gated MLP", lambda m: affine(m, (40, 4, 64), 384) | {"activation": "gelu"}),
        Sample("feed-forward", lambda m: affine(m, (150, 4, 96), 160)),
        Sample("wide", lambda m: affine(m, (20, 48), 2100) | {"activation": "gelu"}),
        Sample("strided bias", lambda m: affine(m, (5, 64), 32) | {"bias": m.normal(64)[::2]}),
        Sample("SwiGLU", lambda m: affine(m, (6, 2, 16), 12) | {"gated": True}, thorough=True),
        Sample(
            "gated GELU, no bias",
            lambda m: affine(m, (7, 9), 10, False) | {"activation": "gelu", "gated": True},
            thorough=True,
        ),
        Sample("SwiGLU of a feed-forward", lambda m: affine(m, (150, 4, 96), 2 * 160) | {"gated": True}),
        Sample("SwiGLU, wide", lambda m: affine(m, (20, 48), 2100) | {"gated": True}),
        Sample("bilinear", lambda m: affine(m, (40, 24), 66) | {"activation": "identity", "gated": True}),
        Sample("SwiGLU of a vector", lambda m: affine(m, (16,), 8) | {"gated": True}),
        Sample("SwiGLU, no rows", lambda m: affine(m, (0, 3, 8), 6) | {"gated": True}),
        Sample("SwiGLU, no outputs", lambda m: affine(m, (4, 8), 0) | {"gated": True}),
        Sample("SwiGLU, no channels", lambda m: affine(m, (4, 0), 6) | {"gated": True}),
        Sample("dropout", lambda m: affine(m, (6, 2, 16), 12) | dropout(m, 0.3, 2**45 + 11), thorough=True),
        Sample("dropout, wide", lambda m: affine(m, (20, 48), 2100) | dropout(m, 0.1, -7)),
        Sample("dropout of a vector", lambda m: affine(m, (16,), 33) | dropout(m, 0.5, 3)),
        Sample("dropout, no rows", lambda m: affine(m, (0, 3, 8), 5) | dropout(m, 0.5, 3)),
        Sample("dropout, no outputs", lambda m: affine(m, (4, 8), 0) | dropout(m, 0.5, 3)),
        Sample(
            "SwiGLU, dropout",
            lambda m: affine(m, (6, 2, 16), 12) | {"gated": True} | dropout(m, 0.3, -1),
            thorough=True,
        ),
        Sample(
            "gated GELU of a feed-forward, dropout",
            lambda m: (
                affine(m, (70, 4, 96), 2 * 160) | {"activation": "gelu", "gated": True} | dropout(m, 0.2, 9)
            ),
        ),
        Sample("vector", lambda m: affine(m, (16,), 8)),
        Sample("one output", lambda m: affine(m, (5, 64), 1), draws=16),
        Sample("no rows", lambda m: affine(m, (0, 3, 8), 5)),
        Sample("no outputs", lambda m: affine(m, (4, 8), 0)),
        Sample("no channels", lambda m: affine(m, (4, 0), 5)),
    ),
    rows=("x",),
    thread_invariant=False,
    random=_random,
    invalid=(
        Invalid(
            "dropout without a seed",
            lambda m: affine(m, (4, 8), 5) | {"dropout_p": 0.1},
            ValueError,
            "fastasr.linear_activation: dropout_seed: expected a Tensor where dropout_p is more than 0, got None",
        ),
        Invalid(
            "an odd number of rows to gate",
            lambda m: affine(m, (4, 8), 5) | {"gated": True},
            ValueError,
            "fastasr.linear_activation: weight: expected an even number of rows if gated, got 5",
        ),
    ),
)


# --- the benchmark


def _case(shape: tuple[int, ...], outputs: int, activation: str, gated: bool = False) -> Case:
    """``outputs`` are those of the product; the gated form has half of them."""
    text, width, rows = "x".join(map(str, shape)), shape[-1], math.prod(shape[:-1])

    def arguments(make: Make) -> dict:
        return affine(make, shape, outputs) | {"activation": activation, "gated": gated}

    def costs(size: int) -> dict[str, Cost]:
        results = outputs // (1 + gated)
        product, moved = 2 * rows * width * outputs, (rows * width + width * outputs + rows * results) * size
        return {
            FORWARD: Cost(moved, product),
            BACKWARD: Cost(2 * moved, 2 * product),
            BOTH: Cost(3 * moved + rows * outputs * size, 3 * product),  # z is kept
        }

    label = f"{text}->{outputs}, {'gated ' * gated}{activation}"
    return case("linear_activation", label, arguments, costs, shape=text)


def sized(T: int = 400, B: int = 4, K: int = 512, N: int = 1024) -> Case:
    return _case((B, T, K), N, "silu")


CASES = (
    _case((4, 400, 512), 3072, "gelu"),
    _case((4, 400, 512), 1024, "silu"),
    _case((1, 375, 1024), 3072, "silu", gated=True),
)
ON_DEVICE = (
    _case((BATCH, FRAMES // 2, 512), 3072, "gelu"),
    _case((BATCH, FRAMES // 4, 1024), 3072, "silu", gated=True),
)
WATCH = "`ex2` and reciprocals in SiLU, tanh and GELU; z overwritten in place; dropout by a hash"
