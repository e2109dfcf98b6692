# SPDX-License-Identifier: Apache-2.0
"""Numbers that follow a schedule over the batches of a training run.

f(x) is piecewise linear through points (x, y) and constant before the first and after the last point.
"""

import bisect
import itertools
import logging
import random
from collections.abc import Callable
from typing import Any

import torch


class PiecewiseLinear:
    """A function of one number, from (x, y) pairs with increasing x, or from another PiecewiseLinear."""

    pairs: list[tuple[float, float]]

    def __init__(self, *args: Any) -> None:
        if len(args) == 1 and isinstance(args[0], PiecewiseLinear):
            self.pairs = list(args[0].pairs)
        else:
            self.pairs = [(float(x), float(y)) for x, y in args]
        if not self.pairs:
            raise ValueError("PiecewiseLinear: expected at least one (x, y) pair, got none")
        for (x, _), (following, _) in itertools.pairwise(self.pairs):
            if following <= x:
                raise ValueError(f"PiecewiseLinear: x must increase, got {self.pairs}")

    def __str__(self) -> str:
        return f"PiecewiseLinear({str(self.pairs)[1:-1]})"

    def __call__(self, x: float) -> float:
        if x <= self.pairs[0][0]:
            return self.pairs[0][1]
        if x >= self.pairs[-1][0]:
            return self.pairs[-1][1]
        end = bisect.bisect_left([point for point, _ in self.pairs], x)
        (x0, y0), (x1, y1) = self.pairs[end - 1], self.pairs[end]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    def __mul__(self, alpha: float) -> "PiecewiseLinear":
        return PiecewiseLinear(*((x, y * alpha) for x, y in self.pairs))

    def __add__(self, other: "PiecewiseLinear | float") -> "PiecewiseLinear":
        if isinstance(other, (int, float)):
            return PiecewiseLinear(*((x, y + other) for x, y in self.pairs))
        return self._combine(other, lambda a, b: a + b, include_crossings=False)

    def max(self, other: "PiecewiseLinear | float") -> "PiecewiseLinear":
        return self._combine(other, max, include_crossings=True)

    def min(self, other: "PiecewiseLinear | float") -> "PiecewiseLinear":
        return self._combine(other, min, include_crossings=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PiecewiseLinear) and self.pairs == other.pairs

    def _combine(
        self, other: "PiecewiseLinear | float", function: Callable[..., Any], include_crossings: bool
    ) -> "PiecewiseLinear":
        if isinstance(other, (int, float)):
            other = PiecewiseLinear((0, other))
        a, b = self.get_common_basis(other, include_crossings)
        return PiecewiseLinear(
            *((x, function(y, z)) for (x, y), (_, z) in zip(a.pairs, b.pairs, strict=True))
        )

    def get_common_basis(
        self, p: "PiecewiseLinear | float", include_crossings: bool = False
    ) -> "tuple[PiecewiseLinear, PiecewiseLinear]":
        """Returns both functions on a common set of x values; ``include_crossings`` adds those where they cross."""
        if not isinstance(p, PiecewiseLinear):
            raise TypeError(
                f"PiecewiseLinear: expected a number or a PiecewiseLinear, got {type(p).__name__}"
            )
        points = sorted({x for x, _ in self.pairs + p.pairs})
        if include_crossings:
            crossings = []
            for x, following in itertools.pairwise(points):
                before, after = self(x) - p(x), self(following) - p(following)
                if (before > 0) != (after > 0):
                    crossings.append(x + abs(before) / (abs(before) + abs(after)) * (following - x))
            points = sorted({*points, *crossings})
        one, other = (PiecewiseLinear(*((x, f(x)) for x in points)) for f in (self, p))
        return one, other


class ScheduledFloat(torch.nn.Module):
    """A rate or a limit as a function of ``batch_count``; ``float(schedule)`` is its value.

    The value is ``default`` in eval mode and while batch_count is None. The training loop sets ``batch_count`` (and
    ``name``) on every module that has it, so this is a Module. A read in training with a batch count draws one number
    from Python's ``random``, which decides whether the value is logged.
    """

    def __init__(self, *args: Any, default: float = 0.0) -> None:
        super().__init__()
        self.batch_count: float | None = None
        self.name: str | None = None
        self.default = default
        self.schedule = PiecewiseLinear(*args)

    def extra_repr(self) -> str:
        return f"batch_count={self.batch_count}, schedule={self.schedule.pairs}, default={self.default}"

    def __float__(self) -> float:
        if self.batch_count is None or not self.training:
            return float(self.default)
        value = self.schedule(self.batch_count)
        if random.random() < 0.0002:
            logging.debug(
                "ScheduledFloat: name=%s, batch_count=%s, value=%s", self.name, self.batch_count, value
            )
        return value

    def __add__(self, x: "ScheduledFloat | float") -> "ScheduledFloat":
        return self._combine(x, PiecewiseLinear.__add__, lambda a, b: a + b)

    def max(self, x: "ScheduledFloat | float") -> "ScheduledFloat":
        return self._combine(x, PiecewiseLinear.max, max)

    def _combine(
        self, x: "ScheduledFloat | float", of_schedules: Callable[..., Any], of_defaults: Callable[..., Any]
    ) -> "ScheduledFloat":
        """Combines this schedule with a schedule or a number. A number leaves the default unchanged."""
        if isinstance(x, (int, float)):
            return ScheduledFloat(of_schedules(self.schedule, x), default=self.default)
        return ScheduledFloat(
            of_schedules(self.schedule, x.schedule), default=of_defaults(self.default, x.default)
        )


FloatLike = float | ScheduledFloat


def whitening_schedule(limit: float, ratio: float = 2.0) -> ScheduledFloat:
    """Returns a schedule from ``limit`` to ``ratio * limit`` over 20,000 batches."""
    return ScheduledFloat((0.0, limit), (20000.0, ratio * limit), default=limit)
