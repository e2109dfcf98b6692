# SPDX-License-Identifier: Apache-2.0
# `make op OP=ema_scan` writes this file from fastasr/ops/ema_scan.py: change that one.
"""Mega's multi-head damped moving average as a linear-time scan, with states"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, is_grad_enabled, promote_types
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served, widest
from fastasr.ops._layout import as_it_is, as_matrix
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import refuse_double_backward
from fastasr.ops._runtime import (
    BOOL,
    COMPUTE,
    NOT_MINE,
    applied,
    back,
    back_in_shape,
    is_batched,
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    operand,
    promoted,
    wide,
)
from fastasr.ops.ema_scan import _check, _sizes
from fastasr.ops.ema_scan import ema_scan as formula

op = OPS["ema_scan"]
family = op.family
DIRECTION_CODES = {"forward": 0, "reverse": 1, "bidirectional": 2}
ACTIVATION_CODES = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}
LAYOUT_CODES = {"LBD": 0, "BLD": 1, "BDL": 2}


class Arguments(NamedTuple):
    x: Tensor
    damping: Tensor
    decay: Tensor
    expansion: Tensor
    projection: Tensor
    residual: Tensor | None = None
    state: Tensor | None = None
    return_state: bool = False
    padding_mask: Tensor | None = None
    truncation: int | None = None
    direction: Literal["forward", "reverse", "bidirectional"] = "forward"
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity"
    layout: Literal["LBD", "BLD", "BDL"] = "LBD"


class Saved(NamedTuple):
    x: Tensor
    damping: Tensor
    decay: Tensor
    expansion: Tensor
    projection: Tensor
    residual: Tensor | None
    state: Tensor | None
    padding_mask: Tensor | None
    return_state: bool
    truncation: int | None
    direction: Literal["forward", "reverse", "bidirectional"]
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"]
    layout: Literal["LBD", "BLD", "BDL"]


# --------------------------------------------------------------------------- the public function
@overload
def ema_scan(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: Literal[False] = False,
    padding_mask: Tensor | None = None,
    truncation: int | None = None,
    direction: Literal["forward", "reverse", "bidirectional"] = "forward",
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity",
    layout: Literal["LBD", "BLD", "BDL"] = "LBD",
) -> Tensor: ...
@overload
def ema_scan(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: Literal[True],
    padding_mask: Tensor | None = None,
    truncation: int | None = None,
    direction: Literal["forward", "reverse", "bidirectional"] = "forward",
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity",
    layout: Literal["LBD", "BLD", "BDL"] = "LBD",
) -> tuple[Tensor, Tensor]: ...
@overload
def ema_scan(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool,
    padding_mask: Tensor | None = None,
    truncation: int | None = None,
    direction: Literal["forward", "reverse", "bidirectional"] = "forward",
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity",
    layout: Literal["LBD", "BLD", "BDL"] = "LBD",
) -> Tensor | tuple[Tensor, Tensor]: ...
def ema_scan(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    padding_mask: Tensor | None = None,
    truncation: int | None = None,
    direction: Literal["forward", "reverse", "bidirectional"] = "forward",
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity",
    layout: Literal["LBD", "BLD", "BDL"] = "LBD",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mega's multi-head damped moving average as a linear-time scan, with states.

    Computes y = act(Σ_n c_n h_n + residual · x), h_n(t) = q_n h_n(t−1) + b_n x_t.

    Args:
        x: (L, B, D), (B, L, D) or (B, D, L) as ``layout`` says; float32, bfloat16, float16 or float64.
        damping, decay: (D, N) or (D, N, 1), 1 ≤ N ≤ 64, before the sigmoid: p = σ(damping), q = 1 − p σ(decay).
        expansion, projection: the same shape: b = p · expansion, c = projection / √N. For
            ``direction="bidirectional"`` the four are (2D, N): the second half scans from the end, and the present
            step counts in both.
        residual: (D,), or None for no residual term.
        state: (B, D, N), h before the first step; None: zeros. With ``direction="reverse"`` the first step is the last.
        return_state: return h after the last step too, in float32 (float64 when any argument is).
        padding_mask: (B, L), bool, True where x is padding: it does not enter the average; the residual term stays.
        truncation: the number of taps of the convolution to keep, the first ones; None: all. Not together with a state.
        direction: "forward", "reverse" or "bidirectional".
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
    Returns:
        y of x's shape and dtype, contiguous, computed in float32 or better and rounded once; with ``return_state``
        (y, state (B, D, N)).
    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not match, or options exclude each other.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and type(damping) in PLAIN
        and damping.dtype in COMPUTE
        and type(decay) in PLAIN
        and type(expansion) in PLAIN
        and type(projection) in PLAIN
        and (residual is None or type(residual) in PLAIN)
        and (state is None or type(state) in PLAIN)
        and (padding_mask is None or type(padding_mask) in PLAIN)
        and type(return_state) is bool
        and (truncation is None or (type(truncation) is int and (truncation >= 1)))
        and type(direction) is str
        and direction in DIRECTION_CODES
        and type(activation) is str
        and activation in ACTIVATION_CODES
        and type(layout) is str
        and layout in LAYOUT_CODES
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad
                or damping.requires_grad
                or decay.requires_grad
                or expansion.requires_grad
                or projection.requires_grad
                or (residual is not None and residual.requires_grad)
                or (state is not None and state.requires_grad)
            ):
                return apply(
                    kernels, True, x, damping, decay, expansion, projection, residual, state, return_state,
                    padding_mask, truncation, direction, activation, layout,
                )  # fmt: skip
            y, last = kernels.forward(
                x, damping, decay, expansion, projection, residual, state, padding_mask, truncation or 0,
                DIRECTION_CODES[direction], ACTIVATION_CODES[activation], LAYOUT_CODES[layout], return_state,
            )  # fmt: skip
            return (y, last) if return_state else y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(
                x, damping, decay, expansion, projection, residual, state, return_state, padding_mask,
                truncation, direction, activation, layout,
            )  # fmt: skip
            raise
    check(
        x, damping, decay, expansion, projection, residual, state, return_state, padding_mask, truncation,
        direction, activation, layout,
    )  # fmt: skip
    if is_compiling() or not (
        type(x) in PLAIN
        and type(damping) in PLAIN
        and type(decay) in PLAIN
        and type(expansion) in PLAIN
        and type(projection) in PLAIN
        and (residual is None or type(residual) in PLAIN)
        and (state is None or type(state) in PLAIN)
        and (padding_mask is None or type(padding_mask) in PLAIN)
    ):
        return traced(
            x, damping, decay, expansion, projection, residual, state, return_state, padding_mask, truncation,
            direction, activation, layout,
        )  # fmt: skip
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(x, damping, decay, expansion, projection, residual, state, return_state,
            padding_mask, truncation, direction, activation, layout),
        )  # fmt: skip
    kernels = family.kernels(x, damping, decay, expansion, projection, residual, state)
    if kernels is None:
        return laid_out(
            op, formula(x, damping, decay, expansion, projection, residual, state=state,
            return_state=return_state, padding_mask=padding_mask, truncation=truncation, direction=direction,
            activation=activation, layout=layout),
        )  # fmt: skip
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or damping.requires_grad
            or decay.requires_grad
            or expansion.requires_grad
            or projection.requires_grad
            or (residual is not None and residual.requires_grad)
            or (state is not None and state.requires_grad)
        ):
            return apply(
                kernels, False, x, damping, decay, expansion, projection, residual, state, return_state,
                padding_mask, truncation, direction, activation, layout,
            )  # fmt: skip
        y, last = run_kernels(
            kernels, x, damping, decay, expansion, projection, residual, state, return_state, padding_mask,
            truncation, direction, activation, layout,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, x, damping, decay, expansion, projection, residual, state)
        return formula(
            x, damping, decay, expansion, projection, residual, state=state, return_state=return_state,
            padding_mask=padding_mask, truncation=truncation, direction=direction, activation=activation,
            layout=layout,
        )  # fmt: skip
    return (y, last) if return_state else y


def check(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None,
    state: Tensor | None,
    return_state: bool,
    padding_mask: Tensor | None,
    truncation: int | None,
    direction: Literal["forward", "reverse", "bidirectional"],
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"],
    layout: Literal["LBD", "BLD", "BDL"],
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(return_state) is not bool:
        op.wrong_flag("return_state", return_state)
    if truncation is not None:
        if type(truncation) is not int:
            op.wrong_int("truncation", truncation)
        if not (truncation >= 1):
            op.fail("truncation", "at least 1", truncation)
    if not (type(direction) is str and direction in DIRECTION_CODES):
        op.wrong_choice("direction", direction, DIRECTION_CODES)
    if not (type(activation) is str and activation in ACTIVATION_CODES):
        op.wrong_choice("activation", activation, ACTIVATION_CODES)
    if not (type(layout) is str and layout in LAYOUT_CODES):
        op.wrong_choice("layout", layout, LAYOUT_CODES)
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) == 3:
        right = True
    if not right:
        op.wrong_shape("x", x, listed("X", "Y", "Z"))
    B, D, L, R = _sizes(
        Arguments(x, damping, decay, expansion, projection, residual, state, return_state, padding_mask,
        truncation, direction, activation, layout),
    )  # fmt: skip
    if (
        not isinstance(damping, Tensor)
        or damping.dtype not in FLOATING
        or damping.layout is not torch.strided
    ):
        op.wrong_tensor("damping", damping)
    shape, right = damping.shape, False
    if len(shape) == 2:
        N = shape[1]
        right = shape[0] == R and N >= 1 and N <= 64
    elif len(shape) == 3:
        N = shape[1]
        right = shape[0] == R and shape[2] == 1 and N >= 1 and N <= 64
    if not right:
        op.wrong_shape("damping", damping, f"{listed(R, 'N')} or {listed(R, 'N', 1)}, N >= 1, N <= 64")
    if damping.device != x.device:
        op.wrong_device("damping", damping, "x", x)
    if not isinstance(decay, Tensor) or decay.dtype not in FLOATING or decay.layout is not torch.strided:
        op.wrong_tensor("decay", decay)
    if (decay.shape != (R, N) and decay.shape != (R, N, 1)) or not N >= 1 or not N <= 64:
        op.wrong_shape("decay", decay, f"{listed(R, N)} or {listed(R, N, 1)}, {N} >= 1, {N} <= 64")
    if decay.device != x.device:
        op.wrong_device("decay", decay, "x", x)
    if (
        not isinstance(expansion, Tensor)
        or expansion.dtype not in FLOATING
        or expansion.layout is not torch.strided
    ):
        op.wrong_tensor("expansion", expansion)
    if (expansion.shape != (R, N) and expansion.shape != (R, N, 1)) or not N >= 1 or not N <= 64:
        op.wrong_shape("expansion", expansion, f"{listed(R, N)} or {listed(R, N, 1)}, {N} >= 1, {N} <= 64")
    if expansion.device != x.device:
        op.wrong_device("expansion", expansion, "x", x)
    if (
        not isinstance(projection, Tensor)
        or projection.dtype not in FLOATING
        or projection.layout is not torch.strided
    ):
        op.wrong_tensor("projection", projection)
    if (projection.shape != (R, N) and projection.shape != (R, N, 1)) or not N >= 1 or not N <= 64:
        op.wrong_shape("projection", projection, f"{listed(R, N)} or {listed(R, N, 1)}, {N} >= 1, {N} <= 64")
    if projection.device != x.device:
        op.wrong_device("projection", projection, "x", x)
    if residual is not None:
        if (
            not isinstance(residual, Tensor)
            or residual.dtype not in FLOATING
            or residual.layout is not torch.strided
        ):
            op.wrong_tensor("residual", residual)
        if residual.shape != (D,):
            op.wrong_shape("residual", residual, listed(D))
        if residual.device != x.device:
            op.wrong_device("residual", residual, "x", x)
    if state is not None:
        if not isinstance(state, Tensor) or state.dtype not in FLOATING or state.layout is not torch.strided:
            op.wrong_tensor("state", state)
        if state.shape != (B, D, N):
            op.wrong_shape("state", state, listed(B, D, N))
        if state.device != x.device:
            op.wrong_device("state", state, "x", x)
    if padding_mask is not None:
        if (
            not isinstance(padding_mask, Tensor)
            or padding_mask.dtype not in BOOL
            or padding_mask.layout is not torch.strided
        ):
            op.wrong_tensor("padding_mask", padding_mask, "a bool tensor")
        if padding_mask.shape != (B, L):
            op.wrong_shape("padding_mask", padding_mask, listed(B, L))
        if padding_mask.device != x.device:
            op.wrong_device("padding_mask", padding_mask, "x", x)
    _check(
        op, make(Arguments, (x, damping, decay, expansion, projection, residual, state, return_state,
        padding_mask, truncation, direction, activation, layout,)),
    )  # fmt: skip


def traced(
    x, damping, decay, expansion, projection, residual, state, return_state, padding_mask, truncation,
    direction, activation, layout,
):  # fmt: skip
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("ema_scan", x, damping, decay, expansion, projection, residual, state):
        return formula(
            x, damping, decay, expansion, projection, residual, state=state, return_state=return_state,
            padding_mask=padding_mask, truncation=truncation, direction=direction, activation=activation,
            layout=layout,
        )  # fmt: skip
    y, last = operator(
        x, damping, decay, expansion, projection, residual, state, return_state, padding_mask, truncation,
        direction, activation, layout,
    )  # fmt: skip
    return (y, last) if return_state else y


def run_kernels(
    kernels, x, damping, decay, expansion, projection, residual, state, return_state, padding_mask,
    truncation, direction, activation, layout,
):  # fmt: skip
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    last_dtype = wide(x, damping, decay, expansion, projection, residual, state)
    dtype = widest(x, (damping, decay, expansion, projection, residual, state))
    work = None if kernels.backend == "triton" else promote_types(dtype, torch.float32)
    y, last = kernels.forward(
        operand(x, dtype, as_it_is), operand(damping, work, as_matrix), operand(decay, work, as_matrix),
        operand(expansion, work, as_matrix), operand(projection, work, as_matrix), operand(residual, work),
        operand(state, work), operand(padding_mask, None), truncation or 0, DIRECTION_CODES[direction],
        ACTIVATION_CODES[activation], LAYOUT_CODES[layout], return_state,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if last.dtype is not last_dtype:
        last = last.to(last_dtype)
    return y, last


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x), wide(a.x, a.damping, a.decay, a.expansion, a.projection, a.residual, a.state))


# --------------------------------------------------------------------------- gradients without the dispatcher
class EmaScan(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, x, damping, decay, expansion, projection, residual, state, return_state,
        padding_mask, truncation, direction, activation, layout,
    ):  # fmt: skip
        if direct:
            y, last = kernels.forward(
                x, damping, decay, expansion, projection, residual, state, padding_mask, truncation or 0,
                DIRECTION_CODES[direction], ACTIVATION_CODES[activation], LAYOUT_CODES[layout], return_state,
            )  # fmt: skip
        else:
            y, last = run_kernels(
                kernels, x, damping, decay, expansion, projection, residual, state, return_state,
                padding_mask, truncation, direction, activation, layout,
            )  # fmt: skip
        y = not_a_view(y)
        last = not_a_view(last)
        ctx.save_for_backward(x, damping, decay, expansion, projection, residual, state, padding_mask)
        ctx.rest = kernels, direct, return_state, truncation, direction, activation, layout
        return (y, last) if return_state else y

    @staticmethod
    def backward(ctx, grad_y, grad_last=None, *_):
        if is_grad_enabled():
            refuse_double_backward("ema_scan")
        # once: a checkpoint gives them one time
        x, damping, decay, expansion, projection, residual, state, padding_mask = ctx.saved_tensors
        kernels, direct, return_state, truncation, direction, activation, layout = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
            or (grad_last is not None and is_batched(grad_last))
        ):
            d_x, d_damping, d_decay, d_expansion, d_projection, d_residual, d_state = kernels.backward(
                operand(grad_y, None, as_it_is), operand(grad_last, None), x, damping, decay, expansion,
                projection, residual, state, padding_mask, truncation or 0, DIRECTION_CODES[direction],
                ACTIVATION_CODES[activation], LAYOUT_CODES[layout],
            )  # fmt: skip
            return (
                None,
                None,
                d_x,
                d_damping,
                d_decay,
                d_expansion,
                d_projection,
                None if residual is None else d_residual,
                None if state is None else d_state,
                None,
                None,
                None,
                None,
                None,
                None,
            )
        d_x, d_damping, d_decay, d_expansion, d_projection, d_residual, d_state = node_gradients(
            op, kernels, (grad_y, grad_last,), make(Saved, (x, damping, decay, expansion, projection,
            residual, state, padding_mask, return_state, truncation, direction, activation, layout,)),
        )  # fmt: skip
        return (
            None,
            None,
            d_x,
            d_damping,
            d_decay,
            d_expansion,
            d_projection,
            d_residual,
            d_state,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    grad_y, grad_last = grads
    dtype = widest(
        saved.x, (saved.damping, saved.decay, saved.expansion, saved.projection, saved.residual, saved.state,
        ),
    )  # fmt: skip
    work = None if kernels.backend == "triton" else promote_types(dtype, torch.float32)
    d_x, d_damping, d_decay, d_expansion, d_projection, d_residual, d_state = kernels.backward(
        operand(grad_y, dtype, as_it_is), operand(grad_last, work), operand(saved.x, dtype, as_it_is),
        operand(saved.damping, work, as_matrix), operand(saved.decay, work, as_matrix),
        operand(saved.expansion, work, as_matrix), operand(saved.projection, work, as_matrix),
        operand(saved.residual, work), operand(saved.state, work), operand(saved.padding_mask, None),
        saved.truncation or 0, DIRECTION_CODES[saved.direction], ACTIVATION_CODES[saved.activation],
        LAYOUT_CODES[saved.layout],
    )  # fmt: skip
    d_x = back(d_x, saved.x)
    d_damping = back_in_shape(d_damping, saved.damping)
    d_decay = back_in_shape(d_decay, saved.decay)
    d_expansion = back_in_shape(d_expansion, saved.expansion)
    d_projection = back_in_shape(d_projection, saved.projection)
    d_residual = back(d_residual, saved.residual)
    d_state = back(d_state, saved.state)
    return d_x, d_damping, d_decay, d_expansion, d_projection, d_residual, d_state


apply = applied(EmaScan)


# --------------------------------------------------------------------------- the registered operator
def fake(
    x, damping, decay, expansion, projection, residual=None, state=None, return_state=False,
    padding_mask=None, truncation=None, direction='forward', activation='identity', layout='LBD',
):  # fmt: skip
    X = x.shape[0]
    Y = x.shape[1]
    Z = x.shape[2]
    B, D, L, R = _sizes(
        Arguments(x, damping, decay, expansion, projection, residual, state, return_state, padding_mask,
        truncation, direction, activation, layout),
    )  # fmt: skip
    if len(damping.shape) == 2 or len(damping.shape) == 3:
        N = damping.shape[1]
    return torch.empty((X, Y, Z), dtype=promoted(x), device=x.device), torch.empty(
        (B, D, N) if return_state else (0,),
        dtype=wide(x, damping, decay, expansion, projection, residual, state),
        device=x.device,
    )


op.serve(
    ema_scan,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y", "last"),
        deciding=("x", "damping", "decay", "expansion", "projection", "residual", "state"),
        differentiable=("x", "damping", "decay", "expansion", "projection", "residual", "state"),
        graded={"y": "", "last": "return_state"},
        saves=("x", "damping", "decay", "expansion", "projection", "residual", "state", "padding_mask"),
    ),
)
operator = register_op(
    op,
    "ema_scan(Tensor x, Tensor damping, Tensor decay, Tensor expansion, Tensor projection, Tensor? "
    "residual=None, Tensor? state=None, bool return_state=False, Tensor? padding_mask=None, SymInt? "
    'truncation=None, str direction="forward", str activation="identity", str layout="LBD") -> (Tensor, '
    "Tensor)",
    "ema_scan_backward(Tensor? grad_y, Tensor? grad_last, Tensor x, Tensor damping, Tensor decay, Tensor "
    "expansion, Tensor projection, Tensor? residual, Tensor? state, Tensor? padding_mask, bool "
    "return_state, SymInt? truncation, str direction, str activation, str layout) -> (Tensor, Tensor, "
    "Tensor, Tensor, Tensor, Tensor, Tensor)",
)
