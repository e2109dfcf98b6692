# SPDX-License-Identifier: Apache-2.0
# `make op OP=layer_norm_lstm` writes this file from fastasr/ops/layer_norm_lstm.py: change that one.
"""Runs an LSTM layer with LayerNorm on gates and cell, over a whole sequence or one step"""

from typing import NamedTuple

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward
from fastasr.ops._runtime import (
    NOT_MINE,
    applied,
    back,
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    promoted,
    wide,
)
from fastasr.ops.layer_norm_lstm import _fast, _gradients, _launch
from fastasr.ops.layer_norm_lstm import layer_norm_lstm as formula

op = OPS["layer_norm_lstm"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor
    input_weight: Tensor
    hidden_weight: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    cell_weight: Tensor
    cell_bias: Tensor
    hidden: Tensor | None = None
    cell: Tensor | None = None
    eps: float = 1e-05


class Saved(NamedTuple):
    x: Tensor
    input_weight: Tensor
    hidden_weight: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    cell_weight: Tensor
    cell_bias: Tensor
    hidden: Tensor | None
    cell: Tensor | None
    y: Tensor
    kept: Tensor
    eps: float


# --------------------------------------------------------------------------- the public function
def layer_norm_lstm(
    x: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    cell_weight: Tensor,
    cell_bias: Tensor,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
    eps: float = 1e-05,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs an LSTM layer with LayerNorm on gates and cell, over a whole sequence or one step.

    Args:
        x: (T, B, D); float32, bfloat16, float16 or float64.
        input_weight: (4H, D), hidden_weight: (4H, H), in the order input, forget, cell and output gate; x's dtype,
            except under autocast, which casts the three.
        gate_weight, gate_bias: (4H,), of the gates' LayerNorm; cell_weight, cell_bias: (H,), of the cell's.
        hidden, cell: (B, H), the state before the first step; None: zeros.
        eps: added to both variances.
    Returns:
        y (T, B, H), and the state after the last step, hidden and cell, (B, H) each: in the promoted dtype of x and the
        normalisations' parameters, computed in float32 or better. hidden is y[-1].
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (dtype := x.dtype)
        and type(input_weight) in PLAIN
        and input_weight.is_cpu
        and input_weight.dtype is dtype
        and type(hidden_weight) in PLAIN
        and hidden_weight.is_cpu
        and hidden_weight.dtype is dtype
        and type(gate_weight) in PLAIN
        and gate_weight.is_cpu
        and gate_weight.dtype is dtype
        and type(gate_bias) in PLAIN
        and gate_bias.is_cpu
        and gate_bias.dtype is dtype
        and type(cell_weight) in PLAIN
        and cell_weight.is_cpu
        and cell_weight.dtype is dtype
        and type(cell_bias) in PLAIN
        and cell_bias.is_cpu
        and cell_bias.dtype is dtype
        and (hidden is None or (type(hidden) in PLAIN and hidden.is_cpu and hidden.dtype is dtype))
        and (cell is None or (type(cell) in PLAIN and cell.is_cpu and cell.dtype is dtype))
        and type(eps) is float
        and (eps >= 0)
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad
                or input_weight.requires_grad
                or hidden_weight.requires_grad
                or gate_weight.requires_grad
                or gate_bias.requires_grad
                or cell_weight.requires_grad
                or cell_bias.requires_grad
                or (hidden is not None and hidden.requires_grad)
                or (cell is not None and cell.requires_grad)
            ):
                return apply(
                    kernels, True, x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight,
                    cell_bias, hidden, cell, eps,
                )  # fmt: skip
            y, last_hidden, last_cell, _ = _fast(
                kernels, False, x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight,
                cell_bias, hidden, cell, eps,
            )  # fmt: skip
            return y, last_hidden, last_cell
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(
                x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell,
                eps,
            )  # fmt: skip
            raise
    check(x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell, eps)
    if is_compiling() or not (
        type(x) in PLAIN
        and type(input_weight) in PLAIN
        and type(hidden_weight) in PLAIN
        and type(gate_weight) in PLAIN
        and type(gate_bias) in PLAIN
        and type(cell_weight) in PLAIN
        and type(cell_bias) in PLAIN
        and (hidden is None or type(hidden) in PLAIN)
        and (cell is None or type(cell) in PLAIN)
    ):
        return traced(
            x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell, eps
        )
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias,
            hidden, cell, eps),
        )  # fmt: skip
    kernels = family.kernels(x, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell)
    if kernels is None:
        return laid_out(
            op, formula(x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias,
            hidden, cell, eps),
        )  # fmt: skip
    cast_dtype = autocast_dtype(x)
    if cast_dtype is not None:
        x, input_weight, hidden_weight = cast(cast_dtype, x, input_weight, hidden_weight)
        kernels = family.kernels(x, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell)
        if kernels is None:
            return formula(
                x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell,
                eps,
            )  # fmt: skip
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or input_weight.requires_grad
            or hidden_weight.requires_grad
            or gate_weight.requires_grad
            or gate_bias.requires_grad
            or cell_weight.requires_grad
            or cell_bias.requires_grad
            or (hidden is not None and hidden.requires_grad)
            or (cell is not None and cell.requires_grad)
        ):
            return apply(
                kernels, False, x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight,
                cell_bias, hidden, cell, eps,
            )  # fmt: skip
        y, last_hidden, last_cell, _ = run_kernels(
            kernels, x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden,
            cell, eps, False,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, x, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell)
        return formula(
            x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell, eps
        )
    return y, last_hidden, last_cell


