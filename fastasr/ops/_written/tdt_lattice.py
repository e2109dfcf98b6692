# SPDX-License-Identifier: Apache-2.0
# `make op OP=tdt_lattice` writes this file from fastasr/ops/tdt_lattice.py: change that one.
"""the log of the summed probability of all paths through each lattice of tokens and durations"""

from typing import NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import refuse_double_backward
from fastasr.ops._runtime import (
    COMPUTE,
    INT64,
    NOT_MINE,
    Like,
    applied,
    back,
    is_batched,
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    operand,
    wide,
)
from fastasr.ops.tdt_lattice import _check, _kept_shape
from fastasr.ops.tdt_lattice import tdt_lattice as formula

op = OPS["tdt_lattice"]
family = op.family


class Arguments(NamedTuple):
    symbol_logprobs: Tensor
    blank_logprobs: Tensor
    duration_logprobs: Tensor
    durations: Tensor
    boundary: Tensor | None = None


class Saved(NamedTuple):
    symbol_logprobs: Tensor
    blank_logprobs: Tensor
    duration_logprobs: Tensor
    durations: Tensor
    boundary: Tensor | None
    scores: Tensor
    shares: Tensor


# --------------------------------------------------------------------------- the public function
def tdt_lattice(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    duration_logprobs: Tensor,
    durations: Tensor,
    boundary: Tensor | None = None,
) -> Tensor:
    """Returns the log of the summed probability of all paths through each lattice of tokens and durations.

    The last arc of a path is a blank that leads to t_end exactly; no symbol leads there.

    Args:
        symbol_logprobs: (B, T, S), log probability of symbol s+1 in cell (t, s). float32, bfloat16, float16 or float64;
            special values as in ``rnnt_lattice``.
        blank_logprobs: (B, T, S+1), log probability of a blank in cell (t, s).
        duration_logprobs: (B, T, S+1, N), log probability of each duration.
        durations: (N,) int64, different numbers of frames, in any order, with or without 0.
        boundary: (B, 4) int64, [s_begin, t_begin, s_end, t_end] of each sequence; None: [0, 0, S, T].
    Returns:
        scores (B,), of float64 if an argument is, else of float32; -inf where no path reaches the end, with gradients
        of 0. A sequence without frames scores 0 without symbols, else -inf.
    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes or devices do not match; on the CPU: a boundary that is not inside the lattice, durations
            that are negative or equal (on a GPU the boundary is moved inside, and nothing leads along a negative
            duration).
    """
    kernels = family.native
    if (
        kernels is not None
        and type(symbol_logprobs) in PLAIN
        and symbol_logprobs.is_cpu
        and (dtype := symbol_logprobs.dtype)
        and symbol_logprobs.dtype in COMPUTE
        and symbol_logprobs.is_contiguous()
        and type(blank_logprobs) in PLAIN
        and blank_logprobs.dtype is dtype
        and type(duration_logprobs) in PLAIN
        and duration_logprobs.dtype is dtype
        and type(durations) in PLAIN
        and (boundary is None or type(boundary) in PLAIN)
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                symbol_logprobs.requires_grad
                or blank_logprobs.requires_grad
                or duration_logprobs.requires_grad
            ):
                return apply(
                    kernels, True, symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary
                )
            scores, _ = kernels.forward(
                symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary, False
            )
            return scores
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary)
            raise
    check(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary)
    if is_compiling() or not (
        type(symbol_logprobs) in PLAIN
        and type(blank_logprobs) in PLAIN
        and type(duration_logprobs) in PLAIN
        and type(durations) in PLAIN
        and (boundary is None or type(boundary) in PLAIN)
    ):
        return traced(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary)
        )
    kernels = family.kernels(symbol_logprobs, blank_logprobs, duration_logprobs)
    if kernels is None:
        return laid_out(op, formula(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary))
    try:
        if is_grad_enabled() and (
            symbol_logprobs.requires_grad or blank_logprobs.requires_grad or duration_logprobs.requires_grad
        ):
            return apply(
                kernels, False, symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary
            )
        scores, _ = run_kernels(
            kernels, symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary, False
        )
    except Unlaunchable as error:
        family.give_up(error, symbol_logprobs, blank_logprobs, duration_logprobs)
        return formula(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary)
    return scores


