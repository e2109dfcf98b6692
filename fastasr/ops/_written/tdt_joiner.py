# SPDX-License-Identifier: Apache-2.0
# `make op OP=tdt_joiner` writes this file from fastasr/ops/tdt_joiner.py: change that one.
"""the log-probabilities of symbol, blank and durations of a TDT joiner, without B × T × R × V logits"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward
from fastasr.ops._runtime import (
    INT64,
    INTEGERS,
    applied,
    back,
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    wide,
)
from fastasr.ops.tdt_joiner import _check, _gradients, _launch
from fastasr.ops.tdt_joiner import tdt_joiner as formula

op = OPS["tdt_joiner"]
family = op.family
ACTIVATION_CODES = {"tanh": 3, "relu": 2}


class Arguments(NamedTuple):
    am: Tensor
    lm: Tensor
    weight: Tensor
    bias: Tensor | None
    symbols: Tensor
    starts: Tensor
    s_range: int
    durations: int
    termination_symbol: int
    boundary: Tensor | None = None
    activation: Literal["tanh", "relu"] = "tanh"
    keep_logits: bool | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None


class Saved(NamedTuple):
    am: Tensor
    lm: Tensor
    weight: Tensor
    bias: Tensor | None
    symbols: Tensor
    starts: Tensor
    boundary: Tensor | None
    dropout_seed: Tensor | None
    normaliser: Tensor
    s_range: int
    durations: int
    termination_symbol: int
    activation: Literal["tanh", "relu"]
    keep_logits: bool | None
    dropout_p: float


# --------------------------------------------------------------------------- the public function
def tdt_joiner(
    am: Tensor,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: Tensor,
    starts: Tensor,
    *,
    s_range: int,
    durations: int,
    termination_symbol: int,
    boundary: Tensor | None = None,
    activation: Literal["tanh", "relu"] = "tanh",
    keep_logits: bool | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the log-probabilities of symbol, blank and durations of a TDT joiner, without B × T × R × V logits.

    Args:
        am, lm, symbols, starts, s_range, termination_symbol, boundary, activation, dropout_p, dropout_seed: as for
            :func:`fastasr.ops.rnnt_joiner`, with V tokens.
        weight: (V + durations, D); bias: (V + durations,) or None: the output layer, in the dtype of am + lm, except
            under autocast, which casts them.
        durations: N, the number of outputs behind the tokens.
        keep_logits: keep logits for the backward (4 B T R (V + D) bytes) or compute them again; None: by their size.
    Returns:
        (B, T, R), (B, T, R) and (B, T, R, N), float32 (float64 for float64). Of the full lattice, ``tdt_lattice`` takes
        them, the first without its last column. All are -inf outside the boundary, symbol_logprobs where s has no
        symbol too. Rows outside it, and in the backward pass rows whose gradients are all 0, are not computed.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match; symbols, starts or boundary out of range, for CPU tensors
            outside ``torch.compile`` (see ``rnnt_joiner``).
    """
    check(
        am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol, boundary, activation,
        keep_logits, dropout_p, dropout_seed,
    )  # fmt: skip
    if is_compiling() or not (
        type(am) in PLAIN
        and type(lm) in PLAIN
        and type(weight) in PLAIN
        and (bias is None or type(bias) in PLAIN)
        and type(symbols) in PLAIN
        and type(starts) in PLAIN
        and (boundary is None or type(boundary) in PLAIN)
        and (dropout_seed is None or type(dropout_seed) in PLAIN)
    ):
        return traced(
            am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol, boundary,
            activation, keep_logits, dropout_p, dropout_seed,
        )  # fmt: skip
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol,
            boundary, activation, keep_logits, dropout_p, dropout_seed),
        )  # fmt: skip
    kernels = family.kernels(am, lm, weight, bias)
    if kernels is None:
        return laid_out(
            op, formula(am, lm, weight, bias, symbols, starts, s_range=s_range, durations=durations,
            termination_symbol=termination_symbol, boundary=boundary, activation=activation,
            keep_logits=keep_logits, dropout_p=dropout_p, dropout_seed=dropout_seed),
        )  # fmt: skip
    cast_dtype = autocast_dtype(am)
    if cast_dtype is not None:
        weight, bias = cast(cast_dtype, weight, bias)
        kernels = family.kernels(am, lm, weight, bias)
        if kernels is None:
            return formula(
                am, lm, weight, bias, symbols, starts, s_range=s_range, durations=durations,
                termination_symbol=termination_symbol, boundary=boundary, activation=activation,
                keep_logits=keep_logits, dropout_p=dropout_p, dropout_seed=dropout_seed,
            )  # fmt: skip
    try:
        if is_grad_enabled() and (
            am.requires_grad
            or lm.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
        ):
            return apply(
                kernels, False, am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol,
                boundary, activation, keep_logits, dropout_p, dropout_seed,
            )  # fmt: skip
        symbol_logprobs, blank_logprobs, duration_logprobs, _ = run_kernels(
            kernels, am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol, boundary,
            activation, keep_logits, dropout_p, dropout_seed, False,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, am, lm, weight, bias)
        return formula(
            am, lm, weight, bias, symbols, starts, s_range=s_range, durations=durations,
            termination_symbol=termination_symbol, boundary=boundary, activation=activation,
            keep_logits=keep_logits, dropout_p=dropout_p, dropout_seed=dropout_seed,
        )  # fmt: skip
    return symbol_logprobs, blank_logprobs, duration_logprobs