def check(
    x: Tensor,
    input_weight: Tensor,
    hidden_weight: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    cell_weight: Tensor,
    cell_bias: Tensor,
    hidden: Tensor | None,
    cell: Tensor | None,
    eps: float,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(eps) is not float:
        op.wrong_float("eps", eps)
    if not (eps >= 0):
        op.fail("eps", "at least 0", eps)
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) == 3:
        B = shape[1]
        D = shape[2]
        right = True
    if not right:
        op.wrong_shape("x", x, listed("T", "B", "D"))
    if (
        not isinstance(input_weight, Tensor)
        or input_weight.dtype not in FLOATING
        or input_weight.layout is not torch.strided
    ):
        op.wrong_tensor("input_weight", input_weight)
    shape, right = input_weight.shape, False
    if len(shape) == 2:
        H = shape[0] // 4
        right = shape[0] % 4 == 0 and shape[1] == D
    if not right:
        op.wrong_shape("input_weight", input_weight, listed("4*H", D))
    if input_weight.device != x.device:
        op.wrong_device("input_weight", input_weight, "x", x)
    if (
        not isinstance(hidden_weight, Tensor)
        or hidden_weight.dtype not in FLOATING
        or hidden_weight.layout is not torch.strided
    ):
        op.wrong_tensor("hidden_weight", hidden_weight)
    if hidden_weight.shape != (4 * H, H) or not H >= 1:
        op.wrong_shape("hidden_weight", hidden_weight, f"{listed(4 * H, H)}, {H} >= 1")
    if hidden_weight.device != x.device:
        op.wrong_device("hidden_weight", hidden_weight, "x", x)
    if (
        not isinstance(gate_weight, Tensor)
        or gate_weight.dtype not in FLOATING
        or gate_weight.layout is not torch.strided
    ):
        op.wrong_tensor("gate_weight", gate_weight)
    if gate_weight.shape != (4 * H,):
        op.wrong_shape("gate_weight", gate_weight, listed(4 * H))
    if gate_weight.device != x.device:
        op.wrong_device("gate_weight", gate_weight, "x", x)
    if (
        not isinstance(gate_bias, Tensor)
        or gate_bias.dtype not in FLOATING
        or gate_bias.layout is not torch.strided
    ):
        op.wrong_tensor("gate_bias", gate_bias)
    if gate_bias.shape != (4 * H,):
        op.wrong_shape("gate_bias", gate_bias, listed(4 * H))
    if gate_bias.device != x.device:
        op.wrong_device("gate_bias", gate_bias, "x", x)
    if (
        not isinstance(cell_weight, Tensor)
        or cell_weight.dtype not in FLOATING
        or cell_weight.layout is not torch.strided
    ):
        op.wrong_tensor("cell_weight", cell_weight)
    if cell_weight.shape != (H,):
        op.wrong_shape("cell_weight", cell_weight, listed(H))
    if cell_weight.device != x.device:
        op.wrong_device("cell_weight", cell_weight, "x", x)
    if (
        not isinstance(cell_bias, Tensor)
        or cell_bias.dtype not in FLOATING
        or cell_bias.layout is not torch.strided
    ):
        op.wrong_tensor("cell_bias", cell_bias)
    if cell_bias.shape != (H,):
        op.wrong_shape("cell_bias", cell_bias, listed(H))
    if cell_bias.device != x.device:
        op.wrong_device("cell_bias", cell_bias, "x", x)
    if hidden is not None:
        if (
            not isinstance(hidden, Tensor)
            or hidden.dtype not in FLOATING
            or hidden.layout is not torch.strided
        ):
            op.wrong_tensor("hidden", hidden)
        if hidden.shape != (B, H):
            op.wrong_shape("hidden", hidden, listed(B, H))
        if hidden.device != x.device:
            op.wrong_device("hidden", hidden, "x", x)
    if cell is not None:
        if not isinstance(cell, Tensor) or cell.dtype not in FLOATING or cell.layout is not torch.strided:
            op.wrong_tensor("cell", cell)
        if cell.shape != (B, H):
            op.wrong_shape("cell", cell, listed(B, H))
        if cell.device != x.device:
            op.wrong_device("cell", cell, "x", x)
    if input_weight.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("input_weight", input_weight, "x", x)
    if hidden_weight.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("hidden_weight", hidden_weight, "x", x)