def check(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    duration_logprobs: Tensor,
    durations: Tensor,
    boundary: Tensor | None,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if (
        not isinstance(symbol_logprobs, Tensor)
        or symbol_logprobs.dtype not in FLOATING
        or symbol_logprobs.layout is not torch.strided
    ):
        op.wrong_tensor("symbol_logprobs", symbol_logprobs)
    shape, right = symbol_logprobs.shape, False
    if len(shape) == 3:
        B = shape[0]
        T = shape[1]
        S = shape[2]
        right = True
    if not right:
        op.wrong_shape("symbol_logprobs", symbol_logprobs, listed("B", "T", "S"))
    if (
        not isinstance(blank_logprobs, Tensor)
        or blank_logprobs.dtype not in FLOATING
        or blank_logprobs.layout is not torch.strided
    ):
        op.wrong_tensor("blank_logprobs", blank_logprobs)
    if blank_logprobs.shape != (B, T, S + 1):
        op.wrong_shape("blank_logprobs", blank_logprobs, listed(B, T, S + 1))
    if blank_logprobs.device != symbol_logprobs.device:
        op.wrong_device("blank_logprobs", blank_logprobs, "symbol_logprobs", symbol_logprobs)
    if (
        not isinstance(duration_logprobs, Tensor)
        or duration_logprobs.dtype not in FLOATING
        or duration_logprobs.layout is not torch.strided
    ):
        op.wrong_tensor("duration_logprobs", duration_logprobs)
    shape, right = duration_logprobs.shape, False
    if len(shape) == 4:
        N = shape[3]
        right = shape[0] == B and shape[1] == T and shape[2] == S + 1
    if not right:
        op.wrong_shape("duration_logprobs", duration_logprobs, listed(B, T, S + 1, "N"))
    if duration_logprobs.device != symbol_logprobs.device:
        op.wrong_device("duration_logprobs", duration_logprobs, "symbol_logprobs", symbol_logprobs)
    if (
        not isinstance(durations, Tensor)
        or durations.dtype not in INT64
        or durations.layout is not torch.strided
    ):
        op.wrong_tensor("durations", durations, "an int64 tensor")
    if durations.shape != (N,):
        op.wrong_shape("durations", durations, listed(N))
    if durations.device != symbol_logprobs.device:
        op.wrong_device("durations", durations, "symbol_logprobs", symbol_logprobs)
    if boundary is not None:
        if (
            not isinstance(boundary, Tensor)
            or boundary.dtype not in INT64
            or boundary.layout is not torch.strided
        ):
            op.wrong_tensor("boundary", boundary, "an int64 tensor")
        if boundary.shape != (B, 4):
            op.wrong_shape("boundary", boundary, listed(B, 4))
        if boundary.device != symbol_logprobs.device:
            op.wrong_device("boundary", boundary, "symbol_logprobs", symbol_logprobs)
    _check(op, make(Arguments, (symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary)))


def traced(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("tdt_lattice", symbol_logprobs, blank_logprobs, duration_logprobs):
        return formula(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary)
    scores, _ = operator(
        symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary, is_grad_enabled() and
        (symbol_logprobs.requires_grad or blank_logprobs.requires_grad or duration_logprobs.requires_grad),
    )  # fmt: skip
    return scores


def run_kernels(kernels, symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary, keep):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    scores_dtype = wide(symbol_logprobs, blank_logprobs, duration_logprobs)
    dtype = scores_dtype if kernels.backend == "cpu" else None
    scores, shares = kernels.forward(
        operand(symbol_logprobs, dtype), operand(blank_logprobs, dtype), operand(duration_logprobs, dtype),
        operand(durations, None), operand(boundary, None), keep,
    )  # fmt: skip
    if scores.dtype is not scores_dtype:
        scores = scores.to(scores_dtype)
    if shares.dtype is not scores_dtype:
        shares = shares.to(scores_dtype)
    return scores, shares


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (
        wide(a.symbol_logprobs, a.blank_logprobs, a.duration_logprobs),
        wide(a.symbol_logprobs, a.blank_logprobs, a.duration_logprobs),
    )


# --------------------------------------------------------------------------- gradients without the dispatcher
class TdtLattice(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary
    ):
        if direct:
            scores, shares = kernels.forward(
                symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary, True
            )
        else:
            scores, shares = run_kernels(
                kernels, symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary, True
            )
        scores = not_a_view(scores)
        ctx.save_for_backward(durations, boundary, scores, shares)
        ctx.rest = (
            kernels,
            direct,
            (symbol_logprobs.shape, symbol_logprobs.dtype),
            (blank_logprobs.shape, blank_logprobs.dtype),
            (duration_logprobs.shape, duration_logprobs.dtype),
        )
        return scores

    @staticmethod
    def backward(ctx, grad_scores, *_):
        if is_grad_enabled():
            refuse_double_backward("tdt_lattice")
        # once: a checkpoint gives them one time
        durations, boundary, scores, shares = ctx.saved_tensors
        kernels, direct, symbol_logprobs, blank_logprobs, duration_logprobs = ctx.rest
        symbol_logprobs = make(Like, symbol_logprobs)
        blank_logprobs = make(Like, blank_logprobs)
        duration_logprobs = make(Like, duration_logprobs)
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_scores is not None and is_batched(grad_scores))
        ):
            d_symbol_logprobs, d_blank_logprobs, d_duration_logprobs = kernels.backward(
                operand(grad_scores, None), scores, shares, durations, boundary, symbol_logprobs.shape[1],
                symbol_logprobs.shape[2],
            )  # fmt: skip
            return None, None, d_symbol_logprobs, d_blank_logprobs, d_duration_logprobs, None, None
        d_symbol_logprobs, d_blank_logprobs, d_duration_logprobs = node_gradients(
            op, kernels, (grad_scores,), make(Saved, (symbol_logprobs, blank_logprobs, duration_logprobs,
            durations, boundary, scores, shares,)),
        )  # fmt: skip
        return None, None, d_symbol_logprobs, d_blank_logprobs, d_duration_logprobs, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    (grad_scores,) = grads
    dtype = (
        wide(saved.symbol_logprobs, saved.blank_logprobs, saved.duration_logprobs)
        if kernels.backend == "cpu"
        else None
    )
    d_symbol_logprobs, d_blank_logprobs, d_duration_logprobs = kernels.backward(
        operand(grad_scores, dtype), saved.scores, saved.shares, operand(saved.durations, None),
        operand(saved.boundary, None), saved.symbol_logprobs.shape[1], saved.symbol_logprobs.shape[2],
    )  # fmt: skip
    d_symbol_logprobs = back(d_symbol_logprobs, saved.symbol_logprobs)
    d_blank_logprobs = back(d_blank_logprobs, saved.blank_logprobs)
    d_duration_logprobs = back(d_duration_logprobs, saved.duration_logprobs)
    return d_symbol_logprobs, d_blank_logprobs, d_duration_logprobs


