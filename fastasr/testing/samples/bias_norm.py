# SPDX-License-Identifier: Apache-2.0
"""Samples of bias_norm, and its benchmark at the sizes of Zipformer-M's stacks 0 and 3."""

from torch import Tensor

from fastasr.testing.speed import BATCH, FRAMES, Case, Implementation, case, costs, module, upstream_member
from fastasr.testing.table import Make, OpTable, Sample, invalid


def _norm(make: Make, shape: tuple[int, ...], channel_dim: int = -1, scale: float = 1.0) -> dict:
    return {
        "x": make.normal(*shape, scale=scale),
        "bias": make.normal(shape[channel_dim], scale=0.1 * scale),
        "log_scale": make.normal(scale=0.3),
        "channel_dim": channel_dim,
    }


TABLE = OpTable(
    op="bias_norm",
    samples=(
        Sample("tbc", lambda m: _norm(m, (5, 3, 24)), thorough=True),
        Sample("channels first", lambda m: _norm(m, (3, 12, 5), 1), thorough=True),
        Sample("channels in the middle", lambda m: _norm(m, (2, 6, 5, 3), -3)),
        Sample("vector", lambda m: _norm(m, (40,))),
        # away from 0, where m^(-3/2) of the formula's gradient leaves float16's range
        Sample("two channels", lambda m: _norm(m, (30, 2)) | {"x": m.normal(30, 2).abs() + 0.5}),
        Sample("one channel", lambda m: _norm(m, (5, 1)), exact=False),
        Sample("odd channels", lambda m: _norm(m, (11, 193))),
        Sample("encoder", lambda m: _norm(m, (150, 4, 192))),
        Sample("wide", lambda m: _norm(m, (7, 1030))),
        Sample("very wide", lambda m: _norm(m, (2, 5000))),
        Sample("bias of zeros", lambda m: _norm(m, (3, 8)) | {"bias": m.normal(8, scale=0.0)}),
        Sample(
            "parameters in float32",
            lambda m: _norm(Make(device=m.device), (5, 4, 192)) | {"x": m.normal(5, 4, 192)},
        ),
        Sample("large values", lambda m: _norm(m, (5, 3, 24), scale=50.0)),
        Sample(
            "log_scale in float32",
            lambda m: _norm(m, (60, 4, 96)) | {"log_scale": Make(seed=3).normal(scale=0.3).to(m.device)},
        ),
        Sample("no rows", lambda m: _norm(m, (0, 3, 8))),
        Sample(
            "row equal to bias",
            lambda m: (
                _norm(m, (2, 8)) | {"x": m.values(*[0.5] * 16).reshape(2, 8), "bias": m.values(*[0.5] * 8)}
            ),
            exact=False,
        ),
        Sample(
            "NaN and inf",
            lambda m: (
                _norm(m, (2, 4))
                | {"x": m.values(1.0, float("nan"), 2.0, 3.0, 1.0, float("inf"), 2.0, 3.0).reshape(2, 4)}
            ),
            exact=False,
        ),
    ),
    invalid=invalid(lambda m: _norm(m, (3, 2, 8)), ("bias of another size", "bias", lambda m: m.normal(7))),
    rows=("x",),
    random=lambda m, shape: _norm(m, (*shape(), shape.size())),
)


# --- the benchmark


def _upstream(x: Tensor, bias: Tensor, log_scale: Tensor, **_: object) -> Implementation:
    norm = upstream_member("zipformer.modules.scaling.BiasNorm")(x.shape[-1]).to(x)
    return module(norm, x, bias=bias, log_scale=log_scale)


def sized(T: int = 796, B: int = 4, C: int = 192) -> Case:
    shape, n = (T, B, C), T * B * C
    passes = costs((2 * n, 0), (3 * n, 0))  # x; y. x, dy; dx
    return case(
        "bias_norm", shape, lambda m: _norm(m, shape), passes, copy=True, others={"upstream": _upstream}
    )


CASES = (sized(796, 4, 192), sized(100, 4, 512))
ON_DEVICE = (*(sized(FRAMES, BATCH, c) for c in (192, 512, 768)), sized(188, BATCH, 512))
WATCH = "`rsqrt` with its Newton step; float64 row sums, on cards with few float64 units"
