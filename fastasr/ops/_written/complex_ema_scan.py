# SPDX-License-Identifier: Apache-2.0
# `make op OP=complex_ema_scan` writes this file from fastasr/ops/ema_scan.py: change that one.
"""Megalodon's complex moving average as a linear-time scan, with states"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, is_grad_enabled, promote_types
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served, widest
from fastasr.ops._layout import as_it_is, as_matrix, as_vector
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
from fastasr.ops.ema_scan import complex_ema_scan as formula

op = OPS["complex_ema_scan"]
family = op.family
DIRECTION_CODES = {"forward": 0, "reverse": 1, "bidirectional": 2}
ACTIVATION_CODES = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}
LAYOUT_CODES = {"LBD": 0, "BLD": 1, "BDL": 2}


class Arguments(NamedTuple):
    x: Tensor
    alpha: Tensor
    delta: Tensor
    theta: Tensor
    gamma: Tensor
    omega: Tensor | None = None
    state: Tensor | None = None
    return_state: bool = False
    padding_mask: Tensor | None = None
    truncation: int | None = None
    direction: Literal["forward", "reverse", "bidirectional"] = "forward"
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity"
    layout: Literal["LBD", "BLD", "BDL"] = "LBD"


class Saved(NamedTuple):
    x: Tensor
    alpha: Tensor
    delta: Tensor
    theta: Tensor
    gamma: Tensor
    omega: Tensor | None
    state: Tensor | None
    padding_mask: Tensor | None
    return_state: bool
    truncation: int | None
    direction: Literal["forward", "reverse", "bidirectional"]
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"]
    layout: Literal["LBD", "BLD", "BDL"]


# --------------------------------------------------------------------------- the public function
@overload
def complex_ema_scan(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor | None = None,
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
def complex_ema_scan(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor | None = None,
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
def complex_ema_scan(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool,
    padding_mask: Tensor | None = None,
    truncation: int | None = None,
    direction: Literal["forward", "reverse", "bidirectional"] = "forward",
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity",
    layout: Literal["LBD", "BLD", "BDL"] = "LBD",
) -> Tensor | tuple[Tensor, Tensor]: ...
def complex_ema_scan(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    padding_mask: Tensor | None = None,
    truncation: int | None = None,
    direction: Literal["forward", "reverse", "bidirectional"] = "forward",
    activation: Literal["identity", "silu", "relu", "tanh", "gelu"] = "identity",
    layout: Literal["LBD", "BLD", "BDL"] = "LBD",
) -> Tensor | tuple[Tensor, Tensor]:
    """Megalodon's complex moving average as a linear-time scan, with states.

    Computes y = act(Re Σ_n c_n h_n + omega · x), h_n(t) = q_n h_n(t−1) + p_n x_t.

    Args:
        x: (L, B, D), (B, L, D) or (B, D, L) as ``layout`` says; float32, bfloat16, float16 or float64.
        alpha, delta: (D, N) or (D, N, 1), 1 ≤ N ≤ 64, before the sigmoid: p = σ(alpha), |q| = 1 − p σ(delta).
        theta: (D,), (D, 1) or (D, 1, 1), before the sigmoid: the angle of q_n is n σ(theta) 2π/N, n = 1 … N.
        gamma: (D, N, 2), real and imaginary part: c = gamma / √N. For ``direction="bidirectional"`` the four have 2D
            rows: the second half scans from the end, and the present step counts in both.
        omega: (D,) or (D, 1), or None for no residual term.
        state: complex (B, D, N), or its real and imaginary parts (B, D, N, 2): h before the first step; None: zeros.
            With ``direction="reverse"`` the first step is the last.
        return_state: return h after the last step too, in complex64 (complex128 when any argument is of 64 bits), or
            in real numbers where ``state`` is.
        padding_mask, truncation, direction, activation: as for :func:`fastasr.ops.ema_scan`.
    Returns:
        y of x's shape and dtype, contiguous, computed in float32 or better and rounded once; with ``return_state``
        (y, state).
    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not match, or options exclude each other.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and type(alpha) in PLAIN
        and alpha.dtype in COMPUTE
        and type(delta) in PLAIN
        and type(theta) in PLAIN
        and type(gamma) in PLAIN
        and (omega is None or type(omega) in PLAIN)
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
                or alpha.requires_grad
                or delta.requires_grad
                or theta.requires_grad
                or gamma.requires_grad
                or (omega is not None and omega.requires_grad)
                or (state is not None and state.requires_grad)
            ):
                return apply(
                    kernels, True, x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask,
                    truncation, direction, activation, layout,
                )  # fmt: skip
            y, last = kernels.forward(
                x, alpha, delta, theta, gamma, omega, state, padding_mask, truncation or 0,
                DIRECTION_CODES[direction], ACTIVATION_CODES[activation], LAYOUT_CODES[layout], return_state,
            )  # fmt: skip
            return (y, last) if return_state else y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(
                x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation,
                direction, activation, layout,
            )  # fmt: skip
            raise
    check(
        x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation, direction,
        activation, layout,
    )  # fmt: skip
    if is_compiling() or not (
        type(x) in PLAIN
        and type(alpha) in PLAIN
        and type(delta) in PLAIN
        and type(theta) in PLAIN
        and type(gamma) in PLAIN
        and (omega is None or type(omega) in PLAIN)
        and (state is None or type(state) in PLAIN)
        and (padding_mask is None or type(padding_mask) in PLAIN)
    ):
        return traced(
            x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation, direction,
            activation, layout,
        )  # fmt: skip
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation,
            direction, activation, layout),
        )  # fmt: skip
    kernels = family.kernels(x, alpha, delta, theta, gamma, omega, state)
    if kernels is None:
        return laid_out(
            op, formula(x, alpha, delta, theta, gamma, omega, state=state, return_state=return_state,
            padding_mask=padding_mask, truncation=truncation, direction=direction, activation=activation,
            layout=layout),
        )  # fmt: skip
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or alpha.requires_grad
            or delta.requires_grad
            or theta.requires_grad
            or gamma.requires_grad
            or (omega is not None and omega.requires_grad)
            or (state is not None and state.requires_grad)
        ):
            return apply(
                kernels, False, x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask,
                truncation, direction, activation, layout,
            )  # fmt: skip
        y, last = run_kernels(
            kernels, x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation,
            direction, activation, layout,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, x, alpha, delta, theta, gamma, omega, state)
        return formula(
            x, alpha, delta, theta, gamma, omega, state=state, return_state=return_state,
            padding_mask=padding_mask, truncation=truncation, direction=direction, activation=activation,
            layout=layout,
        )  # fmt: skip
    return (y, last) if return_state else y


