# SPDX-License-Identifier: Apache-2.0
r"""A linear layer whose input and result are clamped: y = clamp(act(clamp(clamp(x) Wᵀ))), with bounds on the device.

z = clamp(x, input) Wᵀ, y = clamp(act(clamp(z, output)), next), where ``next`` are the input bounds of the layer that
reads y: that layer then clamps nothing. With gradient g: dz = g ⊙ act'(clamp z), 0 where z or the activation is outside
its bounds, dx = dz W, 0 where x is outside, dW = dzᵀ clamp(x). A bound's gradient is the sum over the elements that it
replaces. At a bound gradients are those of the installed torch's ``torch.clamp`` (see ``HALVES``).

Upstream: ``Gemma4ClippableLinear`` of transformers, whose checkpoints hold the bounds.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _activation, _gemm
from fastasr.ops._activation import NUMBERS
from fastasr.ops._dispatch import Kernels
from fastasr.ops._op import Arguments, Needs, Op, Saved, op

Bounds = tuple[Any, Any]  # as kernels read them: numbers on the CPU, else tensors or None

# Until torch 2.13, clamp gives an element that equals its bound all of its gradient, and a NaN none. From 2.14 on half
# of the former belongs to a finite bound, unless both are equal, and a NaN has all of its own.
HALVES = torch.__version__ >= "2.14"  # compares versions, not strings


# --------------------------------------------------------------------------- kernels
def _bounds(kernels: Kernels, dtype: torch.dtype, low: Tensor | None, high: Tensor | None) -> Bounds:
    """Returns the bounds in this dtype. On the CPU they are read here, so that infinite ones cost no pass."""
    low, high = (b if b is None or b.dtype is dtype else b.to(dtype) for b in (low, high))
    if kernels.backend == "triton":
        return low, high
    return -math.inf if low is None else low.item(), math.inf if high is None else high.item()


def _are_idle(bounds: Bounds) -> bool:
    return bounds in ((None, None), (-math.inf, math.inf))


def _no_bounds(kernels: Kernels) -> Bounds:
    return (None, None) if kernels.backend == "triton" else (-math.inf, math.inf)


def _clamped(kernels: Kernels, x: Tensor, bounds: Bounds) -> Tensor:
    if _are_idle(bounds):
        return x
    return kernels.forward(x.contiguous(), *bounds, 0, *_no_bounds(kernels), False)


def _all_bounds(kernels: Kernels, a: Arguments) -> tuple[Bounds, Bounds, Bounds]:
    dtype = a.x.dtype
    return (
        _bounds(kernels, dtype, a.input_min, a.input_max),
        _bounds(kernels, dtype, a.output_min, a.output_max),
        _bounds(kernels, dtype, a.next_min, a.next_max),
    )


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    before, after, following = _all_bounds(kernels, a)
    z = _gemm.forward(_clamped(kernels, a.x, before), a.weight, None).contiguous()
    if not keep and a.activation == "identity" and _are_idle(after) and _are_idle(following):
        return z, z
    return kernels.forward(z, *after, NUMBERS[a.activation], *following, not keep), z


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor | None, ...]:
    before, after, following = _all_bounds(kernels, saved)
    grad, x, z, activation = grads[0].contiguous(), saved.x.contiguous(), saved.z, NUMBERS[saved.activation]
    none, absent = _no_bounds(kernels), (None, None)
    dz = kernels.backward(grad, z, *after, activation, *following, HALVES)
    of_input: Bounds = absent
    of_output: Bounds = absent
    of_next: Bounds = absent
    dx = None
    if needs.x or needs.input_min or needs.input_max:
        dx = _gemm.input_grad(dz, saved.weight).contiguous()
        if needs.input_min or needs.input_max:
            of_input = _of_bounds(dx, x, saved.input_min, saved.input_max)
        if not _are_idle(before):
            dx = kernels.backward(dx, x, *before, 0, *none, HALVES)
    if needs.output_min or needs.output_max:
        inside = kernels.backward(grad, _clamped(kernels, z, after), *none, activation, *following, HALVES)
        of_output = _of_bounds(inside, z, saved.output_min, saved.output_max)
    if needs.next_min or needs.next_max:
        y = kernels.forward(z, *after, activation, *none, False)
        of_next = _of_bounds(grad, y, saved.next_min, saved.next_max)
    dweight = _gemm.weight_grad(dz, _clamped(kernels, x, before)) if needs.weight else None
    return dx, dweight, *of_input, *of_output, *of_next


def _of_bounds(grad: Tensor, x: Tensor, low: Tensor | None, high: Tensor | None) -> Bounds:
    """Returns the gradients of the bounds of x. Where they cross, the upper one replaces all elements."""
    low, high = (b if b is None else b.to(x.dtype) for b in (low, high))

    def total(replaced: Tensor, equal: Tensor) -> Tensor:
        part = torch.where(replaced & ~equal, grad, 0.0)
        if HALVES:
            part = torch.where(equal, 0.5 * grad, part)
        return part.sum(dtype=torch.promote_types(grad.dtype, torch.float32))

    if low is None or high is None:  # from torch 2.14 on a NaN counts for its only bound too
        below = None if low is None else total(~(x > low) if HALVES else x < low, x == low)
        above = None if high is None else total(~(x < high) if HALVES else x > high, x == high)
        return below, above
    differ = low < high  # if equal, the lower bound has no gradient until torch 2.13
    below = total((x < low) & (low <= high if HALVES else differ), (x == low) & differ)
    return below, total((x > high) | (high < low), (x == high) & differ)


# --------------------------------------------------------------------------- the op
def _clamp(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    if low is None and high is None:
        return x
    return x.clamp(*(b if b is None else b.to(x.dtype) for b in (low, high)))


@op(
    "cpu triton",
    one_dtype="x weight",
    keeps={"z": Annotated[Tensor, "*S N", "y"]},
    launch=_launch,
    gradients=_gradients,
    fast=False,
)
def clamped_linear(
    x: Annotated[Tensor, "*S K"],
    weight: Annotated[Tensor, "N K"],
    activation: _activation.Activation = "identity",
    *,
    input_min: Annotated[Tensor, ""] | None = None,
    input_max: Annotated[Tensor, ""] | None = None,
    output_min: Annotated[Tensor, ""] | None = None,
    output_max: Annotated[Tensor, ""] | None = None,
    next_min: Annotated[Tensor, ""] | None = None,
    next_max: Annotated[Tensor, ""] | None = None,
) -> Annotated[Tensor, "*S N", "x"]:
    """A linear layer without a bias, clamped twice, and its activation: clamp(act(clamp(clamp(x) weightᵀ))).

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K); x's dtype, except under autocast, which casts both.
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
        input_min, input_max: the bounds of x, tensors without dimensions on its device, read there in x's dtype, or
            None.
        output_min, output_max: the bounds of the product.
        next_min, next_max: the bounds of the activation.
    Returns:
        (..., N).
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; activation is not one of these.
    """
    z = _clamp(F.linear(_clamp(x, input_min, input_max), weight), output_min, output_max)
    return _clamp(_activation.FUNCTIONS[activation](z), next_min, next_max)
