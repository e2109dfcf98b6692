# SPDX-License-Identifier: Apache-2.0
"""Gradients of one call of an op, with the caller's own tensors: ``fastasr.testing.gradcheck``.

In float64 the formula's gradients are compared with finite differences. The op's values and gradients in its own dtype,
on its own device, are then compared with those of float64 by the numerical contract (fastasr/testing/tolerance.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr.ops import _dispatch
from fastasr.testing.checks import _drawing_like
from fastasr.testing.declared import declared
from fastasr.testing.seeds import seed_torch, seeded
from fastasr.testing.table import Make, OpTable, flat, table, with_tensors
from fastasr.testing.tolerance import Comparison, compare, judged

# A step of 1e-8 moves that share of the numbers before a ReLU across its kink, and the slope errs by the root, 1e-4.
# Float64's rounding errs by less, unless gradients cancel or numbers are small: longer steps are for these cases.
STEPS, DIFFERENCES = (1e-8, 1e-6, 1e-4), 1e-3
# The difference of two calls cannot show less than this share of the outputs.
ROUNDINGS = 16 * torch.finfo(torch.float64).eps
# Slopes are taken near the call, where no number lies on a kink: sums of 16-bit numbers are often exactly 0.
NEAR = 1e-3
JITTER = 8.0  # Further draws move the numbers of a call by this many units in the last place.
COLUMNS = ("", "rms error", "allowed", "eager's", "worst", "allowed", "eager's", "differences", "")


@dataclass(frozen=True)
class Line:
    """The findings about the values, or about one gradient.

    comparison: its errors against float64, relative to its size, or None where they could not be compared.
    differences: the error of the formula's gradient in float64 against finite differences. verdict: "ok", the
    reason for leaving a gradient out, or "FAILED" and how.
    """

    what: str
    comparison: Comparison | None
    differences: float | None
    verdict: str

    @property
    def ok(self) -> bool:
        return not self.verdict.startswith("FAILED")

    def cells(self) -> tuple[str, ...]:
        numbers: list[float | None] = [None] * 6
        if self.comparison is not None:
            c, (rms, worst) = self.comparison, self.comparison.allowed
            numbers = [c.rms, rms, c.eager_rms, c.worst, worst, c.eager_worst]
        shown = ("-" if n is None else f"{n:.1e}" for n in (*numbers, self.differences))
        return self.what, *shown, self.verdict


@dataclass(frozen=True)
class GradientReport:
    """The result of ``gradcheck``: a line about the values and one about each gradient. ``str()`` is the table."""

    op: str
    dtype: str
    device: str
    backend: str
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        return all(line.ok for line in self.lines)

    def __str__(self) -> str:
        rows = [COLUMNS, *(line.cells() for line in self.lines)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        head = f"{self.op}: {self.dtype} on {self.device}, served by {self.backend}; errors against float64"
        return "\n".join((head, *(_aligned(row, widths) for row in rows)))


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    numbers = (f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
    return "  ".join((f"{row[0]:<{widths[0]}}", *numbers, row[-1])).rstrip()


def gradcheck(op: str | Callable, /, **arguments: Any) -> GradientReport:
    """Checks values and gradients of one call of an op, prints a table and returns it. The arguments stay as they are.

    The gradients are those of a random cotangent. Where an error exceeds eager's, the median over further draws
    decides, which move the numbers of the call by a few units in the last place.

    Args:
        op: a function of ``fastasr.ops``, or its name.
        arguments: the op's keyword arguments; the check uses the dtype and device of the tensors.
    Returns:
        GradientReport: ``.ok`` says whether all is as near to float64 as eager PyTorch is, ``.lines`` what was found.
    Raises:
        ValueError, TypeError: an unknown op, or arguments that the op refuses.
    """
    report = examine(op, arguments)
    print(report)
    return report


def examine(called: str | Callable, arguments: dict) -> GradientReport:
    """Returns what ``gradcheck`` prints."""
    of_op = table(called)
    op = declared(ops.OPS[of_op.op])
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    leader: Any = given.get(op.leader.name)
    devices = [leader.device] if leader is not None and leader.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        call = _Call(of_op, arguments, [a.name for a in op.differentiable if a.name in given])
        lines = tuple(call.lines())
    backend, reason = _dispatch.explain_choice(op.op.family.name, leader.device, leader.dtype)
    dtype = str(leader.dtype).removeprefix("torch.")
    served = f"the {backend} kernels" if not reason else f"eager ({reason})"
    return GradientReport(of_op.op, dtype, str(leader.device), served, lines)


@dataclass(frozen=True)
class _Results:
    """The outputs of a call, which of them have gradients, their cotangents, and the gradients by argument."""

    outputs: list[Tensor]
    graded: list[bool]
    cotangents: list[Tensor]
    gradients: dict[str, Tensor | None]

    @property
    def finite(self) -> bool:
        return all(y.isfinite().all() for y, graded in zip(self.outputs, self.graded, strict=True) if graded)


@dataclass(frozen=True)
class _Call:
    """A call of an op and the names of its arguments that have gradients."""

    table: OpTable
    arguments: dict
    names: list[str]

    def lines(self) -> Iterator[Line]:
        found = dict(self.compared(0, False))
        doubtful = [what for what, c in found.items() if isinstance(c, Comparison) and not c.ok]
        failed = judged(self._comparisons, 1) if doubtful else {}
        differences = self.differences()
        for what, comparison in found.items():
            error = differences.get(what)
            if isinstance(comparison, str):
                yield Line(what, None, error, comparison)
                continue
            verdict = "ok, by the median of several draws" if what in doubtful else "ok"
            if what in failed:
                comparison, verdict = failed[what], "FAILED: less exact than eager"
            elif error is not None and not error <= DIFFERENCES:
                verdict = "FAILED: the formula's gradient is not its slope"
            yield Line(what, comparison, error, verdict)

    def _comparisons(self, draw: int, single: bool) -> Iterator[tuple[str, Comparison]]:
        return ((what, c) for what, c in self.compared(draw, single) if isinstance(c, Comparison))

    def compared(self, draw: int, single: bool) -> Iterator[tuple[str, Comparison | str]]:
        """Yields how values and gradients compare with eager and float64, or why they cannot be compared.

        Args:
            draw: 0 for the call itself; other draws move its numbers by a rounding.
            single: compare float32 instead of float64.
        """
        arguments = self.arguments
        if draw:
            arguments = with_tensors(arguments, lambda name, t: _moved(t, f"{name} {draw}"))
        if single:
            arguments = with_tensors(arguments, lambda _, t: t.float() if t.dtype is torch.float64 else t)
        ours = self.run(self.table.function, arguments, draw)
        eager = self.run(self.table.definition, arguments, draw, ours.cotangents)
        with _drawing_like(flat(tuple(eager.outputs)).dtype):
            exact = self.run(self.table.definition, _wide(arguments), draw, ours.cotangents)
        dtypes = [[str(y.dtype) for y in results.outputs] for results in (ours, eager)]
        if dtypes[0] == dtypes[1]:
            yield "values", _compared(*(flat(tuple(results.outputs)) for results in (ours, eager, exact)))
        else:
            yield "values", f"FAILED: {', '.join(dtypes[0])}; eager gives {', '.join(dtypes[1])}"
        for name, reference in exact.gradients.items():
            what, grad, theirs = f"gradient of {name}", ours.gradients[name], eager.gradients[name]
            if not exact.finite:
                yield what, "left out: some values are not finite"
            elif grad is not None and theirs is not None and reference is not None:
                yield what, _compared(grad, theirs, reference)
            elif reference is not None:
                yield what, "FAILED: there is none"

    def run(
        self, f: Callable, arguments: dict, draw: int = 0, cotangents: list[Tensor] | None = None
    ) -> _Results:
        """Runs a call and its gradients, for random cotangents where none are given."""
        leaves = arguments | {name: arguments[name].detach().requires_grad_() for name in self.names}
        outputs = _outputs(f, leaves)
        if cotangents is None:
            cotangents = [_normal(y, f"cotangent {draw} {i}") for i, y in enumerate(outputs)]
        graded = [y.requires_grad for y in outputs]
        gradients: Sequence[Tensor | None] = [None] * len(self.names)
        if any(graded):
            gradients = torch.autograd.grad(
                [y for y in outputs if y.requires_grad],
                [leaves[name] for name in self.names],
                [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True) if y.requires_grad],
                allow_unused=True,
            )
        named = dict(zip(self.names, gradients, strict=True))
        return _Results([y.detach() for y in outputs], graded, cotangents, named)

    def differences(self) -> dict[str, float]:
        """Returns the error of each gradient of the formula in float64 beside the slope in a direction, relative to the
        gradient's norm, the scale on which such slopes vary. A gradient has none if an option adds to
        gradients alone, or if values are not finite.
        """
        if any(self.arguments.get(name) for name in self.table.penalties):
            return {}
        formula, wide = self.table.definition, _wide(self.arguments)
        wide = with_tensors(wide, lambda name, t: t + NEAR * _size(t) * _normal(t, f"near {name}"))
        exact = self.run(formula, wide)
        if not exact.finite:
            return {}
        found = {}
        for name, grad in exact.gradients.items():
            if grad is not None:
                size, error = _size(wide[name]) or 1.0, torch.inf
                for step in STEPS:
                    if error > DIFFERENCES:
                        error = min(error, self.off_its_slope(wide, name, step * size, exact))
                found[f"gradient of {name}"] = error
        return found

    @torch.no_grad()
    def off_its_slope(self, wide: dict, name: str, step: float, exact: _Results) -> float:
        """Returns the error of the gradient of one argument, by a central difference with this step."""
        grad: Any = exact.gradients[name]
        direction = _normal(wide[name], f"direction {name}")
        # It leads up the gradient too: straight across, a gradient of any length has the right slope.
        direction = direction * (grad * direction).sum().sign() + grad / (grad.norm().item() or 1.0)
        ahead, behind = (
            _outputs(self.table.definition, wide | {name: wide[name] + s * direction}) for s in (step, -step)
        )
        slope, size = 0.0, 0.0
        for a, b, y, c, graded in zip(
            ahead, behind, exact.outputs, exact.cotangents, exact.graded, strict=True
        ):
            if graded:
                slope += ((a - b) * c.double()).sum().item() / (2 * step)
                size += (y * c.double()).norm().item()
        unseen = ROUNDINGS * size / step / DIFFERENCES
        return abs(slope - (grad * direction).sum().item()) / ((grad.norm().item() + unseen) or 1.0)


def _outputs(f: Callable, arguments: dict) -> tuple[Tensor, ...]:
    seed_torch(seeded("call"))  # an op that draws (dropout) draws the same numbers in every call
    found = f(**arguments)
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _compared(actual: Tensor, eager: Tensor, reference: Tensor) -> Comparison | str:
    try:
        return compare(actual, eager, reference)
    except AssertionError as difference:
        return f"FAILED: {difference}"


def _wide(arguments: dict) -> dict:
    return with_tensors(arguments, lambda _, t: t.double())


def _normal(like: Tensor, seed: str) -> Tensor:
    return Make(like.dtype, str(like.device), seed).normal(*like.shape)


def _moved(t: Tensor, seed: str) -> Tensor:
    """Returns numbers that differ from t's by a few units in the last place."""
    noise = _normal(t.double(), seed)
    return (t.double() * (1 + JITTER * torch.finfo(t.dtype).eps * noise)).to(t.dtype)


def _size(t: Tensor) -> float:
    """Returns the root mean square, where numbers that are not finite count as 0; without numbers it is 0."""
    return t.nan_to_num(0.0, 0.0, 0.0).square().mean().nan_to_num().sqrt().item()
