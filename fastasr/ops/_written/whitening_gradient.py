# SPDX-License-Identifier: Apache-2.0
# `make op OP=whitening_gradient` writes this file from fastasr/ops/whitening_gradient.py: change that one.
"""The gradient of Zipformer's Whiten: that of x, changed if the metric w of x reaches the limit; and whether w is below"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._runtime import BOOL, MASKS, laid_out, listed, make, promoted
from fastasr.ops.whitening_gradient import _check, _launch
from fastasr.ops.whitening_gradient import whitening_gradient as formula

op = OPS["whitening_gradient"]
family = op.family


class Arguments(NamedTuple):
    grad: Tensor
    x: Tensor
    num_groups: int
    limit: float | None = None
    grad_scale: float | None = None
    limits: Tensor | None = None
    act: Tensor | None = None
    padding_mask: Tensor | None = None


# --------------------------------------------------------------------------- the public function
def whitening_gradient(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    limit: float | None = None,
    grad_scale: float | None = None,
    limits: Tensor | None = None,
    act: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of Zipformer's Whiten: that of x, changed if the metric w of x reaches the limit; and whether w is
    below. Not differentiable.

    Args:
        grad, x: the same shape, with at least one dimension, channels last. float32, bfloat16, float16 or float64.
        num_groups: groups of channels, G.
        limit: the value of w from which on the gradient is changed.
        grad_scale: the size of the change relative to ``grad``.
        limits: the two numbers on the device of x, in place of the numbers above.
        act: one number on the device of x. If it is 0, the results are ``grad`` unchanged and False.
        padding_mask: x's shape without channels, bool; True: the frame has no part in w and |g|, and y is ``grad``
            there.
    Returns:
        A tensor of grad's shape and dtype, computed in float32 or better, rounded once; and a bool tensor without
        dimensions. No kernel for CUDA waits for the device.
    Raises:
        TypeError: grad or x is not a floating tensor.
        ValueError: shapes or devices do not match; num_groups does not divide the channels, or there are none; limits
            are missing or given twice.
    """
    check(grad, x, num_groups, limit, grad_scale, limits, act, padding_mask)
    if is_compiling() or not (
        type(grad) in PLAIN
        and type(x) in PLAIN
        and (limits is None or type(limits) in PLAIN)
        and (act is None or type(act) in PLAIN)
        and (padding_mask is None or type(padding_mask) in PLAIN)
    ):
        return traced(grad, x, num_groups, limit, grad_scale, limits, act, padding_mask)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(grad, x, num_groups, limit, grad_scale, limits, act, padding_mask))
    kernels = family.kernels(grad, x, limits)
    if kernels is None:
        return laid_out(op, formula(grad, x, num_groups, limit, grad_scale, limits, act, padding_mask))
    try:
        y, white = run_kernels(kernels, grad, x, num_groups, limit, grad_scale, limits, act, padding_mask)
    except Unlaunchable as error:
        family.give_up(error, grad, x, limits)
        return formula(grad, x, num_groups, limit, grad_scale, limits, act, padding_mask)
    return y, white


def check(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    limit: float | None,
    grad_scale: float | None,
    limits: Tensor | None,
    act: Tensor | None,
    padding_mask: Tensor | None,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(num_groups) is not int:
        op.wrong_int("num_groups", num_groups)
    if not (num_groups >= 1):
        op.fail("num_groups", "at least 1", num_groups)
    if limit is not None and type(limit) is not float:
        op.wrong_float("limit", limit)
    if grad_scale is not None and type(grad_scale) is not float:
        op.wrong_float("grad_scale", grad_scale)
    if not isinstance(grad, Tensor) or grad.dtype not in FLOATING or grad.layout is not torch.strided:
        op.wrong_tensor("grad", grad)
    shape, right = grad.shape, False
    if len(shape) >= 1:
        S = shape[:-1]
        D = shape[-1]
        right = True
    if not right:
        op.wrong_shape("grad", grad, listed("...", "D"))
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    if x.shape != (*S, D):
        op.wrong_shape("x", x, listed(*S, D))
    if x.device != grad.device:
        op.wrong_device("x", x, "grad", grad)
    if limits is not None:
        if (
            not isinstance(limits, Tensor)
            or limits.dtype not in FLOATING
            or limits.layout is not torch.strided
        ):
            op.wrong_tensor("limits", limits)
        if limits.shape != (2,):
            op.wrong_shape("limits", limits, listed(2))
        if limits.device != grad.device:
            op.wrong_device("limits", limits, "grad", grad)
    if act is not None:
        if not isinstance(act, Tensor) or act.dtype not in MASKS or act.layout is not torch.strided:
            op.wrong_tensor("act", act, "a bool or floating tensor")
        if act.requires_grad:
            op.fail("act", "a constant", "a tensor that requires a gradient")
        if act.shape != () and act.shape != (1,):
            op.wrong_shape("act", act, f"{listed()} or {listed(1)}")
        if act.device != grad.device:
            op.wrong_device("act", act, "grad", grad)
    if padding_mask is not None:
        if (
            not isinstance(padding_mask, Tensor)
            or padding_mask.dtype not in BOOL
            or padding_mask.layout is not torch.strided
        ):
            op.wrong_tensor("padding_mask", padding_mask, "a bool tensor")
        if padding_mask.shape != (*S,):
            op.wrong_shape("padding_mask", padding_mask, listed(*S))
        if padding_mask.device != grad.device:
            op.wrong_device("padding_mask", padding_mask, "grad", grad)
    _check(op, make(Arguments, (grad, x, num_groups, limit, grad_scale, limits, act, padding_mask)))


def traced(grad, x, num_groups, limit, grad_scale, limits, act, padding_mask):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("whitening_gradient", grad, x, limits):
        return formula(grad, x, num_groups, limit, grad_scale, limits, act, padding_mask)
    y, white = operator(grad, x, num_groups, limit, grad_scale, limits, act, padding_mask)
    return y, white


def run_kernels(kernels, grad, x, num_groups, limit, grad_scale, limits, act, padding_mask):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(grad)
    white_dtype = torch.bool
    y, white = _launch(
        op, kernels, make(Arguments, (grad, x, num_groups, limit, grad_scale, limits, act, padding_mask,)),
        y_dtype, False,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if white.dtype is not white_dtype:
        white = white.to(white_dtype)
    return y, white


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.grad), torch.bool)


# --------------------------------------------------------------------------- the registered operator
def fake(grad, x, num_groups, limit=None, grad_scale=None, limits=None, act=None, padding_mask=None):
    S = grad.shape[:-1]
    D = grad.shape[-1]
    return torch.empty((*S, D), dtype=promoted(grad), device=grad.device), torch.empty(
        (), dtype=torch.bool, device=grad.device
    )


op.serve(
    whitening_gradient,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        results=("y", "white"),
        deciding=("grad", "x", "limits"),
        materialize=False,
    ),
)
operator = register_op(
    op,
    "whitening_gradient(Tensor grad, Tensor x, SymInt num_groups, float? limit=None, float? "
    "grad_scale=None, Tensor? limits=None, Tensor? act=None, Tensor? padding_mask=None) -> (Tensor, "
    "Tensor)",
)