def check(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor | None,
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
        Arguments(x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation,
        direction, activation, layout),
    )  # fmt: skip
    if not isinstance(alpha, Tensor) or alpha.dtype not in FLOATING or alpha.layout is not torch.strided:
        op.wrong_tensor("alpha", alpha)
    shape, right = alpha.shape, False
    if len(shape) == 2:
        N = shape[1]
        right = shape[0] == R and N >= 1 and N <= 64
    elif len(shape) == 3:
        N = shape[1]
        right = shape[0] == R and shape[2] == 1 and N >= 1 and N <= 64
    if not right:
        op.wrong_shape("alpha", alpha, f"{listed(R, 'N')} or {listed(R, 'N', 1)}, N >= 1, N <= 64")
    if alpha.device != x.device:
        op.wrong_device("alpha", alpha, "x", x)
    if not isinstance(delta, Tensor) or delta.dtype not in FLOATING or delta.layout is not torch.strided:
        op.wrong_tensor("delta", delta)
    if (delta.shape != (R, N) and delta.shape != (R, N, 1)) or not N >= 1 or not N <= 64:
        op.wrong_shape("delta", delta, f"{listed(R, N)} or {listed(R, N, 1)}, {N} >= 1, {N} <= 64")
    if delta.device != x.device:
        op.wrong_device("delta", delta, "x", x)
    if not isinstance(theta, Tensor) or theta.dtype not in FLOATING or theta.layout is not torch.strided:
        op.wrong_tensor("theta", theta)
    if theta.shape != (R,) and theta.shape != (R, 1) and theta.shape != (R, 1, 1):
        op.wrong_shape("theta", theta, f"{listed(R)} or {listed(R, 1)} or {listed(R, 1, 1)}")
    if theta.device != x.device:
        op.wrong_device("theta", theta, "x", x)
    if not isinstance(gamma, Tensor) or gamma.dtype not in FLOATING or gamma.layout is not torch.strided:
        op.wrong_tensor("gamma", gamma)
    if gamma.shape != (R, N, 2):
        op.wrong_shape("gamma", gamma, listed(R, N, 2))
    if gamma.device != x.device:
        op.wrong_device("gamma", gamma, "x", x)
    if omega is not None:
        if not isinstance(omega, Tensor) or omega.dtype not in FLOATING or omega.layout is not torch.strided:
            op.wrong_tensor("omega", omega)
        if omega.shape != (D,) and omega.shape != (D, 1):
            op.wrong_shape("omega", omega, f"{listed(D)} or {listed(D, 1)}")
        if omega.device != x.device:
            op.wrong_device("omega", omega, "x", x)
    if state is not None:
        if not isinstance(state, Tensor) or state.dtype not in FLOATING or state.layout is not torch.strided:
            op.wrong_tensor("state", state)
        if state.shape != (B, D, N, 2):
            op.wrong_shape("state", state, listed(B, D, N, 2))
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
        op, make(Arguments, (x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask,
        truncation, direction, activation, layout,)),
    )  # fmt: skip


