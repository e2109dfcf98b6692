# SPDX-License-Identifier: Apache-2.0
# `make op OP=rnnt_lattice` writes this file from fastasr/ops/rnnt_lattice.py: change that one.
"""the log of the summed probability of all paths through each lattice"""

from typing import Literal, NamedTuple, overload

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
from fastasr.ops.rnnt_lattice import _call, _check, _kept_shape, _launch
from fastasr.ops.rnnt_lattice import rnnt_lattice as formula

op = OPS["rnnt_lattice"]
family = op.family


class Arguments(NamedTuple):
    symbol_logprobs: Tensor
    blank_logprobs: Tensor
    boundary: Tensor | None = None
    return_occupation: bool = False


class Saved(NamedTuple):
    symbol_logprobs: Tensor
    blank_logprobs: Tensor
    boundary: Tensor | None
    scores: Tensor
    shares: Tensor
    return_occupation: bool


# --------------------------------------------------------------------------- the public function
@overload
def rnnt_lattice(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    boundary: Tensor | None = None,
    *,
    return_occupation: Literal[False] = False,
) -> Tensor: ...
@overload
def rnnt_lattice(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    boundary: Tensor | None = None,
    *,
    return_occupation: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def rnnt_lattice(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    boundary: Tensor | None = None,
    *,
    return_occupation: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...
def rnnt_lattice(
    symbol_logprobs: Tensor,
    blank_logprobs: Tensor,
    boundary: Tensor | None = None,
    *,
    return_occupation: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Returns the log of the summed probability of all paths through each lattice.

    Args:
        symbol_logprobs: (B, S, T+1) for the regular lattice, (B, S, T) for the modified one, where a symbol takes a
            frame: log probability of symbol s+1 in cell (s, t). float32, bfloat16, float16 or float64. Values below
            -2^80 count as -inf; a NaN or +inf inside the boundary makes the sequence's score and occupations NaN.
        blank_logprobs: (B, S+1, T), log probability of a blank in cell (s, t).
        boundary: (B, 4) int64, [s_begin, t_begin, s_end, t_end] of each sequence; None: [0, 0, S, T]. The symbol arcs
            of frame t_end are part of a regular lattice.
        return_occupation: return occupations too.
    Returns:
        scores (B,), of float64 if an argument is, else of float32; -inf where no path reaches the end. With
        ``return_occupation`` (scores, symbol_occupation, blank_occupation): the gradients of the scores in the scores'
        dtype and the arguments' shapes, 0 outside the boundary and where no path reaches the end. They are constants
        for autograd; the scores are differentiable.
    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes or devices do not match; a boundary that is not inside the lattice (on a GPU it is moved
            inside instead: reading it would stall the GPU).
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
        and blank_logprobs.is_cpu
        and blank_logprobs.dtype is dtype
        and (boundary is None or (type(boundary) in PLAIN and boundary.is_cpu))
        and type(return_occupation) is bool
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (symbol_logprobs.requires_grad or blank_logprobs.requires_grad):
                return apply(kernels, True, symbol_logprobs, blank_logprobs, boundary, return_occupation)
            scores, symbol_occupation, blank_occupation, _ = _call(
                kernels, False, symbol_logprobs, blank_logprobs, boundary, return_occupation
            )
            return (scores, symbol_occupation, blank_occupation) if return_occupation else scores
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(symbol_logprobs, blank_logprobs, boundary, return_occupation)
            raise
    check(symbol_logprobs, blank_logprobs, boundary, return_occupation)
    if is_compiling() or not (
        type(symbol_logprobs) in PLAIN
        and type(blank_logprobs) in PLAIN
        and (boundary is None or type(boundary) in PLAIN)
    ):
        return traced(symbol_logprobs, blank_logprobs, boundary, return_occupation)
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(op, Arguments(symbol_logprobs, blank_logprobs, boundary, return_occupation))
    kernels = family.kernels(symbol_logprobs, blank_logprobs)
    if kernels is None:
        return laid_out(
            op, formula(symbol_logprobs, blank_logprobs, boundary, return_occupation=return_occupation)
        )
    try:
        if is_grad_enabled() and (symbol_logprobs.requires_grad or blank_logprobs.requires_grad):
            return apply(kernels, False, symbol_logprobs, blank_logprobs, boundary, return_occupation)
        scores, symbol_occupation, blank_occupation, _ = run_kernels(
            kernels, symbol_logprobs, blank_logprobs, boundary, return_occupation, False
        )
    except Unlaunchable as error:
        family.give_up(error, symbol_logprobs, blank_logprobs)
        return formula(symbol_logprobs, blank_logprobs, boundary, return_occupation=return_occupation)
    return (scores, symbol_occupation, blank_occupation) if return_occupation else scores


def check(
    symbol_logprobs: Tensor, blank_logprobs: Tensor, boundary: Tensor | None, return_occupation: bool
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(return_occupation) is not bool:
        op.wrong_flag("return_occupation", return_occupation)
    if (
        not isinstance(symbol_logprobs, Tensor)
        or symbol_logprobs.dtype not in FLOATING
        or symbol_logprobs.layout is not torch.strided
    ):
        op.wrong_tensor("symbol_logprobs", symbol_logprobs)
    shape, right = symbol_logprobs.shape, False
    if len(shape) == 3:
        B = shape[0]
        S = shape[1]
        right = True
    if not right:
        op.wrong_shape("symbol_logprobs", symbol_logprobs, listed("B", "S", "W"))
    if (
        not isinstance(blank_logprobs, Tensor)
        or blank_logprobs.dtype not in FLOATING
        or blank_logprobs.layout is not torch.strided
    ):
        op.wrong_tensor("blank_logprobs", blank_logprobs)
    shape, right = blank_logprobs.shape, False
    if len(shape) == 3:
        right = shape[0] == B and shape[1] == S + 1
    if not right:
        op.wrong_shape("blank_logprobs", blank_logprobs, listed(B, S + 1, "T"))
    if blank_logprobs.device != symbol_logprobs.device:
        op.wrong_device("blank_logprobs", blank_logprobs, "symbol_logprobs", symbol_logprobs)
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
    _check(op, make(Arguments, (symbol_logprobs, blank_logprobs, boundary, return_occupation)))


def traced(symbol_logprobs, blank_logprobs, boundary, return_occupation):
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("rnnt_lattice", symbol_logprobs, blank_logprobs):
        return formula(symbol_logprobs, blank_logprobs, boundary, return_occupation=return_occupation)
    scores, symbol_occupation, blank_occupation, _ = operator(
        symbol_logprobs, blank_logprobs, boundary, return_occupation, is_grad_enabled() and
        (symbol_logprobs.requires_grad or blank_logprobs.requires_grad),
    )  # fmt: skip
    return (scores, symbol_occupation, blank_occupation) if return_occupation else scores


def run_kernels(kernels, symbol_logprobs, blank_logprobs, boundary, return_occupation, keep):
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    scores_dtype = wide(symbol_logprobs, blank_logprobs)
    scores, symbol_occupation, blank_occupation, shares = _launch(
        op, kernels, make(Arguments, (symbol_logprobs, blank_logprobs, boundary, return_occupation,)),
        scores_dtype, keep,
    )  # fmt: skip
    if scores.dtype is not scores_dtype:
        scores = scores.to(scores_dtype)
    if symbol_occupation.dtype is not scores_dtype:
        symbol_occupation = symbol_occupation.to(scores_dtype)
    if blank_occupation.dtype is not scores_dtype:
        blank_occupation = blank_occupation.to(scores_dtype)
    if shares.dtype is not scores_dtype:
        shares = shares.to(scores_dtype)
    return scores, symbol_occupation, blank_occupation, shares


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (
        wide(a.symbol_logprobs, a.blank_logprobs),
        wide(a.symbol_logprobs, a.blank_logprobs),
        wide(a.symbol_logprobs, a.blank_logprobs),
        wide(a.symbol_logprobs, a.blank_logprobs),
    )


# --------------------------------------------------------------------------- gradients without the dispatcher
class RnntLattice(Function):
    @staticmethod
    def forward(ctx, kernels, direct, symbol_logprobs, blank_logprobs, boundary, return_occupation):
        if direct:
            scores, symbol_occupation, blank_occupation, shares = _call(
                kernels, True, symbol_logprobs, blank_logprobs, boundary, return_occupation
            )
        else:
            scores, symbol_occupation, blank_occupation, shares = run_kernels(
                kernels, symbol_logprobs, blank_logprobs, boundary, return_occupation, True
            )
        scores = not_a_view(scores)
        symbol_occupation = not_a_view(symbol_occupation)
        blank_occupation = not_a_view(blank_occupation)
        ctx.save_for_backward(boundary, scores, shares)
        ctx.rest = (
            kernels,
            direct,
            return_occupation,
            (symbol_logprobs.shape, symbol_logprobs.dtype),
            (blank_logprobs.shape, blank_logprobs.dtype),
        )
        if return_occupation:
            ctx.mark_non_differentiable(symbol_occupation, blank_occupation)
        return (scores, symbol_occupation, blank_occupation) if return_occupation else scores

    @staticmethod
    def backward(ctx, grad_scores, *_):
        if is_grad_enabled():
            refuse_double_backward("rnnt_lattice")
        # once: a checkpoint gives them one time
        boundary, scores, shares = ctx.saved_tensors
        kernels, direct, return_occupation, symbol_logprobs, blank_logprobs = ctx.rest
        symbol_logprobs = make(Like, symbol_logprobs)
        blank_logprobs = make(Like, blank_logprobs)
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_scores is not None and is_batched(grad_scores))
        ):
            d_symbol_logprobs, d_blank_logprobs = kernels.backward(
                operand(grad_scores, None), scores, shares, boundary, symbol_logprobs.shape[1],
                symbol_logprobs.shape[2], blank_logprobs.shape[2],
            )  # fmt: skip
            return None, None, d_symbol_logprobs, d_blank_logprobs, None, None
        d_symbol_logprobs, d_blank_logprobs = node_gradients(
            op, kernels, (grad_scores,), make(Saved, (symbol_logprobs, blank_logprobs, boundary, scores,
            shares, return_occupation,)),
        )  # fmt: skip
        return None, None, d_symbol_logprobs, d_blank_logprobs, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    (grad_scores,) = grads
    dtype = wide(saved.symbol_logprobs, saved.blank_logprobs) if kernels.backend == "cpu" else None
    d_symbol_logprobs, d_blank_logprobs = kernels.backward(
        operand(grad_scores, dtype), saved.scores, saved.shares, operand(saved.boundary, None),
        saved.symbol_logprobs.shape[1], saved.symbol_logprobs.shape[2], saved.blank_logprobs.shape[2],
    )  # fmt: skip
    d_symbol_logprobs = back(d_symbol_logprobs, saved.symbol_logprobs)
    d_blank_logprobs = back(d_blank_logprobs, saved.blank_logprobs)
    return d_symbol_logprobs, d_blank_logprobs


apply = applied(RnntLattice)


# --------------------------------------------------------------------------- the registered operator
def fake(symbol_logprobs, blank_logprobs, boundary=None, return_occupation=False, keep=False):
    keep = keep and family.kernels(symbol_logprobs, blank_logprobs) is not None
    B = symbol_logprobs.shape[0]
    S = symbol_logprobs.shape[1]
    W = symbol_logprobs.shape[2]
    T = blank_logprobs.shape[2]
    arguments = Arguments(symbol_logprobs, blank_logprobs, boundary, return_occupation)
    return (
        torch.empty((B,), dtype=wide(symbol_logprobs, blank_logprobs), device=symbol_logprobs.device),
        torch.empty(
            (B, S, W) if return_occupation else (0,),
            dtype=wide(symbol_logprobs, blank_logprobs),
            device=symbol_logprobs.device,
        ),
        torch.empty(
            (B, S + 1, T) if return_occupation else (0,),
            dtype=wide(symbol_logprobs, blank_logprobs),
            device=symbol_logprobs.device,
        ),
        torch.empty(
            _kept_shape(family.kernels(symbol_logprobs, blank_logprobs).backend, arguments) if keep else (0,),
            dtype=wide(symbol_logprobs, blank_logprobs),
            device=symbol_logprobs.device,
        ),
    )


op.serve(
    rnnt_lattice,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("scores", "symbol_occupation", "blank_occupation", "shares"),
        deciding=("symbol_logprobs", "blank_logprobs"),
        differentiable=("symbol_logprobs", "blank_logprobs"),
        graded={"scores": ""},
        saves=("symbol_logprobs", "blank_logprobs", "boundary", "scores", "shares"),
        kept=("shares",),
        released=("symbol_logprobs", "blank_logprobs"),
    ),
)
operator = register_op(
    op,
    "rnnt_lattice(Tensor symbol_logprobs, Tensor blank_logprobs, Tensor? boundary=None, bool "
    "return_occupation=False, bool keep=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "rnnt_lattice_backward(Tensor grad_scores, Tensor symbol_logprobs, Tensor blank_logprobs, Tensor? "
    "boundary, Tensor scores, Tensor shares, bool return_occupation) -> (Tensor, Tensor)",
)
