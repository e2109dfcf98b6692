# SPDX-License-Identifier: Apache-2.0
"""The numerical contract: a kernel's error against float64 is never above eager's own.

Both are compared with the definition evaluated in float64 on the same numbers. 10 % is allowed for rounding noise, and
in addition the cost of correct rounding, since eager may happen to be exact: 0.3 units in the last place on average
(0.5 for a handful of elements), one at the worst element. The reference of float64 results has the same rounding
errors, so 32 units are allowed there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RATIO = 1.1


@dataclass(frozen=True)
class Comparison:
    """The errors of a result and of eager, relative to the size of the float64 reference."""

    rms: float
    eager_rms: float
    worst: float
    eager_worst: float
    eps: float
    count: int

    @property
    def ok(self) -> bool:
        mean_floor, worst_floor = (32.0, 32.0) if self.eps < 1e-12 else (0.3 if self.count > 16 else 0.5, 1.0)
        return (
            self.rms <= RATIO * self.eager_rms + mean_floor * self.eps
            and self.worst <= RATIO * self.eager_worst + worst_floor * self.eps
        )

    def __str__(self) -> str:
        return (
            f"rms error {self.rms:.2e} (eager {self.eager_rms:.2e}), "
            f"worst {self.worst:.2e} (eager {self.eager_worst:.2e})"
        )


def compare(actual: Tensor, eager: Tensor, reference: Tensor) -> Comparison:
    """Compares a result and eager's with the float64 reference. Non-finite elements must agree exactly."""
    eps = torch.finfo(actual.dtype).eps if actual.dtype.is_floating_point else 0.0
    actual, eager, reference = (t.detach().double().cpu() for t in (actual, eager, reference))
    if actual.shape != reference.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(reference.shape)}")
    finite = torch.isfinite(reference) & torch.isfinite(eager)
    special = ~finite
    if not torch.equal(actual[special].nan_to_num(7.0, 8.0, 9.0), eager[special].nan_to_num(7.0, 8.0, 9.0)):
        raise AssertionError("infinities or NaNs differ from eager's")
    actual, eager, reference = actual[finite], eager[finite], reference[finite]
    if not reference.numel():
        return Comparison(0.0, 0.0, 0.0, 0.0, eps, 0)
    size, largest = reference.square().mean().sqrt().item(), reference.abs().max().item()
    size, largest = size or 1.0, largest or 1.0
    difference, eager_difference = (actual - reference).abs(), (eager - reference).abs()
    return Comparison(
        difference.square().mean().sqrt().item() / size,
        eager_difference.square().mean().sqrt().item() / size,
        difference.max().item() / largest,
        eager_difference.max().item() / largest,
        eps,
        reference.numel(),
    )


def mean(comparisons: list[Comparison]) -> Comparison:
    """Returns the mean of comparisons over several draws of the same call. A single draw's largest error is random."""
    errors = (
        sum(getattr(c, name) for c in comparisons) / len(comparisons)
        for name in ("rms", "eager_rms", "worst", "eager_worst")
    )
    return Comparison(*errors, comparisons[0].eps, sum(c.count for c in comparisons))
