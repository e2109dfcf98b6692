# SPDX-License-Identifier: Apache-2.0
"""The numerical contract: a kernel's error against float64 is never above eager's own.

Both are compared with the definition evaluated in float64 on the same numbers. 10 % is allowed for rounding noise, and
in addition the cost of correct rounding, since eager may happen to be exact: 0.3 units in the last place on average
(0.5 for a handful of elements), one at the worst element. The reference of float64 results has rounding errors itself:
32 units are allowed there, and a result that exceeds the bound is compared with eager's error in float32, counted in
units, instead of eager's error in float64.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RATIO = 1.1
# Eager may be exact by chance in a single draw, and errors of few numbers are random. A failing result is therefore
# judged by the median over this many draws and, if it fails again, over the next number, with the same tolerance. No
# draw's error may exceed the largest of eager's by more than this factor.
JUDGED_DRAWS = (8, 64, 512)
FAR = 16.0
# The last number is for errors that exceed the tolerance by at most this factor, or by this many standard deviations:
# medians over 64 draws vary by a tenth, and by a fifth where one rounding decides.
NEAR, CHANCE = 1.2, 3.0


@dataclass(frozen=True)
class Comparison:
    """The errors of a result and of eager, relative to the size of the float64 reference."""

    rms: float
    eager_rms: float
    worst: float
    eager_worst: float
    eps: float
    count: int

    def within(self, factor: float) -> bool:
        """Says whether the errors are at most those allowed, times this factor."""
        return replace(self, rms=self.rms / factor, worst=self.worst / factor).ok

    @property
    def allowed(self) -> tuple[float, float]:
        """Returns the largest errors that the contract allows, as a root mean square and at the worst element."""
        mean_floor, worst_floor = (32.0, 32.0) if self.eps < 1e-12 else (0.3 if self.count > 16 else 0.5, 1.0)
        return (
            RATIO * self.eager_rms + mean_floor * self.eps,
            RATIO * self.eager_worst + worst_floor * self.eps,
        )

    @property
    def ok(self) -> bool:
        rms, worst = self.allowed
        return self.rms <= rms and self.worst <= worst

    def __str__(self) -> str:
        return (
            f"rms error {self.rms:.2e} (eager {self.eager_rms:.2e}), "
            f"worst {self.worst:.2e} (eager {self.eager_worst:.2e})"
        )


def compare(actual: Tensor, eager: Tensor, reference: Tensor) -> Comparison:
    """Compares a result and eager's with the float64 reference. Non-finite elements must agree exactly."""
    eps = torch.finfo(actual.dtype).eps if actual.dtype.is_floating_point else 0.0
    actual, eager, reference = (t.detach().to(reference.device).double() for t in (actual, eager, reference))
    if actual.shape != reference.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(reference.shape)}")
    finite = torch.isfinite(reference) & torch.isfinite(eager)
    same = True
    if not finite.all():
        special = ~finite
        same = torch.equal(
            actual[special].nan_to_num(7.0, 8.0, 9.0), eager[special].nan_to_num(7.0, 8.0, 9.0)
        )
        actual, eager, reference = actual[finite], eager[finite], reference[finite]
    if not same or not actual.isfinite().all():
        raise AssertionError("infinities or NaNs differ from eager's")
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


def judged(
    compared: Callable[[int, bool], Iterable[tuple[str, Comparison]]],
    draws: int,
    more: Sequence[int] = JUDGED_DRAWS,
) -> dict[str, Comparison]:
    """Returns the comparisons that fail, by name, over ``draws`` draws of a call, and over ``more`` if any fails.

    ``compared(draw, single)`` compares one draw of it, with float32 instead of float64 if ``single``.
    """
    found: dict[str, list[Comparison]] = {}
    done = 0
    for count in sorted({draws, *(n for n in more if draws < n)}):
        for draw in range(done, count):
            comparisons = dict(compared(draw, False))
            if any(c.eps < 1e-12 and not c.ok for c in comparisons.values()):
                units = dict(compared(draw, True))
                comparisons = {name: _like(c, units.get(name, c)) for name, c in comparisons.items()}
            for name, comparison in comparisons.items():
                found.setdefault(name, []).append(comparison)
        done = count
        failed = {name: wrong for name, comparisons in found.items() if (wrong := _fails(comparisons))}
        if not failed:
            break
        if count == JUDGED_DRAWS[-2] and not all(c.within(_near(found[name])) for name, c in failed.items()):
            break
    return failed


def _like(c: Comparison, single: Comparison) -> Comparison:
    """Returns c with eager's errors of ``single``, in units of the last place."""
    units = c.eps / single.eps
    return replace(c, eager_rms=single.eager_rms * units, eager_worst=single.eager_worst * units)


def _over_draws(comparisons: list[Comparison], middle: Callable) -> Comparison:
    c = comparisons[0]
    fields = ("rms", "eager_rms", "worst", "eager_worst")
    return replace(c, **{name: middle(getattr(c, name) for c in comparisons) for name in fields})


def _near(comparisons: list[Comparison]) -> float:
    """Returns the factor by which the medians over draws may exceed the tolerance by chance."""

    def variance(name: str) -> float:  # of the median, relative to it
        low, middle, high = statistics.quantiles((getattr(c, name) for c in comparisons), n=4)
        return (0.93 * (high - low) / middle) ** 2 / len(comparisons) if middle else 0.0

    pairs = (("rms", "eager_rms"), ("worst", "eager_worst"))
    deviation = max(math.sqrt(variance(ours) + variance(eager)) for ours, eager in pairs)
    return max(NEAR, 1 + CHANCE * deviation)


def _fails(comparisons: list[Comparison]) -> Comparison | None:
    """Returns what to report, or None where the median over draws is within the tolerance and no draw is far off.

    Medians, because errors of sums that cancel and of divisions by small numbers have no mean.
    """
    middle, largest = (_over_draws(comparisons, f) for f in (statistics.median, max))
    if not middle.ok:
        return middle
    return None if largest.within(FAR) else largest
