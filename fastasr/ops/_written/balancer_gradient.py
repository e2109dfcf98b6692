# SPDX-License-Identifier: Apache-2.0
# `make op OP=balancer_gradient` writes this file from fastasr/ops/balancer_gradient.py: change that one.
"""The gradient of Zipformer's Balancer: that of x, changed so that its channels keep to the limits"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._runtime import BOOL, MASKS, NOT_MINE, laid_out, listed, make, promoted
from fastasr.ops.balancer_gradient import _check, _fast, _launch
from fastasr.ops.balancer_gradient import balancer_gradient as formula

op = OPS["balancer_gradient"]
family = op.family


class Arguments(NamedTuple):
    grad: Tensor
    x: Tensor
    min_mean: float | None = None
    max_mean: float | None = None
    min_rms: float | None = None
    max_rms: float | None = None
    grad_scale: float | None = None
    channel_dim: int = -1
    limits: Tensor | None = None
    act: Tensor | None = None
    padding_mask: Tensor | None = None


# --------------------------------------------------------------------------- the public function
def balancer_gradient(
    grad: Tensor,
    x: Tensor,
    min_mean: float | None = None,
    max_mean: float | None = None,
    min_rms: float | None = None,
    max_rms: float | None = None,
    grad_scale: float | None = None,
    channel_dim: int = -1,
    limits: Tensor | None = None,
    act: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """The gradient of Zipformer's Balancer: that of x, changed so that its channels keep to the limits. Not
    differentiable.

    Args:
        grad, x: the same shape, with at least one dimension. float32, bfloat16, float16 or float64.
        min_mean, max_mean: limits of a channel's mean over its standard deviation.
        min_rms, max_rms: limits of its root mean square.
        grad_scale: root mean square of the change relative to ``grad``.
        channel_dim: the dimension of the channels.
        limits: the five numbers on the device of x, in place of the numbers above.
        act: one number on the device of x. If it is 0, the result is ``grad`` unchanged.
        padding_mask: x's shape without channel_dim, bool; True: the frame has no part in the statistics, and the
            result is ``grad`` there.
    Returns:
        A tensor of grad's shape and dtype, computed in float32 or better, rounded once.
    Raises:
        TypeError: grad or x is not a floating tensor.
        ValueError: shapes or devices do not match; channel_dim is no dimension of x; limits are missing or given twice.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(grad) in PLAIN
        and grad.is_cpu
        and (dtype := grad.dtype)
        and type(x) in PLAIN
        and x.is_cpu
        and x.dtype is dtype
        and (limits is None or (type(limits) in PLAIN and limits.is_cpu and limits.dtype is dtype))
        and (
            act is None
            or (type(act) in PLAIN and act.is_cpu and act.dtype is dtype and not act.requires_grad)
        )
        and (padding_mask is None or (type(padding_mask) in PLAIN and padding_mask.is_cpu))
        and (min_mean is None or type(min_mean) is float)
        and (max_mean is None or type(max_mean) is float)
        and (min_rms is None or type(min_rms) is float)
        and (max_rms is None or type(max_rms) is float)
        and (grad_scale is None or type(grad_scale) is float)
        and type(channel_dim) is int
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            return _fast(
                kernels, False, grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim,
                limits, act, padding_mask,
            )  # fmt: skip
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(
                grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act,
                padding_mask,
            )  # fmt: skip
            raise
    check(grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act, padding_mask)
    if is_compiling() or not (
        type(grad) in PLAIN
        and type(x) in PLAIN
        and (limits is None or type(limits) in PLAIN)
        and (act is None or type(act) in PLAIN)
        and (padding_mask is None or type(padding_mask) in PLAIN)
    ):
        return traced(
            grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act, padding_mask
        )
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act,
            padding_mask),
        )  # fmt: skip
    kernels = family.kernels(grad, x, limits)
    if kernels is None:
        return laid_out(
            op, formula(grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act,
            padding_mask),
        )  # fmt: skip
    try:
        y = run_kernels(
            kernels, grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act,
            padding_mask,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, grad, x, limits)
        return formula(
            grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act, padding_mask
        )
    return y


def check(
    grad: Tensor,
    x: Tensor,
    min_mean: float | None,
    max_mean: float | None,
    min_rms: float | None,
    max_rms: float | None,
    grad_scale: float | None,
    channel_dim: int,
    limits: Tensor | None,
    act: Tensor | None,
    padding_mask: Tensor | None,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if min_mean is not None and type(min_mean) is not float:
        op.wrong_float("min_mean", min_mean)
    if max_mean is not None and type(max_mean) is not float:
        op.wrong_float("max_mean", max_mean)
    if min_rms is not None and type(min_rms) is not float:
        op.wrong_float("min_rms", min_rms)
    if max_rms is not None and type(max_rms) is not float:
        op.wrong_float("max_rms", max_rms)
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
        if limits.shape != (5,):
            op.wrong_shape("limits", limits, listed(5))
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
        if padding_mask.device != grad.device:
            op.wrong_device("padding_mask", padding_mask, "grad", grad)
    if type(channel_dim) is not int:
        op.wrong_int("channel_dim", channel_dim)
    if not (-x.dim() <= channel_dim < x.dim()):
        op.wrong_dimension("channel_dim", channel_dim, x)
    _check(
        op, make(Arguments, (grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits,
        act, padding_mask,)),
    )  # fmt: skip


def traced(grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act, padding_mask):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("balancer_gradient", grad, x, limits):
        return formula(
            grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act, padding_mask
        )
    return operator(
        grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act, padding_mask
    )


def run_kernels(
    kernels, grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim, limits, act, padding_mask
):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(grad)
    y = _launch(
        op, kernels, make(Arguments, (grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim,
        limits, act, padding_mask,)), y_dtype, False,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.grad),)


# --------------------------------------------------------------------------- the registered operator
def fake(
    grad, x, min_mean=None, max_mean=None, min_rms=None, max_rms=None, grad_scale=None, channel_dim=-1,
    limits=None, act=None, padding_mask=None,
):  # fmt: skip
    S = grad.shape[:-1]
    D = grad.shape[-1]
    return torch.empty((*S, D), dtype=promoted(grad), device=grad.device)


op.serve(
    balancer_gradient,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        results=("y",),
        deciding=("grad", "x", "limits"),
        materialize=False,
    ),
)
operator = register_op(
    op,
    "balancer_gradient(Tensor grad, Tensor x, float? min_mean=None, float? max_mean=None, float? "
    "min_rms=None, float? max_rms=None, float? grad_scale=None, SymInt channel_dim=-1, Tensor? "
    "limits=None, Tensor? act=None, Tensor? padding_mask=None) -> Tensor",
)