def traced(
    x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation, direction,
    activation, layout,
):  # fmt: skip
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("complex_ema_scan", x, alpha, delta, theta, gamma, omega, state):
        return formula(
            x, alpha, delta, theta, gamma, omega, state=state, return_state=return_state,
            padding_mask=padding_mask, truncation=truncation, direction=direction, activation=activation,
            layout=layout,
        )  # fmt: skip
    y, last = operator(
        x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation, direction,
        activation, layout,
    )  # fmt: skip
    return (y, last) if return_state else y


def run_kernels(
    kernels, x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation, direction,
    activation, layout,
):  # fmt: skip
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    last_dtype = wide(x, alpha, delta, theta, gamma, omega, state)
    dtype = widest(x, (alpha, delta, theta, gamma, omega, state))
    work = None if kernels.backend == "triton" else promote_types(dtype, torch.float32)
    y, last = kernels.forward(
        operand(x, dtype, as_it_is), operand(alpha, work, as_matrix), operand(delta, work, as_matrix),
        operand(theta, work, as_vector), operand(gamma, work), operand(omega, work, as_vector), operand(state,
        work), operand(padding_mask, None), truncation or 0, DIRECTION_CODES[direction],
        ACTIVATION_CODES[activation], LAYOUT_CODES[layout], return_state,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if last.dtype is not last_dtype:
        last = last.to(last_dtype)
    return y, last


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x), wide(a.x, a.alpha, a.delta, a.theta, a.gamma, a.omega, a.state))