apply = applied(TdtLattice)


# --------------------------------------------------------------------------- the registered operator
def fake(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary=None, keep=False):
    keep = keep and family.kernels(symbol_logprobs, blank_logprobs, duration_logprobs) is not None
    B = symbol_logprobs.shape[0]
    arguments = Arguments(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary)
    return torch.empty(
        (B,), dtype=wide(symbol_logprobs, blank_logprobs, duration_logprobs), device=symbol_logprobs.device
    ), torch.empty(
        _kept_shape(family.kernels(symbol_logprobs, blank_logprobs, duration_logprobs).backend, arguments)
        if keep
        else (0,),
        dtype=wide(symbol_logprobs, blank_logprobs, duration_logprobs),
        device=symbol_logprobs.device,
    )


op.serve(
    tdt_lattice,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("scores", "shares"),
        deciding=("symbol_logprobs", "blank_logprobs", "duration_logprobs"),
        differentiable=("symbol_logprobs", "blank_logprobs", "duration_logprobs"),
        graded={"scores": ""},
        saves=(
            "symbol_logprobs",
            "blank_logprobs",
            "duration_logprobs",
            "durations",
            "boundary",
            "scores",
            "shares",
        ),
        kept=("shares",),
        released=("symbol_logprobs", "blank_logprobs", "duration_logprobs"),
    ),
)
operator = register_op(
    op,
    "tdt_lattice(Tensor symbol_logprobs, Tensor blank_logprobs, Tensor duration_logprobs, Tensor "
    "durations, Tensor? boundary=None, bool keep=False) -> (Tensor, Tensor)",
    "tdt_lattice_backward(Tensor grad_scores, Tensor symbol_logprobs, Tensor blank_logprobs, Tensor "
    "duration_logprobs, Tensor durations, Tensor? boundary, Tensor scores, Tensor shares) -> (Tensor, "
    "Tensor, Tensor)",
)
