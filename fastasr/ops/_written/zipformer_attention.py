# SPDX-License-Identifier: Apache-2.0
# `make op OP=zipformer_attention` writes this file from fastasr/ops/zipformer_attention.py: change that one.
"""softmax_j(q[i]·k[j] + p[i]·pos[T−1−i+j]) · value, without the weights in memory"""

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
    BOOL,
    INT64,
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
    wide,
)
from fastasr.ops.zipformer_attention import _check, _remainder_shape, _statistics_shape
from fastasr.ops.zipformer_attention import zipformer_attention as formula

op = OPS["zipformer_attention"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor
    pos: Tensor | None
    value: Tensor
    num_heads: int
    query_head_dim: int
    value_heads: int | None = None
    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    starts: Tensor | None = None
    chunk_size: int = -1
    left_context_chunks: int = -1
    cached_key: Tensor | None = None
    score_penalty: float = 0.0
    score_limit: float = 25.0
    act: Tensor | None = None
    equal: Tensor | None = None


class Saved(NamedTuple):
    x: Tensor
    pos: Tensor | None
    value: Tensor
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    starts: Tensor | None
    cached_key: Tensor | None
    act: Tensor | None
    equal: Tensor | None
    y: Tensor
    statistics: Tensor
    remainder: Tensor
    num_heads: int
    query_head_dim: int
    value_heads: int | None
    chunk_size: int
    left_context_chunks: int
    score_penalty: float
    score_limit: float


# --------------------------------------------------------------------------- the public function
def zipformer_attention(
    x: Tensor,
    pos: Tensor | None,
    value: Tensor,
    num_heads: int,
    query_head_dim: int,
    *,
    value_heads: int | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = -1,
    left_context_chunks: int = -1,
    cached_key: Tensor | None = None,
    score_penalty: float = 0.0,
    score_limit: float = 25.0,
    act: Tensor | None = None,
    equal: Tensor | None = None,
) -> Tensor:
    """softmax_j(q[i]·k[j] + p[i]·pos[T−1−i+j]) · value, without the weights in memory.

    Args:
        x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size, left_context_chunks,
            cached_key: as for :func:`fastasr.ops.zipformer_attention_weights`.
        value: (left + T, B, value_heads·dv), of x's dtype.
        value_heads: how many of the heads, from the first on, have values; None: all.
        score_penalty, score_limit: the gradient of every score s of these heads with |s| > score_limit, hidden or not,
            gets score_penalty · sign(s), but for keys of other recordings; values are not changed.
        act: one number on the device of x. If it is 0, there is no penalty.
        equal: one number on the device of x. If it is not 0, the weights are equal on all keys whose weight, rounded to
            the dtype of the weights, is not 0; no gradient but that of the penalty flows to x, pos and cached_key then.
    Returns:
        (T, B, value_heads·dv), of x's dtype (autocast's under autocast), accumulated in float32 or better. A query that
        sees no key gets the mean of all values, of its recording with ``starts``, and 0 if it belongs to none.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; a number is out of range.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (dtype := x.dtype)
        and x.is_contiguous()
        and (pos is None or type(pos) in PLAIN)
        and type(value) in PLAIN
        and (key_padding_mask is None or type(key_padding_mask) in PLAIN)
        and (attn_mask is None or type(attn_mask) in PLAIN)
        and (starts is None or type(starts) in PLAIN)
        and (cached_key is None or type(cached_key) in PLAIN)
        and (act is None or (type(act) in PLAIN and act.dtype is dtype and not act.requires_grad))
        and (equal is None or (type(equal) in PLAIN and equal.dtype is dtype and not equal.requires_grad))
        and type(num_heads) is int
        and (num_heads >= 1)
        and type(query_head_dim) is int
        and (query_head_dim >= 1)
        and (value_heads is None or (type(value_heads) is int and (value_heads >= 1)))
        and type(chunk_size) is int
        and (chunk_size == -1 or chunk_size > 0)
        and type(left_context_chunks) is int
        and (left_context_chunks >= -1)
        and type(score_penalty) is float
        and (score_penalty >= 0 and score_penalty < 1e999)
        and type(score_limit) is float
        and (score_limit >= 0 and score_limit < 1e999)
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad
                or (pos is not None and pos.requires_grad)
                or value.requires_grad
                or (cached_key is not None and cached_key.requires_grad)
            ):
                return apply(
                    kernels, True, x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask,
                    attn_mask, starts, chunk_size, left_context_chunks, cached_key, score_penalty,
                    score_limit, act, equal,
                )  # fmt: skip
            y, _, _ = kernels.forward(
                x, pos, value, cached_key, key_padding_mask, attn_mask, starts, num_heads, query_head_dim,
                (value_heads or num_heads), chunk_size, left_context_chunks, equal, False,
            )  # fmt: skip
            return y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(
                x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask, attn_mask, starts,
                chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act, equal,
            )  # fmt: skip
            raise
    check(
        x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask, attn_mask, starts,
        chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act, equal,
    )  # fmt: skip
    if is_compiling() or not (
        type(x) in PLAIN
        and (pos is None or type(pos) in PLAIN)
        and type(value) in PLAIN
        and (key_padding_mask is None or type(key_padding_mask) in PLAIN)
        and (attn_mask is None or type(attn_mask) in PLAIN)
        and (starts is None or type(starts) in PLAIN)
        and (cached_key is None or type(cached_key) in PLAIN)
        and (act is None or type(act) in PLAIN)
        and (equal is None or type(equal) in PLAIN)
    ):
        return traced(
            x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask, attn_mask, starts,
            chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act, equal,
        )  # fmt: skip
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask, attn_mask,
            starts, chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act, equal),
        )  # fmt: skip
    kernels = family.kernels(x)
    if kernels is None:
        return laid_out(
            op, formula(x, pos, value, num_heads, query_head_dim, value_heads=value_heads,
            key_padding_mask=key_padding_mask, attn_mask=attn_mask, starts=starts, chunk_size=chunk_size,
            left_context_chunks=left_context_chunks, cached_key=cached_key, score_penalty=score_penalty,
            score_limit=score_limit, act=act, equal=equal),
        )  # fmt: skip
    cast_dtype = autocast_dtype(x)
    if cast_dtype is not None:
        x, pos, value, cached_key = cast(cast_dtype, x, pos, value, cached_key)
        kernels = family.kernels(x)
        if kernels is None:
            return formula(
                x, pos, value, num_heads, query_head_dim, value_heads=value_heads,
                key_padding_mask=key_padding_mask, attn_mask=attn_mask, starts=starts, chunk_size=chunk_size,
                left_context_chunks=left_context_chunks, cached_key=cached_key, score_penalty=score_penalty,
                score_limit=score_limit, act=act, equal=equal,
            )  # fmt: skip
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or (pos is not None and pos.requires_grad)
            or value.requires_grad
            or (cached_key is not None and cached_key.requires_grad)
        ):
            return apply(
                kernels, False, x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask,
                attn_mask, starts, chunk_size, left_context_chunks, cached_key, score_penalty, score_limit,
                act, equal,
            )  # fmt: skip
        y, _, _ = run_kernels(
            kernels, x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask, attn_mask,
            starts, chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act, equal,
            False,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, x)
        return formula(
            x, pos, value, num_heads, query_head_dim, value_heads=value_heads,
            key_padding_mask=key_padding_mask, attn_mask=attn_mask, starts=starts, chunk_size=chunk_size,
            left_context_chunks=left_context_chunks, cached_key=cached_key, score_penalty=score_penalty,
            score_limit=score_limit, act=act, equal=equal,
        )  # fmt: skip
    return y


def check(
    x: Tensor,
    pos: Tensor | None,
    value: Tensor,
    num_heads: int,
    query_head_dim: int,
    value_heads: int | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    left_context_chunks: int,
    cached_key: Tensor | None,
    score_penalty: float,
    score_limit: float,
    act: Tensor | None,
    equal: Tensor | None,
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(num_heads) is not int:
        op.wrong_int("num_heads", num_heads)
    if not (num_heads >= 1):
        op.fail("num_heads", "at least 1", num_heads)
    if type(query_head_dim) is not int:
        op.wrong_int("query_head_dim", query_head_dim)
    if not (query_head_dim >= 1):
        op.fail("query_head_dim", "at least 1", query_head_dim)
    if value_heads is not None:
        if type(value_heads) is not int:
            op.wrong_int("value_heads", value_heads)
        if not (value_heads >= 1):
            op.fail("value_heads", "at least 1", value_heads)
    if type(chunk_size) is not int:
        op.wrong_int("chunk_size", chunk_size)
    if not (chunk_size == -1 or chunk_size > 0):
        op.fail("chunk_size", "-1 or more than 0", chunk_size)
    if type(left_context_chunks) is not int:
        op.wrong_int("left_context_chunks", left_context_chunks)
    if not (left_context_chunks >= -1):
        op.fail("left_context_chunks", "at least -1", left_context_chunks)
    if type(score_penalty) is not float:
        op.wrong_float("score_penalty", score_penalty)
    if not (score_penalty >= 0 and score_penalty < 1e999):
        op.fail("score_penalty", "at least 0 and less than inf", score_penalty)
    if type(score_limit) is not float:
        op.wrong_float("score_limit", score_limit)
    if not (score_limit >= 0 and score_limit < 1e999):
        op.fail("score_limit", "at least 0 and less than inf", score_limit)
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.layout is not torch.strided:
        op.wrong_tensor("x", x)
    shape, right = x.shape, False
    if len(shape) == 3:
        T = shape[0]
        B = shape[1]
        P = shape[2] // num_heads
        right = shape[2] % num_heads == 0 and 2 * query_head_dim <= P
    if not right:
        op.wrong_shape("x", x, f"{listed('T', 'B', f'{num_heads}*P')}, P >= 2*{query_head_dim}")
    if pos is not None:
        if not isinstance(pos, Tensor) or pos.dtype not in FLOATING or pos.layout is not torch.strided:
            op.wrong_tensor("pos", pos)
        shape, right = pos.shape, False
        if len(shape) == 3:
            S = shape[0]
            right = shape[2] == num_heads * (P - 2 * query_head_dim) and (S == 1 or S == B)
        if not right:
            op.wrong_shape(
                "pos", pos, f"{listed('S', 'R', num_heads * (P - 2 * query_head_dim))}, (S == 1 or S == {B})"
            )
        if pos.device != x.device:
            op.wrong_device("pos", pos, "x", x)
    if starts is not None:
        if not isinstance(starts, Tensor) or starts.dtype not in INT64 or starts.layout is not torch.strided:
            op.wrong_tensor("starts", starts, "an int64 tensor")
        shape, right = starts.shape, False
        if len(shape) == 1:
            N = shape[0]
            right = N >= 1
        if not right:
            op.wrong_shape("starts", starts, f"{listed('N')}, N >= 1")
        if starts.device != x.device:
            op.wrong_device("starts", starts, "x", x)
    if cached_key is not None:
        if (
            not isinstance(cached_key, Tensor)
            or cached_key.dtype not in FLOATING
            or cached_key.layout is not torch.strided
        ):
            op.wrong_tensor("cached_key", cached_key)
        shape, right = cached_key.shape, False
        if len(shape) == 3:
            L = shape[0]
            right = shape[1] == B and shape[2] == num_heads * query_head_dim
        if not right:
            op.wrong_shape("cached_key", cached_key, listed("L", B, num_heads * query_head_dim))
        if cached_key.device != x.device:
            op.wrong_device("cached_key", cached_key, "x", x)
    else:
        L = 0
    if not isinstance(value, Tensor) or value.dtype not in FLOATING or value.layout is not torch.strided:
        op.wrong_tensor("value", value)
    shape, right = value.shape, False
    if len(shape) == 3:
        right = shape[0] == T + L and shape[1] == B
    if not right:
        op.wrong_shape("value", value, listed(T + L, B, "E"))
    if value.device != x.device:
        op.wrong_device("value", value, "x", x)
    if key_padding_mask is not None:
        if (
            not isinstance(key_padding_mask, Tensor)
            or key_padding_mask.dtype not in BOOL
            or key_padding_mask.layout is not torch.strided
        ):
            op.wrong_tensor("key_padding_mask", key_padding_mask, "a bool tensor")
        if key_padding_mask.shape != (B, T + L):
            op.wrong_shape("key_padding_mask", key_padding_mask, listed(B, T + L))
        if key_padding_mask.device != x.device:
            op.wrong_device("key_padding_mask", key_padding_mask, "x", x)
    if attn_mask is not None:
        if (
            not isinstance(attn_mask, Tensor)
            or attn_mask.dtype not in BOOL
            or attn_mask.layout is not torch.strided
        ):
            op.wrong_tensor("attn_mask", attn_mask, "a bool tensor")
        if attn_mask.shape != (T, T + L) and attn_mask.shape != (B, T, T + L):
            op.wrong_shape("attn_mask", attn_mask, f"{listed(T, T + L)} or {listed(B, T, T + L)}")
        if attn_mask.device != x.device:
            op.wrong_device("attn_mask", attn_mask, "x", x)
    if act is not None:
        if not isinstance(act, Tensor) or act.dtype not in MASKS or act.layout is not torch.strided:
            op.wrong_tensor("act", act, "a bool or floating tensor")
        if act.requires_grad:
            op.fail("act", "a constant", "a tensor that requires a gradient")
        if act.shape != () and act.shape != (1,):
            op.wrong_shape("act", act, f"{listed()} or {listed(1)}")
        if act.device != x.device:
            op.wrong_device("act", act, "x", x)
    if equal is not None:
        if not isinstance(equal, Tensor) or equal.dtype not in MASKS or equal.layout is not torch.strided:
            op.wrong_tensor("equal", equal, "a bool or floating tensor")
        if equal.requires_grad:
            op.fail("equal", "a constant", "a tensor that requires a gradient")
        if equal.shape != () and equal.shape != (1,):
            op.wrong_shape("equal", equal, f"{listed()} or {listed(1)}")
        if equal.device != x.device:
            op.wrong_device("equal", equal, "x", x)
    if pos is not None and pos.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("pos", pos, "x", x)
    if value.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("value", value, "x", x)
    if cached_key is not None and cached_key.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("cached_key", cached_key, "x", x)
    _check(
        op, make(Arguments, (x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask,
        attn_mask, starts, chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act,
        equal,)),
    )  # fmt: skip


def traced(
    x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask, attn_mask, starts, chunk_size,
    left_context_chunks, cached_key, score_penalty, score_limit, act, equal,
):  # fmt: skip
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("zipformer_attention", x):
        return formula(
            x, pos, value, num_heads, query_head_dim, value_heads=value_heads,
            key_padding_mask=key_padding_mask, attn_mask=attn_mask, starts=starts, chunk_size=chunk_size,
            left_context_chunks=left_context_chunks, cached_key=cached_key, score_penalty=score_penalty,
            score_limit=score_limit, act=act, equal=equal,
        )  # fmt: skip
    y, _, _ = operator(
        x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask, attn_mask, starts,
        chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act, equal, is_grad_enabled()
        and (x.requires_grad or (pos is not None and pos.requires_grad) or value.requires_grad or (cached_key is
        not None and cached_key.requires_grad)),
    )  # fmt: skip
    return y


def run_kernels(
    kernels, x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask, attn_mask, starts,
    chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act, equal, keep,
):  # fmt: skip
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(x)
    statistics_dtype = wide(x)
    dtype = y_dtype if kernels.backend == "cpu" else None
    y, statistics, remainder = kernels.forward(
        operand(x, dtype), operand(pos, dtype), operand(value, dtype), operand(cached_key, dtype),
        operand(key_padding_mask, None), operand(attn_mask, None), operand(starts, None), num_heads,
        query_head_dim, (value_heads or num_heads), chunk_size, left_context_chunks, operand(equal, None),
        keep,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if statistics.dtype is not statistics_dtype:
        statistics = statistics.to(statistics_dtype)
    if remainder.dtype is not y_dtype:
        remainder = remainder.to(y_dtype)
    return y, statistics, remainder


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x), wide(a.x), promoted(a.x))


# --------------------------------------------------------------------------- gradients without the dispatcher
class ZipformerAttention(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask,
        attn_mask, starts, chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act,
        equal,
    ):  # fmt: skip
        if direct:
            y, statistics, remainder = kernels.forward(
                x, pos, value, cached_key, key_padding_mask, attn_mask, starts, num_heads, query_head_dim,
                (value_heads or num_heads), chunk_size, left_context_chunks, equal, True,
            )  # fmt: skip
        else:
            y, statistics, remainder = run_kernels(
                kernels, x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask, attn_mask,
                starts, chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act, equal,
                True,
            )  # fmt: skip
        y = not_a_view(y)
        ctx.save_for_backward(
            x, pos, value, key_padding_mask, attn_mask, starts, cached_key, act, equal, y, statistics,
            remainder,
        )  # fmt: skip
        ctx.rest = (
            kernels,
            direct,
            num_heads,
            query_head_dim,
            value_heads,
            chunk_size,
            left_context_chunks,
            score_penalty,
            score_limit,
        )
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("zipformer_attention")
        # once: a checkpoint gives them one time
        (
            x,
            pos,
            value,
            key_padding_mask,
            attn_mask,
            starts,
            cached_key,
            act,
            equal,
            y,
            statistics,
            remainder,
        ) = ctx.saved_tensors
        (
            kernels,
            direct,
            num_heads,
            query_head_dim,
            value_heads,
            chunk_size,
            left_context_chunks,
            score_penalty,
            score_limit,
        ) = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_x, d_pos, d_value, d_cached_key = kernels.backward(
                operand(grad_y, None), y, statistics, remainder, x, pos, value, cached_key, key_padding_mask,
                attn_mask, starts, num_heads, query_head_dim, (value_heads or num_heads), chunk_size,
                left_context_chunks, equal, score_penalty, score_limit, act,
            )  # fmt: skip
            return (
                None,
                None,
                d_x,
                None if pos is None else d_pos,
                d_value,
                None,
                None,
                None,
                None,
                None,
                None,
                None,
                None,
                None if cached_key is None else d_cached_key,
                None,
                None,
                None,
                None,
            )
        d_x, d_pos, d_value, d_cached_key = node_gradients(
            op, kernels, (grad_y,), make(Saved, (x, pos, value, key_padding_mask, attn_mask, starts,
            cached_key, act, equal, y, statistics, remainder, num_heads, query_head_dim, value_heads,
            chunk_size, left_context_chunks, score_penalty, score_limit,)),
        )  # fmt: skip
        return (
            None,
            None,
            d_x,
            d_pos,
            d_value,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            d_cached_key,
            None,
            None,
            None,
            None,
        )


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    (grad_y,) = grads
    dtype = promoted(saved.x) if kernels.backend == "cpu" else None
    d_x, d_pos, d_value, d_cached_key = kernels.backward(
        operand(grad_y, dtype), saved.y, saved.statistics, saved.remainder, operand(saved.x, dtype),
        operand(saved.pos, dtype), operand(saved.value, dtype), operand(saved.cached_key, dtype),
        operand(saved.key_padding_mask, None), operand(saved.attn_mask, None), operand(saved.starts, None),
        saved.num_heads, saved.query_head_dim, (saved.value_heads or saved.num_heads), saved.chunk_size,
        saved.left_context_chunks, operand(saved.equal, None), saved.score_penalty, saved.score_limit,
        operand(saved.act, None),
    )  # fmt: skip
    d_x = back(d_x, saved.x)
    d_pos = back(d_pos, saved.pos)
    d_value = back(d_value, saved.value)
    d_cached_key = back(d_cached_key, saved.cached_key)
    return d_x, d_pos, d_value, d_cached_key


apply = applied(ZipformerAttention)


# --------------------------------------------------------------------------- the registered operator
def fake(
    x, pos, value, num_heads, query_head_dim, value_heads=None, key_padding_mask=None, attn_mask=None,
    starts=None, chunk_size=-1, left_context_chunks=-1, cached_key=None, score_penalty=0.0, score_limit=25.0,
    act=None, equal=None, keep=False,
):  # fmt: skip
    keep = keep and family.kernels(x) is not None
    T = x.shape[0]
    B = x.shape[1]
    E = value.shape[2]
    arguments = Arguments(
        x, pos, value, num_heads, query_head_dim, value_heads, key_padding_mask, attn_mask, starts,
        chunk_size, left_context_chunks, cached_key, score_penalty, score_limit, act, equal,
    )  # fmt: skip
    return (
        torch.empty((T, B, E), dtype=promoted(x), device=x.device),
        torch.empty(
            _statistics_shape(family.kernels(x).backend, arguments) if keep else (0,),
            dtype=wide(x),
            device=x.device,
        ),
        torch.empty(
            _remainder_shape(family.kernels(x).backend, arguments) if keep else (0,),
            dtype=promoted(x),
            device=x.device,
        ),
    )


op.serve(
    zipformer_attention,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y", "statistics", "remainder"),
        deciding=("x",),
        differentiable=("x", "pos", "value", "cached_key"),
        graded={"y": ""},
        saves=(
            "x",
            "pos",
            "value",
            "key_padding_mask",
            "attn_mask",
            "starts",
            "cached_key",
            "act",
            "equal",
            "y",
            "statistics",
            "remainder",
        ),
        kept=("statistics", "remainder"),
        autocast=("x", "pos", "value", "cached_key"),
    ),
)
operator = register_op(
    op,
    "zipformer_attention(Tensor x, Tensor? pos, Tensor value, SymInt num_heads, SymInt query_head_dim, "
    "SymInt? value_heads=None, Tensor? key_padding_mask=None, Tensor? attn_mask=None, Tensor? "
    "starts=None, SymInt chunk_size=-1, SymInt left_context_chunks=-1, Tensor? cached_key=None, float "
    "score_penalty=0.0, float score_limit=25.0, Tensor? act=None, Tensor? equal=None, bool keep=False) -> "
    "(Tensor, Tensor, Tensor)",
    "zipformer_attention_backward(Tensor grad_y, Tensor x, Tensor? pos, Tensor value, Tensor? "
    "key_padding_mask, Tensor? attn_mask, Tensor? starts, Tensor? cached_key, Tensor? act, Tensor? equal, "
    "Tensor y, Tensor statistics, Tensor remainder, SymInt num_heads, SymInt query_head_dim, SymInt? "
    "value_heads, SymInt chunk_size, SymInt left_context_chunks, float score_penalty, float score_limit) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