def check(
    am: Tensor,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: Tensor,
    starts: Tensor,
    s_range: int,
    durations: int,
    termination_symbol: int,
    boundary: Tensor | None,
    activation: Literal["tanh", "relu"],
    keep_logits: bool | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(s_range) is not int:
        op.wrong_int("s_range", s_range)
    if not (s_range >= 1):
        op.fail("s_range", "at least 1", s_range)
    if type(durations) is not int:
        op.wrong_int("durations", durations)
    if not (durations >= 1):
        op.fail("durations", "at least 1", durations)
    if type(termination_symbol) is not int:
        op.wrong_int("termination_symbol", termination_symbol)
    if not (type(activation) is str and activation in ACTIVATION_CODES):
        op.wrong_choice("activation", activation, ACTIVATION_CODES)
    if keep_logits is not None and type(keep_logits) is not bool:
        op.wrong_flag("keep_logits", keep_logits)
    if type(dropout_p) is not float:
        op.wrong_float("dropout_p", dropout_p)
    if not (dropout_p >= 0 and dropout_p < 1):
        op.fail("dropout_p", "at least 0 and less than 1", dropout_p)
    if not isinstance(am, Tensor) or am.dtype not in FLOATING or am.layout is not torch.strided:
        op.wrong_tensor("am", am)
    shape, right = am.shape, False
    if len(shape) == 3:
        B = shape[0]
        T = shape[1]
        D = shape[2]
        right = True
    if not right:
        op.wrong_shape("am", am, listed("B", "T", "D"))
    if (
        not isinstance(symbols, Tensor)
        or symbols.dtype not in INTEGERS
        or symbols.layout is not torch.strided
    ):
        op.wrong_tensor("symbols", symbols, "a tensor of integers")
    shape, right = symbols.shape, False
    if len(shape) == 2:
        S = shape[1]
        right = shape[0] == B
    if not right:
        op.wrong_shape("symbols", symbols, listed(B, "S"))
    if symbols.device != am.device:
        op.wrong_device("symbols", symbols, "am", am)
    if not isinstance(lm, Tensor) or lm.dtype not in FLOATING or lm.layout is not torch.strided:
        op.wrong_tensor("lm", lm)
    if lm.shape != (B, S + 1, D):
        op.wrong_shape("lm", lm, listed(B, S + 1, D))
    if lm.device != am.device:
        op.wrong_device("lm", lm, "am", am)
    if not isinstance(starts, Tensor) or starts.dtype not in INTEGERS or starts.layout is not torch.strided:
        op.wrong_tensor("starts", starts, "a tensor of integers")
    if starts.shape != (B, T):
        op.wrong_shape("starts", starts, listed(B, T))
    if starts.device != am.device:
        op.wrong_device("starts", starts, "am", am)
    if boundary is not None:
        if (
            not isinstance(boundary, Tensor)
            or boundary.dtype not in INTEGERS
            or boundary.layout is not torch.strided
        ):
            op.wrong_tensor("boundary", boundary, "a tensor of integers")
        if boundary.shape != (B, 4):
            op.wrong_shape("boundary", boundary, listed(B, 4))
        if boundary.device != am.device:
            op.wrong_device("boundary", boundary, "am", am)
    if dropout_seed is not None:
        if (
            not isinstance(dropout_seed, Tensor)
            or dropout_seed.dtype not in INT64
            or dropout_seed.layout is not torch.strided
        ):
            op.wrong_tensor("dropout_seed", dropout_seed, "an int64 tensor")
        if dropout_seed.shape != (1,):
            op.wrong_shape("dropout_seed", dropout_seed, listed(1))
        if dropout_seed.device != am.device:
            op.wrong_device("dropout_seed", dropout_seed, "am", am)
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATING or weight.layout is not torch.strided:
        op.wrong_tensor("weight", weight)
    shape, right = weight.shape, False
    if len(shape) == 2:
        V = shape[0] - (0 + durations)
        right = (shape[0] - (0 + durations)) >= 0 and shape[1] == D and V >= 1
    if not right:
        op.wrong_shape("weight", weight, f"{listed(f'V+{durations}', D)}, V >= 1")
    if weight.device != am.device:
        op.wrong_device("weight", weight, "am", am)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in FLOATING or bias.layout is not torch.strided:
            op.wrong_tensor("bias", bias)
        if bias.shape != (V + durations,):
            op.wrong_shape("bias", bias, listed(V + durations))
        if bias.device != am.device:
            op.wrong_device("bias", bias, "am", am)
    _check(
        op, make(Arguments, (am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol,
        boundary, activation, keep_logits, dropout_p, dropout_seed,)),
    )  # fmt: skip


def traced(
    am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol, boundary, activation,
    keep_logits, dropout_p, dropout_seed,
):  # fmt: skip
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("rnnt_joiner", am, lm, weight, bias):
        return formula(
            am, lm, weight, bias, symbols, starts, s_range=s_range, durations=durations,
            termination_symbol=termination_symbol, boundary=boundary, activation=activation,
            keep_logits=keep_logits, dropout_p=dropout_p, dropout_seed=dropout_seed,
        )  # fmt: skip
    symbol_logprobs, blank_logprobs, duration_logprobs, _ = operator(
        am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol, boundary, activation,
        keep_logits, dropout_p, dropout_seed, is_grad_enabled() and (am.requires_grad or lm.requires_grad or
        weight.requires_grad or (bias is not None and bias.requires_grad)),
    )  # fmt: skip
    return symbol_logprobs, blank_logprobs, duration_logprobs


def run_kernels(
    kernels, am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol, boundary,
    activation, keep_logits, dropout_p, dropout_seed, keep,
):  # fmt: skip
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    symbol_logprobs_dtype = wide(am, lm, weight)
    normaliser_dtype = torch.float64
    symbol_logprobs, blank_logprobs, duration_logprobs, normaliser = _launch(
        op, kernels, make(Arguments, (am, lm, weight, bias, symbols, starts, s_range, durations,
        termination_symbol, boundary, activation, keep_logits, dropout_p, dropout_seed,)),
        symbol_logprobs_dtype, keep,
    )  # fmt: skip
    if symbol_logprobs.dtype is not symbol_logprobs_dtype:
        symbol_logprobs = symbol_logprobs.to(symbol_logprobs_dtype)
    if blank_logprobs.dtype is not symbol_logprobs_dtype:
        blank_logprobs = blank_logprobs.to(symbol_logprobs_dtype)
    if duration_logprobs.dtype is not symbol_logprobs_dtype:
        duration_logprobs = duration_logprobs.to(symbol_logprobs_dtype)
    if normaliser.dtype is not normaliser_dtype:
        normaliser = normaliser.to(normaliser_dtype)
    return symbol_logprobs, blank_logprobs, duration_logprobs, normaliser


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (wide(a.am, a.lm, a.weight), wide(a.am, a.lm, a.weight), wide(a.am, a.lm, a.weight), torch.float64)


# --------------------------------------------------------------------------- gradients without the dispatcher
class TdtJoiner(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol,
        boundary, activation, keep_logits, dropout_p, dropout_seed,
    ):  # fmt: skip
        symbol_logprobs, blank_logprobs, duration_logprobs, normaliser = run_kernels(
            kernels, am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol, boundary,
            activation, keep_logits, dropout_p, dropout_seed, True,
        )  # fmt: skip
        symbol_logprobs = not_a_view(symbol_logprobs)
        blank_logprobs = not_a_view(blank_logprobs)
        duration_logprobs = not_a_view(duration_logprobs)
        ctx.save_for_backward(am, lm, weight, bias, symbols, starts, boundary, dropout_seed, normaliser)
        ctx.rest = kernels, direct, s_range, durations, termination_symbol, activation, keep_logits, dropout_p
        return symbol_logprobs, blank_logprobs, duration_logprobs

    @staticmethod
    def backward(ctx, grad_symbol_logprobs, grad_blank_logprobs, grad_duration_logprobs, *_):
        if is_grad_enabled():
            refuse_double_backward("tdt_joiner")
        # once: a checkpoint gives them one time
        am, lm, weight, bias, symbols, starts, boundary, dropout_seed, normaliser = ctx.saved_tensors
        kernels, direct, s_range, durations, termination_symbol, activation, keep_logits, dropout_p = ctx.rest
        d_am, d_lm, d_weight, d_bias = node_gradients(
            op, kernels, (grad_symbol_logprobs, grad_blank_logprobs, grad_duration_logprobs,), make(Saved,
            (am, lm, weight, bias, symbols, starts, boundary, dropout_seed, normaliser, s_range, durations,
            termination_symbol, activation, keep_logits, dropout_p,)), ctx.needs_input_grad[2:],
        )  # fmt: skip
        return (
            None,
            None,
            d_am,
            d_lm,
            d_weight,
            d_bias,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    needs = make(Arguments, needs)
    d_am, d_lm, d_weight, d_bias = _gradients(op, kernels, grads, saved, needs)
    d_am = back(d_am, saved.am)
    d_lm = back(d_lm, saved.lm)
    d_weight = back(d_weight, saved.weight)
    d_bias = back(d_bias, saved.bias)
    return d_am, d_lm, d_weight, d_bias


apply = applied(TdtJoiner)


# --------------------------------------------------------------------------- the registered operator
def fake(
    am, lm, weight, bias, symbols, starts, s_range, durations, termination_symbol, boundary=None,
    activation='tanh', keep_logits=None, dropout_p=0.0, dropout_seed=None, keep=False,
):  # fmt: skip
    keep = keep and family.kernels(am, lm, weight, bias) is not None
    B = am.shape[0]
    T = am.shape[1]
    return (
        torch.empty((B, T, s_range), dtype=wide(am, lm, weight), device=am.device),
        torch.empty((B, T, s_range), dtype=wide(am, lm, weight), device=am.device),
        torch.empty((B, T, s_range, durations), dtype=wide(am, lm, weight), device=am.device),
        torch.empty((B, T, s_range) if keep else (0,), dtype=torch.float64, device=am.device),
    )


op.serve(
    tdt_joiner,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("symbol_logprobs", "blank_logprobs", "duration_logprobs", "normaliser"),
        deciding=("am", "lm", "weight", "bias"),
        differentiable=("am", "lm", "weight", "bias"),
        graded={"symbol_logprobs": "", "blank_logprobs": "", "duration_logprobs": ""},
        saves=("am", "lm", "weight", "bias", "symbols", "starts", "boundary", "dropout_seed", "normaliser"),
        kept=("normaliser",),
        asks=True,
        autocast=("weight", "bias"),
    ),
)
operator = register_op(
    op,
    "tdt_joiner(Tensor am, Tensor lm, Tensor weight, Tensor? bias, Tensor symbols, Tensor starts, SymInt "
    's_range, SymInt durations, SymInt termination_symbol, Tensor? boundary=None, str activation="tanh", '
    "bool? keep_logits=None, float dropout_p=0.0, Tensor? dropout_seed=None, bool keep=False) -> (Tensor, "
    "Tensor, Tensor, Tensor)",
    "tdt_joiner_backward(Tensor? grad_symbol_logprobs, Tensor? grad_blank_logprobs, Tensor? "
    "grad_duration_logprobs, Tensor am, Tensor lm, Tensor weight, Tensor? bias, Tensor symbols, Tensor "
    "starts, Tensor? boundary, Tensor? dropout_seed, Tensor normaliser, SymInt s_range, SymInt durations, "
    "SymInt termination_symbol, str activation, bool? keep_logits, float dropout_p, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
