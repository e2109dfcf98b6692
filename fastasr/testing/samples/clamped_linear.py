# SPDX-License-Identifier: Apache-2.0
"""Samples of clamped_linear, and its benchmark: the first layer of a feed-forward block of Gemma 4's audio tower."""

import math
from typing import Any

from fastasr.testing.speed import BACKWARD, BOTH, FORWARD, Case, Cost, case
from fastasr.testing.table import Make, OpTable, Sample

NAMES = "input_min", "input_max", "output_min", "output_max", "next_min", "next_max"
# Each of them acts on a few per cent of normal numbers, and none is one that rounding to 16 bits may give.
ALL = dict(zip(NAMES, (-1.713, 1.519, -1.117, 1.293, -0.2137, 0.9173), strict=True))


def _call(make: Make, shape: tuple[int, ...], outputs: int, bounds: dict[str, float], **more: Any) -> dict:
    return {
        "x": make.normal(*shape),
        "weight": make.normal(outputs, shape[-1], scale=max(1, shape[-1]) ** -0.5),
        **{name: make.values(bound).squeeze(0) for name, bound in bounds.items()},
        **more,
    }


def _of_input(bounds: dict[str, float]) -> dict[str, float]:
    return {name: bounds[name] for name in NAMES[:2]}


def _of_both(bounds: dict[str, float]) -> dict[str, float]:
    return {name: bounds[name] for name in NAMES[:4]}


INFINITE = {name: math.copysign(math.inf, bound) for name, bound in ALL.items()}

TABLE = OpTable(
    op="clamped_linear",
    samples=(
        Sample("both sides", lambda m: _call(m, (6, 2, 16), 12, _of_both(ALL)), thorough=True),
        Sample("silu, next", lambda m: _call(m, (7, 9), 5, ALL, activation="silu"), thorough=True),
        Sample("input alone", lambda m: _call(m, (40, 24), 33, _of_input(ALL))),
        Sample("one bound", lambda m: _call(m, (40, 24), 33, {"output_max": 0.317})),
        Sample("no bounds, gelu", lambda m: _call(m, (40, 24), 33, {}, activation="gelu")),
        Sample("infinite bounds", lambda m: _call(m, (20, 24), 33, INFINITE, activation="tanh")),
        Sample("infinite bounds, the product alone", lambda m: _call(m, (20, 24), 33, _of_both(INFINITE))),
        Sample("feed-forward", lambda m: _call(m, (150, 4, 96), 160, ALL, activation="silu")),
        Sample("wide", lambda m: _call(m, (20, 48), 2100, _of_both(ALL))),
        Sample("vector", lambda m: _call(m, (16,), 8, _of_both(ALL))),
        Sample("all is clamped", lambda m: _call(m, (5, 16), 8, {"input_min": 9.0, "output_max": -9.0})),
        Sample("the bounds cross", lambda m: _call(m, (5, 16), 8, {"output_min": 0.71, "output_max": -0.53})),
        Sample("strided x", lambda m: _call(m, (5, 16), 8, ALL, x=m.normal(16, 5).t())),
        Sample("no rows", lambda m: _call(m, (0, 3, 8), 5, _of_both(ALL))),
        Sample("no outputs", lambda m: _call(m, (4, 8), 0, _of_both(ALL))),
        Sample("no channels", lambda m: _call(m, (4, 0), 5, _of_both(ALL))),
        Sample(
            "NaN and inf",
            lambda m: _call(
                m, (3, 4), 5, _of_both(ALL),
                x=m.values(1, float("nan"), 2, 3, 1, float("inf"), 2, 3, 1, 2, -float("inf"), 4).view(3, 4),
            ),
            exact=False,
        ),
    ),
    rows=("x",),
    thread_invariant=False,
    random=lambda m, shape: _call(
        m,
        shape() or (3,),
        shape.size(),
        shape.choice((ALL, _of_both(ALL), {}, INFINITE)),
        activation=shape.choice(("identity", "silu", "tanh", "gelu")),
    ),
)  # fmt: skip


# --- the benchmark


def sized(T: int = 750, B: int = 1, K: int = 1024, N: int = 1024) -> Case:
    text, rows = f"{B}x{T}x{K}", B * T

    def costs(size: int) -> dict[str, Cost]:
        product, moved = 2 * rows * K * N, (rows * K + K * N + rows * N) * size
        return {
            FORWARD: Cost(moved, product),
            BACKWARD: Cost(2 * moved, 2 * product),
            BOTH: Cost(3 * moved + rows * N * size, 3 * product),  # z is kept
        }

    arguments = lambda m: _call(m, (B, T, K), N, ALL, activation="silu")  # noqa: E731
    return case("clamped_linear", f"{text}->{N}, silu", arguments, costs, shape=text)


CASES = (sized(N=4096),)
ON_DEVICE = (sized(B=16, N=4096),)
WATCH = "bounds read from the device; z overwritten in place; no gradient outside the bounds"