# --------------------------------------------------------------------------- gradients without the dispatcher
class ComplexEmaScan(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask,
        truncation, direction, activation, layout,
    ):  # fmt: skip
        if direct:
            y, last = kernels.forward(
                x, alpha, delta, theta, gamma, omega, state, padding_mask, truncation or 0,
                DIRECTION_CODES[direction], ACTIVATION_CODES[activation], LAYOUT_CODES[layout], return_state,
            )  # fmt: skip
        else:
            y, last = run_kernels(
                kernels, x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation,
                direction, activation, layout,
            )  # fmt: skip
        y = not_a_view(y)
        last = not_a_view(last)
        ctx.save_for_backward(x, alpha, delta, theta, gamma, omega, state, padding_mask)
        ctx.rest = kernels, direct, return_state, truncation, direction, activation, layout
        return (y, last) if return_state else y

    @staticmethod
    def backward(ctx, grad_y, grad_last=None, *_):
        if is_grad_enabled():
            refuse_double_backward("complex_ema_scan")
        # once: a checkpoint gives them one time
        x, alpha, delta, theta, gamma, omega, state, padding_mask = ctx.saved_tensors
        kernels, direct, return_state, truncation, direction, activation, layout = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
            or (grad_last is not None and is_batched(grad_last))
        ):
            d_x, d_alpha, d_delta, d_theta, d_gamma, d_omega, d_state = kernels.backward(
                operand(grad_y, None, as_it_is), operand(grad_last, None), x, alpha, delta, theta, gamma,
                omega, state, padding_mask, truncation or 0, DIRECTION_CODES[direction],
                ACTIVATION_CODES[activation], LAYOUT_CODES[layout],
            )  # fmt: skip
            return (
                None,
                None,
                d_x,
                d_alpha,
                d_delta,
                d_theta,
                d_gamma,
                None if omega is None else d_omega,
                None if state is None else d_state,
                None,
                None,
                None,
                None,
                None,
                None,
            )
        d_x, d_alpha, d_delta, d_theta, d_gamma, d_omega, d_state = node_gradients(
            op, kernels, (grad_y, grad_last,), make(Saved, (x, alpha, delta, theta, gamma, omega, state,
            padding_mask, return_state, truncation, direction, activation, layout,)),
        )  # fmt: skip
        return (
            None,
            None,
            d_x,
            d_alpha,
            d_delta,
            d_theta,
            d_gamma,
            d_omega,
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
    dtype = widest(saved.x, (saved.alpha, saved.delta, saved.theta, saved.gamma, saved.omega, saved.state))
    work = None if kernels.backend == "triton" else promote_types(dtype, torch.float32)
    d_x, d_alpha, d_delta, d_theta, d_gamma, d_omega, d_state = kernels.backward(
        operand(grad_y, dtype, as_it_is), operand(grad_last, work), operand(saved.x, dtype, as_it_is),
        operand(saved.alpha, work, as_matrix), operand(saved.delta, work, as_matrix), operand(saved.theta,
        work, as_vector), operand(saved.gamma, work), operand(saved.omega, work, as_vector),
        operand(saved.state, work), operand(saved.padding_mask, None), saved.truncation or 0,
        DIRECTION_CODES[saved.direction], ACTIVATION_CODES[saved.activation], LAYOUT_CODES[saved.layout],
    )  # fmt: skip
    d_x = back(d_x, saved.x)
    d_alpha = back_in_shape(d_alpha, saved.alpha)
    d_delta = back_in_shape(d_delta, saved.delta)
    d_theta = back_in_shape(d_theta, saved.theta)
    d_gamma = back(d_gamma, saved.gamma)
    d_omega = back_in_shape(d_omega, saved.omega)
    d_state = back(d_state, saved.state)
    return d_x, d_alpha, d_delta, d_theta, d_gamma, d_omega, d_state


apply = applied(ComplexEmaScan)


# --------------------------------------------------------------------------- the registered operator
def fake(
    x, alpha, delta, theta, gamma, omega=None, state=None, return_state=False, padding_mask=None,
    truncation=None, direction='forward', activation='identity', layout='LBD',
):  # fmt: skip
    X = x.shape[0]
    Y = x.shape[1]
    Z = x.shape[2]
    B, D, L, R = _sizes(
        Arguments(x, alpha, delta, theta, gamma, omega, state, return_state, padding_mask, truncation,
        direction, activation, layout),
    )  # fmt: skip
    if len(alpha.shape) == 2 or len(alpha.shape) == 3:
        N = alpha.shape[1]
    return torch.empty((X, Y, Z), dtype=promoted(x), device=x.device), torch.empty(
        (B, D, N, 2) if return_state else (0,),
        dtype=wide(x, alpha, delta, theta, gamma, omega, state),
        device=x.device,
    )


op.serve(
    complex_ema_scan,
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
        deciding=("x", "alpha", "delta", "theta", "gamma", "omega", "state"),
        differentiable=("x", "alpha", "delta", "theta", "gamma", "omega", "state"),
        graded={"y": "", "last": "return_state"},
        saves=("x", "alpha", "delta", "theta", "gamma", "omega", "state", "padding_mask"),
    ),
)
operator = register_op(
    op,
    "complex_ema_scan(Tensor x, Tensor alpha, Tensor delta, Tensor theta, Tensor gamma, Tensor? "
    "omega=None, Tensor? state=None, bool return_state=False, Tensor? padding_mask=None, SymInt? "
    'truncation=None, str direction="forward", str activation="identity", str layout="LBD") -> (Tensor, '
    "Tensor)",
    "complex_ema_scan_backward(Tensor? grad_y, Tensor? grad_last, Tensor x, Tensor alpha, Tensor delta, "
    "Tensor theta, Tensor gamma, Tensor? omega, Tensor? state, Tensor? padding_mask, bool return_state, "
    "SymInt? truncation, str direction, str activation, str layout) -> (Tensor, Tensor, Tensor, Tensor, "
    "Tensor, Tensor, Tensor)",
)
