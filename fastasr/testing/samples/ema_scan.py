# SPDX-License-Identifier: Apache-2.0
"""Samples of ema_scan, the samples that it shares with complex_ema_scan, and its benchmark as a MEGA block calls it:
(L, B, D), SiLU and the residual term included.

Upstream is ESPnet's ``MultiHeadDampedEMA``, a convolution by FFT. Lengths range from one step to the longest
recordings; the cost must grow linearly with the length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from fastasr.ops.ema_scan import Layout
from fastasr.testing.fuzz import Shape
from fastasr.testing.speed import BOTH, FORWARD, Case, Implementation, case, costs, module, upstream_member
from fastasr.testing.table import Invalid, Make, OpTable, Sample, invalid, sampler


@dataclass(frozen=True, eq=False)
class Average:
    """Makes the calls of one op.

    ``parameters(make, rows, states, spread, means)`` makes the four parameters. ``means`` has the arguments before a
    sigmoid with the mean of each, ``state`` the shape of a state.
    """

    op: str
    parameters: Callable[..., dict]
    means: dict[str, float]
    residual: str
    state: tuple[int, ...] = ()

    def call(
        self,
        make: Make,
        length: int,
        batch: int,
        channels: int,
        states: int = 4,
        *,
        layout: str = "LBD",
        direction: str = "forward",
        spread: float = 0.5,
        state: bool = False,
        mask: bool = False,
        **options: Any,
    ) -> dict:
        """Makes a call with random parameters. ``options``: options of the op, and means of arguments before a
        sigmoid."""
        sizes = {"L": length, "B": batch, "D": channels}
        rows = channels * (2 if direction == "bidirectional" else 1)
        means = {name: options.pop(name, mean) for name, mean in self.means.items()}
        arguments = {
            "x": make.normal(*(sizes[letter] for letter in layout)),
            **self.parameters(make, rows, states, spread, means),
            self.residual: make.normal(channels),
            "layout": layout,
            "direction": direction,
            **options,
        }
        if state:
            arguments |= {"state": make.normal(batch, channels, states, *self.state), "return_state": True}
        if mask:
            arguments["padding_mask"] = make.uniform(batch, length) > 0.7
        return arguments

    def random(self, make: Make, shape: Shape) -> dict:
        # relu and tanh are left out, because they map infinities to numbers, and a convolution and a scan have NaNs at
        # different places. Truncations are left out, because an infinity affects more than its window; the op's own
        # tests draw truncated calls.
        kind = shape.choice(("plain", "state", "bidirectional"))
        options = {
            "layout": shape.choice(get_args(Layout)),
            "activation": shape.choice(("identity", "silu", "gelu")),
            "direction": shape.choice(("forward", "reverse")),
            "mask": shape.choice((False, True)),
            "state": kind == "state",
        }
        if kind == "bidirectional":
            options["direction"] = kind
        batch, states = shape.choice((0, 1, 2, 3)), shape.choice((1, 2, 3, 4, 5, 16))
        return self.call(make, shape.size(), batch, shape.size(), states, **options)

    def table(self) -> OpTable:
        """Returns the table with the samples that both ops share."""
        sample, (first, second, *_) = sampler(self.call), self.means
        close_to_1: dict[str, Any] = {first: -7.0, second: -3.0}
        close_to_0: dict[str, Any] = {first: 12.0, second: 12.0}
        both: dict[str, Any] = {"direction": "bidirectional"}
        return OpTable(
            op=self.op,
            samples=(
                sample("lbd", (9, 2, 6), thorough=True),
                sample("state", (7, 2, 5, 3), state=True, activation="silu", layout="BLD", thorough=True),
                sample("reverse", (8, 3, 4, 2), state=True, mask=True, direction="reverse", thorough=True),
                sample("bidirectional", (6, 2, 5, 2), layout="BDL", activation="gelu", thorough=True, **both),
                sample("truncated", (9, 2, 5, 2), truncation=3, mask=True, activation="tanh", thorough=True),
                sample("channels and a tail", (75, 2, 65), activation="relu", mask=True),
                sample("batch first", (100, 3, 48), layout="BLD", activation="gelu"),
                sample("one state", (90, 2, 33, 1)),
                sample("five states", (90, 2, 33, 5), activation="silu", state=True),
                sample("64 states", (40, 2, 20, 64), **both),
                sample("bidirectional, truncated", (150, 2, 30), truncation=20, mask=True, **both),
                sample(
                    "reverse, truncated", (150, 2, 30, 6), direction="reverse", truncation=64, layout="BDL"
                ),
                sample("truncation beyond the end", (20, 2, 8), truncation=50),
                sample("|q| close to 1", (700, 1, 40), state=True, **close_to_1),
                sample("|q| close to 0", (300, 1, 40), state=True, **close_to_0),
                sample("|q| is 0 and 1", (20, 2, 64), spread=100.0),
                sample("close to 1, truncated", (700, 1, 40), truncation=100, **close_to_1),
                sample("one step", (1, 4, 70), state=True, activation="silu"),
                sample("one step, no state", (1, 3, 33)),
                sample("no steps", (0, 2, 5), state=True),
                sample("no batch", (6, 0, 5), state=True),
                sample("no channels", (6, 2, 0), state=True),
                Sample("no residual", lambda m: self.call(m, 40, 2, 24) | {self.residual: None}),
                # with several states, an infinity may meet an infinity of the other sign
                Sample(
                    "NaN and inf",
                    lambda m: (
                        self.call(m, 1, 1, 4, 1)
                        | {"x": m.values(1.0, float("nan"), float("inf"), 2.0).reshape(1, 1, 4)}
                    ),
                    exact=False,
                ),
            ),
            invalid=(
                *invalid(
                    lambda m: self.call(m, 7, 3, 8),
                    ("no states", first, lambda m: m.normal(8, 0)),
                    ("65 states", first, lambda m: m.normal(8, 65)),
                    ("residual would broadcast", self.residual, lambda m: m.normal(1)),
                    ("no taps", "truncation", 0),
                    ("a float of taps", "truncation", 3.0, TypeError),
                ),
                *invalid(
                    lambda m: self.call(m, 7, 3, 8, return_state=True),
                    ("truncation with a state", "truncation", 3),
                ),
                Invalid(
                    "bidirectional with one half", lambda m: self.call(m, 7, 3, 8) | both, ValueError, first
                ),
                Invalid(
                    "bidirectional with a state",
                    lambda m: self.call(m, 7, 3, 8, **both) | {"return_state": True},
                    ValueError,
                    "direction",
                ),
            ),
            random=self.random,
        )


def _parameters(make: Make, rows: int, states: int, spread: float, means: dict) -> dict:
    return {name: make.normal(rows, states, scale=spread, mean=mean) for name, mean in means.items()} | {
        "expansion": make.normal(rows, states),
        "projection": make.normal(rows, states),
    }


AVERAGE = Average("ema_scan", _parameters, {"damping": 0.0, "decay": 0.0}, "residual")
_shared, _sample = AVERAGE.table(), sampler(AVERAGE.call)
TABLE = replace(
    _shared,
    samples=(
        *_shared.samples,
        _sample("layer", (200, 4, 64), activation="silu", mask=True),
        _sample("time last", (83, 2, 70), layout="BDL", activation="tanh", mask=True),
        _sample("16 states", (70, 2, 40, 16), state=True),
        _sample("one channel", (130, 3, 1), layout="BDL"),
        # 13 channels, because with 3 the gradients have 12 numbers and eager is better by chance in 4 of 24 draws
        _sample("long, few channels", (5000, 1, 13), activation="silu", state=True),
        Sample(
            "three-dimensional parameters",
            lambda m: {
                k: v.unsqueeze(-1) if k in ("damping", "decay", "expansion") else v
                for k, v in AVERAGE.call(m, 30, 2, 16).items()
            },
        ),
    ),
)


# --- the benchmark


def _upstream(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor,
    **_: object,
) -> Implementation:
    average = upstream_member(
        "espnet2.asr_transducer.decoder.modules.mega.multi_head_damped_ema.MultiHeadDampedEMA"
    )
    state = {"damping_factor": damping, "decay_factor": decay, "ema_expansion_matrix": expansion}
    state |= {"kernel_projection_matrix": projection, "residual_weight": residual}
    average = average(x.shape[-1], damping.shape[1], torch.nn.SiLU()).to(x)
    return module(average, x, result=lambda y: y[0], **state)


def measured(
    op: str, name: str, sizes: tuple[int, ...], arguments: Callable[[Make], dict], **options: Any
) -> Case:
    """Returns a case of ema_scan or of complex_ema_scan: the two move the same bytes."""
    shape, n = "x".join(map(str, sizes)), math.prod(sizes)
    passes = costs((2 * n, 0), (3 * n, 0))  # x; y. x, dy; dx
    options |= {"copy": True, "passes": (FORWARD, BOTH)}
    return case(op, name or shape, arguments, passes, shape=shape, **options)


def _case(length: int, batch: int = 4, channels: int = 512, states: int = 4, name: str = "") -> Case:
    def arguments(make: Make) -> dict:
        return AVERAGE.call(make, length, batch, channels, states, spread=0.2, activation="silu")

    sizes = length, batch, channels
    name = name if states == 4 else "x".join(map(str, sizes)) + f", {states} states"
    return measured("ema_scan", name, sizes, arguments, others={"upstream": _upstream})


def _curve_case(length: int) -> Case:
    """Returns the case of a point on the curve of times by length."""
    whole = _case(length, 1, 128, name=f"length {length}")
    return replace(
        whole, make=lambda *to: {k: v for k, v in whole.make(*to).items() if k in ("upstream", "fastasr")}
    )


def sized(L: int = 2048, B: int = 4, D: int = 512, N: int = 4) -> Case:
    return _case(L, B, D, N)


CASES = (
    *(_case(length) for length in (1, 16, 64, 200, 512, 2048, 16384)),
    _case(2048, states=16),
    *(_curve_case(2**k) for k in range(6, 18)),
)
ON_DEVICE = (*(_case(length, 8) for length in (2048, 16384, 1)), _case(2048, 2), _case(2048, 8, states=16))
WATCH = "the weak symbol for the stream; device `exp`, `tanh`, `erf`; one segment against several"
