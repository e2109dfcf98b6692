# SPDX-License-Identifier: Apache-2.0
"""Decides whether the tensors that fastasr computed pass for those of upstream's code.

A tensor passes if its error against upstream's code in fp64 is at most

* twice upstream's own error, or
* a few units in the last place of the largest result, for each swapped module on the way to it, or thousands in fp64,
  where upstream's own error cannot be measured, or
* a few times the effect of rounding the inputs once, which sums with cancellation need, or
* twice upstream's largest error over inputs that differ in the last bit: Whiten's gradient loses any number of digits
  where the covariance is nearly white, and each order of its sums loses different ones.

The error of a result that is zero except for rounding, such as the gradient of a key's bias, is taken relative to the
largest of the other results.

Let u be upstream's error and a the allowed units in the last place. If fastasr's result differs from upstream's by at
most a / 2, then fastasr's error is at most u + a / 2, which is at most 2 u or at most a. No fp64 run can change this
verdict, so :func:`near` gives it without one.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NOISE = 2.0  # allowed multiple of upstream's own error, since the largest error of one call is noisy
_ULPS = 8  # allowed units in the last place of the largest result, for each swapped module on the way to it
_FP64_ULPS = 4096  # the same in fp64, where upstream's own errors are unknown: torch's batch norm has had 146
# relative to the largest result: below it, a sum of the reference is zero except for rounding
_CANCELLED = 1e-12
_ROUNDINGS = 4  # allowed multiple of the effect of rounding the inputs once
_PLAIN_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


# named tensors of one run, None where there is none
Named = list[tuple[str, Tensor | None]]
Reference = Any  # the class of replay.py, which imports this module


class Part(NamedTuple):
    """The verdict on one tensor: fastasr's error, upstream's, and the error that passes, relative to the largest
    magnitude of the tensor or, if it is ``cancelled``, of all tensors."""

    error: float
    upstream: float
    allowed: float
    cancelled: bool


class Verdict:
    """Compares lists of named tensors. ``failure`` is a reason or None; ``parts`` has a Part, or None, per tensor."""

    def __init__(self, kind: str, ours: Named, upstream: Named, reference: Reference) -> None:
        self.kind = kind
        self.failure: str | None = None
        self.parts: list[Part | None] = []
        exact = reference.of(kind)
        known = upstream if exact is None else exact
        self._largest = max((_finite_largest(t) for _, t in known if t is not None), default=0.0)
        for index, ((name, mine), (_, theirs)) in enumerate(zip(ours, upstream, strict=False)):
            truth = None if exact is None else exact[index][1]
            self.parts.append(None)
            self.failure = self._compare(name, mine, theirs, truth, reference, index)
            if self.failure is not None:
                return
        if len(ours) != len(upstream):
            self.failure = f"fastasr gives {len(ours)} {kind}, upstream {len(upstream)}"

    @property
    def worst(self) -> Part | None:
        """Returns the Part with the largest error, or None."""
        return max(filter(None, self.parts), default=None)

    def _compare(
        self,
        name: str,
        mine: Tensor | None,
        theirs: Tensor | None,
        truth: Tensor | None,
        reference: Reference,
        index: int,
    ) -> str | None:
        if mine is None or theirs is None:
            if mine is theirs:
                return None
            return f"{name} is {'missing' if mine is None else 'unexpected'}"
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return (
                f"{name} is {mine.dtype} {tuple(mine.shape)}, "
                f"upstream's is {theirs.dtype} {tuple(theirs.shape)}"
            )
        if mine.numel() == 0:
            return None
        if not mine.is_floating_point():
            return None if torch.equal(mine, theirs) else f"{name} differs from upstream's"
        if truth is not None and truth.shape != theirs.shape:
            truth = None
        errors = _errors(mine, theirs, truth)
        finite = all(map(math.isfinite, errors))
        if not finite:
            both = torch.isfinite(theirs) if truth is None else torch.isfinite(theirs) & torch.isfinite(truth)
            if not torch.equal(torch.isfinite(mine) & both, both):
                return f"{name} is not finite where upstream's is"
            mine, theirs = torch.where(both, mine, 0), torch.where(both, theirs, 0)
            truth = None if truth is None else torch.where(both, truth, 0)
            errors = _errors(mine, theirs, truth)
        return self._judge(name, *errors, truth is not None, theirs.dtype, finite, reference, index)

    def _judge(
        self,
        name: str,
        error: float,
        upstream_error: float,
        scale: float,
        against_fp64: bool,
        dtype: torch.dtype,
        finite: bool,
        reference: Reference,
        index: int,
    ) -> str | None:
        eps, largest = torch.finfo(dtype).eps, self._largest
        cancelled = scale <= (_CANCELLED if against_fp64 else _ULPS * eps) * largest
        scale = largest if cancelled else scale
        if against_fp64:
            limit = max(_NOISE * upstream_error, reference.count * _ulps(reference.dtype) * eps * scale)
            if error > limit:
                limit = max(limit, _ROUNDINGS * reference.rounding_effect(self.kind)[index])
            if error > limit and finite:
                limit = max(limit, _NOISE * reference.nearby_error(self.kind, index))
        else:
            limit = _PLAIN_TOLERANCE[reference.dtype] * scale
        scale = scale or 1.0
        part = Part(error / scale, upstream_error / scale, limit / scale, cancelled)
        self.parts[index] = part
        if error > limit:
            return (
                f"error of {name} is {part.error:.1e}, upstream's is {part.upstream:.1e} "
                f"and at most {part.allowed:.1e} passes"
            )
        return None


def near(
    ours: Named, upstream: Named, count: int, dtype: torch.dtype, like: Verdict
) -> list[Part | None] | None:
    """Returns the parts of a Verdict that no run in fp64 can change, or None if one could.

    ours, upstream: lists of named tensors. count: the number of swapped modules on the way to them. dtype: the type of
        least precision among the tensors from which they were computed.
    like: the Verdict of a like module, in fp64. Its errors of upstream's code stand for those that are not measured,
        and its ``cancelled`` tensors for those that are zero except for rounding.
    """
    if not len(ours) == len(upstream) == len(like.parts):
        return None
    parts: list[Part | None] = []
    scales = [0.0 if t is None or not t.is_floating_point() else largest(t) for _, t in upstream]
    most = max(scales, default=0.0)
    for (_, mine), (_, theirs), scale, its in zip(ours, upstream, scales, like.parts, strict=True):
        parts.append(None)
        if mine is None or theirs is None or mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            if mine is not theirs:
                return None
        elif not mine.is_floating_point() or its is None or mine.numel() == 0:
            if not torch.equal(mine, theirs):
                return None
        else:
            difference = largest(mine.to(torch.promote_types(mine.dtype, torch.float32)) - theirs)
            eps = torch.finfo(mine.dtype).eps
            if its.cancelled and scale <= _ULPS * eps * most:
                scale = most
            half = count * _ulps(dtype) * eps / 2
            # The factor is (1 - half), because the scale is upstream's result instead of the exact one.
            limit = min(half * (1 - half), _PLAIN_TOLERANCE[dtype]) * scale
            if not difference <= limit < math.inf:  # NaN fails too.
                return None
            parts[-1] = its._replace(error=its.upstream + difference / (scale or 1.0))
    return parts


def _ulps(dtype: torch.dtype) -> int:
    return _FP64_ULPS if dtype is torch.float64 else _ULPS


def _errors(mine: Tensor, theirs: Tensor, truth: Tensor | None) -> tuple[float, float, float]:
    """Returns fastasr's error, upstream's, and the scale: against ``truth`` or, without it, against upstream's."""
    if truth is None:
        return largest(mine.double() - theirs), 0.0, largest(theirs)
    return largest(mine - truth), largest(theirs - truth), largest(truth)


def _finite_largest(tensor: Tensor) -> float:
    if not tensor.is_floating_point():
        return 0.0
    found = largest(tensor)
    return found if math.isfinite(found) else largest(torch.nan_to_num(tensor.double(), 0.0, 0.0, 0.0))


def largest(tensor: Tensor) -> float:
    """Returns the largest magnitude, NaN if an element is NaN, 0 for no elements."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return max(high.item(), -low.item())  # this order, so that zeros give 0 and not -0