def traced(x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell, eps):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("layer_norm_lstm", x, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell):
        return formula(
            x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell, eps
        )
    y, last_hidden, last_cell, _ = operator(
        x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell, eps,
        is_grad_enabled() and (x.requires_grad or input_weight.requires_grad or hidden_weight.requires_grad or
        gate_weight.requires_grad or gate_bias.requires_grad or cell_weight.requires_grad or
        cell_bias.requires_grad or (hidden is not None and hidden.requires_grad) or (cell is not None and
        cell.requires_grad)),
    )  # fmt: skip
    return y, last_hidden, last_cell


def run_kernels(
    kernels, x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell,
    eps, keep,
):  # fmt: skip
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x, gate_weight, gate_bias, cell_weight, cell_bias)
    kept_dtype = wide(x, gate_weight, gate_bias, cell_weight, cell_bias)
    y, last_hidden, last_cell, kept = _launch(
        op, kernels, make(Arguments, (x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight,
        cell_bias, hidden, cell, eps,)), y_dtype, keep,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if last_hidden.dtype is not y_dtype:
        last_hidden = last_hidden.to(y_dtype)
    if last_cell.dtype is not y_dtype:
        last_cell = last_cell.to(y_dtype)
    if kept.dtype is not kept_dtype:
        kept = kept.to(kept_dtype)
    return y, last_hidden, last_cell, kept


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (
        promoted(a.x, a.gate_weight, a.gate_bias, a.cell_weight, a.cell_bias),
        promoted(a.x, a.gate_weight, a.gate_bias, a.cell_weight, a.cell_bias),
        promoted(a.x, a.gate_weight, a.gate_bias, a.cell_weight, a.cell_bias),
        wide(a.x, a.gate_weight, a.gate_bias, a.cell_weight, a.cell_bias),
    )


# --------------------------------------------------------------------------- gradients without the dispatcher
class LayerNormLstm(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias,
        hidden, cell, eps,
    ):  # fmt: skip
        if direct:
            y, last_hidden, last_cell, kept = _fast(
                kernels, True, x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias,
                hidden, cell, eps,
            )  # fmt: skip
        else:
            y, last_hidden, last_cell, kept = run_kernels(
                kernels, x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias,
                hidden, cell, eps, True,
            )  # fmt: skip
        y = not_a_view(y)
        last_hidden = not_a_view(last_hidden)
        last_cell = not_a_view(last_cell)
        ctx.save_for_backward(
            x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell, y,
            kept,
        )  # fmt: skip
        ctx.rest = kernels, direct, eps
        ctx.set_materialize_grads(False)
        return y, last_hidden, last_cell

    @staticmethod
    def backward(ctx, grad_y, grad_last_hidden, grad_last_cell, *_):
        if is_grad_enabled():
            refuse_double_backward("layer_norm_lstm")
        # once: a checkpoint gives them one time
        (
            x,
            input_weight,
            hidden_weight,
            gate_weight,
            gate_bias,
            cell_weight,
            cell_bias,
            hidden,
            cell,
            y,
            kept,
        ) = ctx.saved_tensors
        kernels, direct, eps = ctx.rest
        if grad_y is None and grad_last_hidden is None and grad_last_cell is None:
            return (None,) * 12
        d_x, d_input_weight, d_hidden_weight, d_gate_weight, d_gate_bias, d_cell_weight, d_cell_bias, d_hidden, d_cell = node_gradients(
            op, kernels, (grad_y, grad_last_hidden, grad_last_cell,), make(Saved, (x, input_weight,
            hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell, y, kept, eps,)),
            ctx.needs_input_grad[2:],
        )  # fmt: skip
        return (
            None,
            None,
            d_x,
            d_input_weight,
            d_hidden_weight,
            d_gate_weight,
            d_gate_bias,
            d_cell_weight,
            d_cell_bias,
            d_hidden,
            d_cell,
            None,
        )


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    (
        d_x,
        d_input_weight,
        d_hidden_weight,
        d_gate_weight,
        d_gate_bias,
        d_cell_weight,
        d_cell_bias,
        d_hidden,
        d_cell,
    ) = _gradients(op, kernels, grads, saved, needs)
    d_x = back(d_x, saved.x)
    d_input_weight = back(d_input_weight, saved.input_weight)
    d_hidden_weight = back(d_hidden_weight, saved.hidden_weight)
    d_gate_weight = back(d_gate_weight, saved.gate_weight)
    d_gate_bias = back(d_gate_bias, saved.gate_bias)
    d_cell_weight = back(d_cell_weight, saved.cell_weight)
    d_cell_bias = back(d_cell_bias, saved.cell_bias)
    d_hidden = back(d_hidden, saved.hidden)
    d_cell = back(d_cell, saved.cell)
    return (
        d_x,
        d_input_weight,
        d_hidden_weight,
        d_gate_weight,
        d_gate_bias,
        d_cell_weight,
        d_cell_bias,
        d_hidden,
        d_cell,
    )


apply = applied(LayerNormLstm)


# --------------------------------------------------------------------------- the registered operator
def fake(
    x, input_weight, hidden_weight, gate_weight, gate_bias, cell_weight, cell_bias, hidden=None, cell=None,
    eps=1e-05, keep=False,
):  # fmt: skip
    keep = (
        keep and family.kernels(x, gate_weight, gate_bias, cell_weight, cell_bias, hidden, cell) is not None
    )
    T = x.shape[0]
    B = x.shape[1]
    H = input_weight.shape[0] // 4
    return (
        torch.empty(
            (T, B, H), dtype=promoted(x, gate_weight, gate_bias, cell_weight, cell_bias), device=x.device
        ),
        torch.empty(
            (B, H), dtype=promoted(x, gate_weight, gate_bias, cell_weight, cell_bias), device=x.device
        ),
        torch.empty(
            (B, H), dtype=promoted(x, gate_weight, gate_bias, cell_weight, cell_bias), device=x.device
        ),
        torch.empty(
            (T * B * (5 * H + 2),) if keep else (0,),
            dtype=wide(x, gate_weight, gate_bias, cell_weight, cell_bias),
            device=x.device,
        ),
    )


op.serve(
    layer_norm_lstm,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y", "last_hidden", "last_cell", "kept"),
        deciding=("x", "gate_weight", "gate_bias", "cell_weight", "cell_bias", "hidden", "cell"),
        differentiable=(
            "x",
            "input_weight",
            "hidden_weight",
            "gate_weight",
            "gate_bias",
            "cell_weight",
            "cell_bias",
            "hidden",
            "cell",
        ),
        graded={"y": "", "last_hidden": "", "last_cell": ""},
        saves=(
            "x",
            "input_weight",
            "hidden_weight",
            "gate_weight",
            "gate_bias",
            "cell_weight",
            "cell_bias",
            "hidden",
            "cell",
            "y",
            "kept",
        ),
        kept=("kept",),
        materialize=False,
        asks=True,
        autocast=("x", "input_weight", "hidden_weight"),
    ),
)
operator = register_op(
    op,
    "layer_norm_lstm(Tensor x, Tensor input_weight, Tensor hidden_weight, Tensor gate_weight, Tensor "
    "gate_bias, Tensor cell_weight, Tensor cell_bias, Tensor? hidden=None, Tensor? cell=None, float "
    "eps=1e-05, bool keep=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "layer_norm_lstm_backward(Tensor? grad_y, Tensor? grad_last_hidden, Tensor? grad_last_cell, Tensor x, "
    "Tensor input_weight, Tensor hidden_weight, Tensor gate_weight, Tensor gate_bias, Tensor cell_weight, "
    "Tensor cell_bias, Tensor? hidden, Tensor? cell, Tensor y, Tensor kept, float eps, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
