# SPDX-License-Identifier: Apache-2.0
"""Samples of linear_activation."""

from fastasr.testing.samples.linear import affine
from fastasr.testing.table import OpTable, Sample

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
        Sample("vector", lambda m: affine(m, (16,), 8)),
        Sample("one output", lambda m: affine(m, (5, 64), 1), draws=16),
        Sample("no rows", lambda m: affine(m, (0, 3, 8), 5)),
        Sample("no outputs", lambda m: affine(m, (4, 8), 0)),
        Sample("no channels", lambda m: affine(m, (4, 0), 5)),
    ),
    rows=("x",),
    thread_invariant=False,
    random=lambda m, shape: (
        affine(m, shape() or (3,), shape.size()) | {"activation": shape.choice(("silu", "tanh", "gelu"))}
    ),
)
