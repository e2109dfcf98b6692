# SPDX-License-Identifier: Apache-2.0
"""Samples of bypass, and its benchmark at the sizes of Zipformer-M's stacks 0 and 3."""

from torch import Tensor

from fastasr.testing.speed import BATCH, FRAMES, Case, Implementation, case, costs, module, upstream_member
from fastasr.testing.table import Make, OpTable, Sample, invalid


def _bypass(make: Make, shape: tuple[int, ...], scale_dims: int = 1) -> dict:
    return {
        "x_orig": make.normal(*shape),
        "x": make.normal(*shape),
        "scale": make.uniform(*shape[len(shape) - scale_dims :]),
    }


TABLE = OpTable(
    op="bypass",
    samples=(
        Sample("tbc", lambda m: _bypass(m, (5, 3, 24)), thorough=True),
        Sample("scale per sequence", lambda m: _bypass(m, (6, 3, 8), 2), thorough=True),
        Sample("vector", lambda m: _bypass(m, (17,))),
        Sample("one channel", lambda m: _bypass(m, (9, 1))),
        Sample("odd channels", lambda m: _bypass(m, (11, 193))),
        Sample("scale of every element", lambda m: _bypass(m, (1, 3, 5), 3)),
        Sample(
            "x_orig in float32",
            lambda m: _bypass(m, (9, 4, 192)) | {"x_orig": Make(seed=3).normal(9, 4, 192).to(m.device)},
        ),
        Sample(
            "infinities and NaN",
            lambda m: {
                "x_orig": m.values(float("inf"), 1.0, float("nan"), 2.0, -float("inf")),
                "x": m.values(1.0, float("inf"), 1.0, 3.0, -float("inf")),
                "scale": m.values(*[0.25] * 5),
            },
            exact=False,
        ),
        Sample("encoder", lambda m: _bypass(m, (150, 4, 192), 2)),
        Sample(
            "layer skipped",
            lambda m: (
                _bypass(m, (5, 3, 8), 2)
                | {"scale": m.values(*[0.0] * 8, *[1.0] * 8, *[0.5] * 8).reshape(3, 8)}
            ),
        ),
        Sample("no rows", lambda m: _bypass(m, (0, 3, 8))),
        Sample("no channels", lambda m: _bypass(m, (4, 0))),
    ),
    invalid=invalid(
        lambda m: _bypass(m, (3, 2, 8)),
        ("scale of another size", "scale", lambda m: m.normal(7)),
        ("scale would broadcast", "scale", lambda m: m.normal(2, 1)),
        ("scale has no dimensions", "scale", lambda m: m.normal()),
        ("scale has more dimensions than x", "scale", lambda m: m.normal(1, 3, 2, 8)),
    ),
    rows=("x_orig", "x"),
    random=lambda m, shape: _bypass(m, shape() or (3,)),
)


# --- the benchmark


def _upstream(x_orig: Tensor, x: Tensor, scale: Tensor) -> Implementation:
    bypass = upstream_member("zipformer.modules.zipformer.BypassModule")(x.shape[-1]).to(x)
    return module(bypass, x_orig, x, bypass_scale=scale)


def sized(T: int = 796, B: int = 4, C: int = 192) -> Case:
    shape, n = (T, B, C), T * B * C
    passes = costs((3 * n, 0), (5 * n, 0))  # x_orig, x; y. x_orig, x, dy; dx_orig, dx
    return case(
        "bypass", shape, lambda m: _bypass(m, shape), passes, copy=True, others={"upstream": _upstream}
    )


CASES = (sized(796, 4, 192), sized(100, 4, 512))
ON_DEVICE = (*(sized(FRAMES, BATCH, c) for c in (192, 512, 768)), sized(188, BATCH, 512))
WATCH = "2048 elements per program; the scale's gradient in two stages"
