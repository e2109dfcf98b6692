# SPDX-License-Identifier: Apache-2.0
# `make op OP=segment_attention` writes this file from fastasr/ops/segment_attention.py: change that one.
"""The Emformer's attention: every segment over its memory, right context, left context and itself, without a mask"""

from typing import NamedTuple

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, promote_types
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._layout import as_int64, dense_channels
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward
from fastasr.ops._runtime import (
    COMPUTE,
    INTEGERS,
    MASKS,
    NOT_MINE,
    applied,
    back,
    is_batched,
    laid_out,
    listed,
    make,
    node_gradients,
    not_a_view,
    operand,
    promoted,
)
from fastasr.ops.segment_attention import _query_rows, _sizes
from fastasr.ops.segment_attention import segment_attention as formula

op = OPS["segment_attention"]
family = op.family


class Arguments(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    num_heads: int
    frames: int
    segment_length: int
    left_context_length: int = 0
    right_context_length: int = 0
    max_memory_size: int = 0
    past_frames: int = 0
    past_memory: int = 0
    lengths: Tensor | None = None
    history: Tensor | None = None
    weights_dropout: Tensor | None = None


class Saved(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor | None
    history: Tensor | None
    weights_dropout: Tensor | None
    num_heads: int
    frames: int
    segment_length: int
    left_context_length: int
    right_context_length: int
    max_memory_size: int
    past_frames: int
    past_memory: int


# --------------------------------------------------------------------------- the public function
def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    frames: int,
    segment_length: int,
    left_context_length: int = 0,
    right_context_length: int = 0,
    max_memory_size: int = 0,
    past_frames: int = 0,
    past_memory: int = 0,
    lengths: Tensor | None = None,
    history: Tensor | None = None,
    weights_dropout: Tensor | None = None,
) -> Tensor:
    """The Emformer's attention: every segment over its memory, right context, left context and itself, without a mask.

    Args:
        query: (Q, B, D), Q = n R + T and, where there is memory, n more: right-context blocks, utterance, summaries;
            n = ceil(T / S). float32, bfloat16, float16 or float64. Slices of a projection need no copy.
        key, value: (K, B, D), of query's dtype outside autocast; K = n R + l + T and, where there is memory,
            m + n − 1 more in front: memory, right-context blocks, left context of the past, utterance.
        num_heads: H; d = D / H channels each.
        frames: T. segment_length: S. left_context_length, right_context_length: L, R. max_memory_size: M.
        past_frames, past_memory: l, m: rows of an utterance's past among the keys.
        lengths: (B,) of integers: frames of each sequence that may be seen; default: all.
        history: (2,) of integers: how many of the past frames and of the past memory, counted from the end, may be
            seen; default: all. They are read on the device, so a stream needs no synchronisation.
        weights_dropout: (B, H, Q, M + R + L + S), multiplied on the weights after the softmax: by query and place in
            its window. Bool or floating, a constant.
    Returns:
        (Q, B, D) in query's dtype; 0 for a query that sees no key.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: sizes, shapes or devices do not match.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(query) in PLAIN
        and query.is_cpu
        and (dtype := query.dtype)
        and (query.is_contiguous() or query.stride(-1) == 1)
        and type(key) in PLAIN
        and type(value) in PLAIN
        and (lengths is None or type(lengths) in PLAIN)
        and (history is None or type(history) in PLAIN)
        and (
            weights_dropout is None
            or (
                type(weights_dropout) in PLAIN
                and weights_dropout.dtype is dtype
                and weights_dropout.dtype in COMPUTE
                and not weights_dropout.requires_grad
            )
        )
        and type(num_heads) is int
        and (num_heads >= 1)
        and type(frames) is int
        and (frames >= 0)
        and type(segment_length) is int
        and (segment_length >= 1)
        and type(left_context_length) is int
        and (left_context_length >= 0)
        and type(right_context_length) is int
        and (right_context_length >= 0)
        and type(max_memory_size) is int
        and (max_memory_size >= 0)
        and type(past_frames) is int
        and (past_frames >= 0)
        and type(past_memory) is int
        and (past_memory >= 0)
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
                return apply(
                    kernels, True, query, key, value, num_heads, frames, segment_length, left_context_length,
                    right_context_length, max_memory_size, past_frames, past_memory, lengths, history,
                    weights_dropout,
                )  # fmt: skip
            return kernels.forward(
                query, key, value, lengths, history, weights_dropout, num_heads, frames, segment_length,
                left_context_length, right_context_length, max_memory_size, past_frames, past_memory,
            )  # fmt: skip
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(
                query, key, value, num_heads, frames, segment_length, left_context_length,
                right_context_length, max_memory_size, past_frames, past_memory, lengths, history,
                weights_dropout,
            )  # fmt: skip
            raise
    check(
        query, key, value, num_heads, frames, segment_length, left_context_length, right_context_length,
        max_memory_size, past_frames, past_memory, lengths, history, weights_dropout,
    )  # fmt: skip
    if is_compiling() or not (
        type(query) in PLAIN
        and type(key) in PLAIN
        and type(value) in PLAIN
        and (lengths is None or type(lengths) in PLAIN)
        and (history is None or type(history) in PLAIN)
        and (weights_dropout is None or type(weights_dropout) in PLAIN)
    ):
        return traced(
            query, key, value, num_heads, frames, segment_length, left_context_length, right_context_length,
            max_memory_size, past_frames, past_memory, lengths, history, weights_dropout,
        )  # fmt: skip
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(query, key, value, num_heads, frames, segment_length, left_context_length,
            right_context_length, max_memory_size, past_frames, past_memory, lengths, history,
            weights_dropout),
        )  # fmt: skip
    kernels = family.kernels(query)
    if kernels is None:
        return laid_out(
            op, formula(query, key, value, num_heads=num_heads, frames=frames, segment_length=segment_length,
            left_context_length=left_context_length, right_context_length=right_context_length,
            max_memory_size=max_memory_size, past_frames=past_frames, past_memory=past_memory,
            lengths=lengths, history=history, weights_dropout=weights_dropout),
        )  # fmt: skip
    cast_dtype = autocast_dtype(query)
    if cast_dtype is not None:
        query, key, value = cast(cast_dtype, query, key, value)
        kernels = family.kernels(query)
        if kernels is None:
            return formula(
                query, key, value, num_heads=num_heads, frames=frames, segment_length=segment_length,
                left_context_length=left_context_length, right_context_length=right_context_length,
                max_memory_size=max_memory_size, past_frames=past_frames, past_memory=past_memory,
                lengths=lengths, history=history, weights_dropout=weights_dropout,
            )  # fmt: skip
    try:
        if is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return apply(
                kernels, False, query, key, value, num_heads, frames, segment_length, left_context_length,
                right_context_length, max_memory_size, past_frames, past_memory, lengths, history,
                weights_dropout,
            )  # fmt: skip
        y = run_kernels(
            kernels, query, key, value, num_heads, frames, segment_length, left_context_length,
            right_context_length, max_memory_size, past_frames, past_memory, lengths, history,
            weights_dropout,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, query)
        return formula(
            query, key, value, num_heads=num_heads, frames=frames, segment_length=segment_length,
            left_context_length=left_context_length, right_context_length=right_context_length,
            max_memory_size=max_memory_size, past_frames=past_frames, past_memory=past_memory,
            lengths=lengths, history=history, weights_dropout=weights_dropout,
        )  # fmt: skip
    return y


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    frames: int,
    segment_length: int,
    left_context_length: int,
    right_context_length: int,
    max_memory_size: int,
    past_frames: int,
    past_memory: int,
    lengths: Tensor | None,
    history: Tensor | None,
    weights_dropout: Tensor | None,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(num_heads) is not int:
        op.wrong_int("num_heads", num_heads)
    if not (num_heads >= 1):
        op.fail("num_heads", "at least 1", num_heads)
    if type(frames) is not int:
        op.wrong_int("frames", frames)
    if not (frames >= 0):
        op.fail("frames", "at least 0", frames)
    if type(segment_length) is not int:
        op.wrong_int("segment_length", segment_length)
    if not (segment_length >= 1):
        op.fail("segment_length", "at least 1", segment_length)
    if type(left_context_length) is not int:
        op.wrong_int("left_context_length", left_context_length)
    if not (left_context_length >= 0):
        op.fail("left_context_length", "at least 0", left_context_length)
    if type(right_context_length) is not int:
        op.wrong_int("right_context_length", right_context_length)
    if not (right_context_length >= 0):
        op.fail("right_context_length", "at least 0", right_context_length)
    if type(max_memory_size) is not int:
        op.wrong_int("max_memory_size", max_memory_size)
    if not (max_memory_size >= 0):
        op.fail("max_memory_size", "at least 0", max_memory_size)
    if type(past_frames) is not int:
        op.wrong_int("past_frames", past_frames)
    if not (past_frames >= 0):
        op.fail("past_frames", "at least 0", past_frames)
    if type(past_memory) is not int:
        op.wrong_int("past_memory", past_memory)
    if not (past_memory >= 0):
        op.fail("past_memory", "at least 0", past_memory)
    if not isinstance(query, Tensor) or query.dtype not in FLOATING or query.layout is not torch.strided:
        op.wrong_tensor("query", query)
    shape, right = query.shape, False
    if len(shape) == 3:
        B = shape[1]
        D = shape[2] // num_heads
        right = shape[2] % num_heads == 0 and D >= 1
    if not right:
        op.wrong_shape("query", query, f"{listed('N', 'B', f'{num_heads}*D')}, D >= 1")
    Q, K, lanes = _sizes(
        Arguments(query, key, value, num_heads, frames, segment_length, left_context_length,
        right_context_length, max_memory_size, past_frames, past_memory, lengths, history, weights_dropout),
    )  # fmt: skip
    if not isinstance(key, Tensor) or key.dtype not in FLOATING or key.layout is not torch.strided:
        op.wrong_tensor("key", key)
    if key.shape != (K, B, num_heads * D):
        op.wrong_shape("key", key, listed(K, B, num_heads * D))
    if key.device != query.device:
        op.wrong_device("key", key, "query", query)
    if not isinstance(value, Tensor) or value.dtype not in FLOATING or value.layout is not torch.strided:
        op.wrong_tensor("value", value)
    if value.shape != (K, B, num_heads * D):
        op.wrong_shape("value", value, listed(K, B, num_heads * D))
    if value.device != query.device:
        op.wrong_device("value", value, "query", query)
    if lengths is not None:
        if (
            not isinstance(lengths, Tensor)
            or lengths.dtype not in INTEGERS
            or lengths.layout is not torch.strided
        ):
            op.wrong_tensor("lengths", lengths, "a tensor of integers")
        if lengths.shape != (B,):
            op.wrong_shape("lengths", lengths, listed(B))
        if lengths.device != query.device:
            op.wrong_device("lengths", lengths, "query", query)
    if history is not None:
        if (
            not isinstance(history, Tensor)
            or history.dtype not in INTEGERS
            or history.layout is not torch.strided
        ):
            op.wrong_tensor("history", history, "a tensor of integers")
        if history.shape != (2,):
            op.wrong_shape("history", history, listed(2))
        if history.device != query.device:
            op.wrong_device("history", history, "query", query)
    if weights_dropout is not None:
        if (
            not isinstance(weights_dropout, Tensor)
            or weights_dropout.dtype not in MASKS
            or weights_dropout.layout is not torch.strided
        ):
            op.wrong_tensor("weights_dropout", weights_dropout, "a bool or floating tensor")
        if weights_dropout.requires_grad:
            op.fail("weights_dropout", "a constant", "a tensor that requires a gradient")
        if weights_dropout.shape != (B, num_heads, Q, lanes):
            op.wrong_shape("weights_dropout", weights_dropout, listed(B, num_heads, Q, lanes))
        if weights_dropout.device != query.device:
            op.wrong_device("weights_dropout", weights_dropout, "query", query)
    if key.dtype is not query.dtype and autocast_dtype(query) is None:
        op.wrong_dtype("key", key, "query", query)
    if value.dtype is not query.dtype and autocast_dtype(query) is None:
        op.wrong_dtype("value", value, "query", query)
    _query_rows(
        op, make(Arguments, (query, key, value, num_heads, frames, segment_length, left_context_length,
        right_context_length, max_memory_size, past_frames, past_memory, lengths, history, weights_dropout,)),
    )  # fmt: skip


def traced(
    query, key, value, num_heads, frames, segment_length, left_context_length, right_context_length,
    max_memory_size, past_frames, past_memory, lengths, history, weights_dropout,
):  # fmt: skip
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("segment_attention", query):
        return formula(
            query, key, value, num_heads=num_heads, frames=frames, segment_length=segment_length,
            left_context_length=left_context_length, right_context_length=right_context_length,
            max_memory_size=max_memory_size, past_frames=past_frames, past_memory=past_memory,
            lengths=lengths, history=history, weights_dropout=weights_dropout,
        )  # fmt: skip
    return operator(
        query, key, value, num_heads, frames, segment_length, left_context_length, right_context_length,
        max_memory_size, past_frames, past_memory, lengths, history, weights_dropout,
    )  # fmt: skip


def run_kernels(
    kernels, query, key, value, num_heads, frames, segment_length, left_context_length, right_context_length,
    max_memory_size, past_frames, past_memory, lengths, history, weights_dropout,
):  # fmt: skip
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(query)
    dtype = y_dtype if kernels.backend == "cpu" else None
    work = None if kernels.backend == "triton" else promote_types(y_dtype, torch.float32)
    y = kernels.forward(
        operand(query, dtype, dense_channels), operand(key, dtype, dense_channels), operand(value, dtype,
        dense_channels), operand(lengths, None, as_int64), operand(history, None, as_int64),
        operand(weights_dropout, work), num_heads, frames, segment_length, left_context_length,
        right_context_length, max_memory_size, past_frames, past_memory,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    return y


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.query),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class SegmentAttention(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, query, key, value, num_heads, frames, segment_length, left_context_length,
        right_context_length, max_memory_size, past_frames, past_memory, lengths, history, weights_dropout,
    ):  # fmt: skip
        if direct:
            y = kernels.forward(
                query, key, value, lengths, history, weights_dropout, num_heads, frames, segment_length,
                left_context_length, right_context_length, max_memory_size, past_frames, past_memory,
            )  # fmt: skip
        else:
            y = run_kernels(
                kernels, query, key, value, num_heads, frames, segment_length, left_context_length,
                right_context_length, max_memory_size, past_frames, past_memory, lengths, history,
                weights_dropout,
            )  # fmt: skip
        y = not_a_view(y)
        ctx.save_for_backward(query, key, value, lengths, history, weights_dropout)
        ctx.rest = (
            kernels,
            direct,
            num_heads,
            frames,
            segment_length,
            left_context_length,
            right_context_length,
            max_memory_size,
            past_frames,
            past_memory,
        )
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("segment_attention")
        # once: a checkpoint gives them one time
        query, key, value, lengths, history, weights_dropout = ctx.saved_tensors
        (
            kernels,
            direct,
            num_heads,
            frames,
            segment_length,
            left_context_length,
            right_context_length,
            max_memory_size,
            past_frames,
            past_memory,
        ) = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_query, d_key, d_value = kernels.backward(
                operand(grad_y, None, dense_channels), query, key, value, lengths, history, weights_dropout,
                num_heads, frames, segment_length, left_context_length, right_context_length, max_memory_size,
                past_frames, past_memory,
            )  # fmt: skip
            return (
                None,
                None,
                d_query,
                d_key,
                d_value,
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
                None,
            )
        d_query, d_key, d_value = node_gradients(
            op, kernels, (grad_y,), make(Saved, (query, key, value, lengths, history, weights_dropout,
            num_heads, frames, segment_length, left_context_length, right_context_length, max_memory_size,
            past_frames, past_memory,)),
        )  # fmt: skip
        return (
            None,
            None,
            d_query,
            d_key,
            d_value,
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
            None,
        )


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    (grad_y,) = grads
    dtype = promoted(saved.query) if kernels.backend == "cpu" else None
    work = None if kernels.backend == "triton" else promote_types(promoted(saved.query), torch.float32)
    d_query, d_key, d_value = kernels.backward(
        operand(grad_y, dtype, dense_channels), operand(saved.query, dtype, dense_channels),
        operand(saved.key, dtype, dense_channels), operand(saved.value, dtype, dense_channels),
        operand(saved.lengths, None, as_int64), operand(saved.history, None, as_int64),
        operand(saved.weights_dropout, work), saved.num_heads, saved.frames, saved.segment_length,
        saved.left_context_length, saved.right_context_length, saved.max_memory_size, saved.past_frames,
        saved.past_memory,
    )  # fmt: skip
    d_query = back(d_query, saved.query)
    d_key = back(d_key, saved.key)
    d_value = back(d_value, saved.value)
    return d_query, d_key, d_value


apply = applied(SegmentAttention)


# --------------------------------------------------------------------------- the registered operator
def fake(
    query, key, value, num_heads, frames, segment_length, left_context_length=0, right_context_length=0,
    max_memory_size=0, past_frames=0, past_memory=0, lengths=None, history=None, weights_dropout=None,
):  # fmt: skip
    N = query.shape[0]
    B = query.shape[1]
    D = query.shape[2] // num_heads
    Q, K, lanes = _sizes(
        Arguments(query, key, value, num_heads, frames, segment_length, left_context_length,
        right_context_length, max_memory_size, past_frames, past_memory, lengths, history, weights_dropout),
    )  # fmt: skip
    return torch.empty((N, B, num_heads * D), dtype=promoted(query), device=query.device)


op.serve(
    segment_attention,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y",),
        deciding=("query",),
        differentiable=("query", "key", "value"),
        graded={"y": ""},
        saves=("query", "key", "value", "lengths", "history", "weights_dropout"),
        autocast=("query", "key", "value"),
    ),
)
operator = register_op(
    op,
    "segment_attention(Tensor query, Tensor key, Tensor value, SymInt num_heads, SymInt frames, SymInt "
    "segment_length, SymInt left_context_length=0, SymInt right_context_length=0, SymInt "
    "max_memory_size=0, SymInt past_frames=0, SymInt past_memory=0, Tensor? lengths=None, Tensor? "
    "history=None, Tensor? weights_dropout=None) -> Tensor",
    "segment_attention_backward(Tensor grad_y, Tensor query, Tensor key, Tensor value, Tensor? lengths, "
    "Tensor? history, Tensor? weights_dropout, SymInt num_heads, SymInt frames, SymInt segment_length, "
    "SymInt left_context_length, SymInt right_context_length, SymInt max_memory_size, SymInt past_frames, "
    "SymInt past_memory) -> (Tensor, Tensor, Tensor)",
)
