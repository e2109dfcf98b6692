# SPDX-License-Identifier: Apache-2.0
# `make op OP=zipformer_attention_weights` writes this file from fastasr/ops/zipformer_attention_weights.py: change that one.
"""softmax_j(q[i]·k[j] + p[i]·pos[T−1−i+j]), masked scores being −1000"""

from typing import NamedTuple

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from fastasr._transforms import by_formula, transforms_active
from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import FLOATING, PLAIN, served
from fastasr.ops._layout import rows
from fastasr.ops._op import OPS, Written
from fastasr.ops._operator import register_op
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward
from fastasr.ops._runtime import (
    BOOL,
    INT64,
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
from fastasr.ops.zipformer_attention_weights import _empty, check_recordings
from fastasr.ops.zipformer_attention_weights import zipformer_attention_weights as formula

op = OPS["zipformer_attention_weights"]
family = op.family


class Arguments(NamedTuple):
    x: Tensor
    pos: Tensor | None
    num_heads: int
    query_head_dim: int
    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    starts: Tensor | None = None
    chunk_size: int = -1
    left_context_chunks: int = -1
    cached_key: Tensor | None = None
    score_penalty: float = 0.0
    score_limit: float = 25.0


class Saved(NamedTuple):
    x: Tensor
    pos: Tensor | None
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    starts: Tensor | None
    cached_key: Tensor | None
    weights: Tensor
    num_heads: int
    query_head_dim: int
    chunk_size: int
    left_context_chunks: int
    score_penalty: float
    score_limit: float


# --------------------------------------------------------------------------- the public function
def zipformer_attention_weights(
    x: Tensor,
    pos: Tensor | None,
    num_heads: int,
    query_head_dim: int,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = -1,
    left_context_chunks: int = -1,
    cached_key: Tensor | None = None,
    score_penalty: float = 0.0,
    score_limit: float = 25.0,
) -> Tensor:
    """softmax_j(q[i]·k[j] + p[i]·pos[T−1−i+j]), masked scores being −1000.

    Args:
        x: (T, B, H·(2·dq + dp)): queries, keys and position queries side by side, heads inside each; float32, bfloat16,
            float16 or float64.
        pos: (1 or B, 2T−1+left, H·dp), row T−1 is offset 0; None: no position scores. With ``starts`` (1 or B, 2L−1,
            H·dp), row L−1 is offset 0, for recordings of up to L frames: frames L or more apart do not see each other.
        num_heads, query_head_dim: H and dq; dp is what remains of x.
        key_padding_mask: bool (B, left + T), True: no query sees this key.
        attn_mask: bool (T, left + T) or (B, T, left + T), True: hidden.
        starts: int64 (N,): where recordings begin in every sequence, and behind them where the last one ends. Frames of
            different recordings do not see each other, and frames outside of all see nothing. Their order does not
            matter, and equal numbers are recordings without frames. On a GPU nothing waits for them. There is no cache.
            Weights, their gradients and those of scores still have H·B·T² elements each, most of them 0:
            :func:`fastasr.ops.zipformer_attention` has none of these tensors.
        chunk_size: a query sees the keys up to the end of its chunk of this many frames; -1: all. No mask is made. With
            ``starts`` chunks count from the first frame of the recording.
        left_context_chunks: it sees keys from this many chunks before its own on; -1: from the first.
        cached_key: (left, B, H·dq), keys before the first frame (streaming).
        score_penalty, score_limit: the gradient of every score s with |s| > score_limit, hidden or not, gets
            score_penalty · sign(s), but for keys of other recordings; values are not changed.
    Returns:
        (H, B, T, left + T), of x's dtype (autocast's under autocast), computed in float32 or better and rounded once.
        A query that sees no key has equal weights, on the keys of its recording with ``starts``, and no gradient of its
        scores; the weights are 0 if it belongs to none. Rows lie a multiple of 16 elements apart in memory: for `view`,
        call `contiguous` first.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; a number is out of range.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(x) in PLAIN
        and x.is_cpu
        and x.is_contiguous()
        and (pos is None or type(pos) in PLAIN)
        and (key_padding_mask is None or type(key_padding_mask) in PLAIN)
        and (attn_mask is None or type(attn_mask) in PLAIN)
        and (starts is None or type(starts) in PLAIN)
        and (cached_key is None or type(cached_key) in PLAIN)
        and type(num_heads) is int
        and (num_heads >= 1)
        and type(query_head_dim) is int
        and (query_head_dim >= 1)
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
                or (cached_key is not None and cached_key.requires_grad)
            ):
                return apply(
                    kernels, True, x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts,
                    chunk_size, left_context_chunks, cached_key, score_penalty, score_limit,
                )  # fmt: skip
            return kernels.forward(
                x, pos, cached_key, key_padding_mask, attn_mask, starts, num_heads, query_head_dim,
                chunk_size, left_context_chunks,
            )  # fmt: skip
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(
                x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size,
                left_context_chunks, cached_key, score_penalty, score_limit,
            )  # fmt: skip
            raise
    check(
        x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size,
        left_context_chunks, cached_key, score_penalty, score_limit,
    )  # fmt: skip
    if is_compiling() or not (
        type(x) in PLAIN
        and (pos is None or type(pos) in PLAIN)
        and (key_padding_mask is None or type(key_padding_mask) in PLAIN)
        and (attn_mask is None or type(attn_mask) in PLAIN)
        and (starts is None or type(starts) in PLAIN)
        and (cached_key is None or type(cached_key) in PLAIN)
    ):
        return traced(
            x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size,
            left_context_chunks, cached_key, score_penalty, score_limit,
        )  # fmt: skip
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size,
            left_context_chunks, cached_key, score_penalty, score_limit),
        )  # fmt: skip
    kernels = family.kernels(x)
    if kernels is None:
        return laid_out(
            op, formula(x, pos, num_heads, query_head_dim, key_padding_mask=key_padding_mask,
            attn_mask=attn_mask, starts=starts, chunk_size=chunk_size,
            left_context_chunks=left_context_chunks, cached_key=cached_key, score_penalty=score_penalty,
            score_limit=score_limit),
        )  # fmt: skip
    cast_dtype = autocast_dtype(x)
    if cast_dtype is not None:
        x, pos, cached_key = cast(cast_dtype, x, pos, cached_key)
        kernels = family.kernels(x)
        if kernels is None:
            return formula(
                x, pos, num_heads, query_head_dim, key_padding_mask=key_padding_mask, attn_mask=attn_mask,
                starts=starts, chunk_size=chunk_size, left_context_chunks=left_context_chunks,
                cached_key=cached_key, score_penalty=score_penalty, score_limit=score_limit,
            )  # fmt: skip
    try:
        if is_grad_enabled() and (
            x.requires_grad
            or (pos is not None and pos.requires_grad)
            or (cached_key is not None and cached_key.requires_grad)
        ):
            return apply(
                kernels, False, x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts,
                chunk_size, left_context_chunks, cached_key, score_penalty, score_limit,
            )  # fmt: skip
        weights = run_kernels(
            kernels, x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size,
            left_context_chunks, cached_key, score_penalty, score_limit,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, x)
        return formula(
            x, pos, num_heads, query_head_dim, key_padding_mask=key_padding_mask, attn_mask=attn_mask,
            starts=starts, chunk_size=chunk_size, left_context_chunks=left_context_chunks,
            cached_key=cached_key, score_penalty=score_penalty, score_limit=score_limit,
        )  # fmt: skip
    return weights


def check(
    x: Tensor,
    pos: Tensor | None,
    num_heads: int,
    query_head_dim: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    starts: Tensor | None,
    chunk_size: int,
    left_context_chunks: int,
    cached_key: Tensor | None,
    score_penalty: float,
    score_limit: float,
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
    if pos is not None and pos.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("pos", pos, "x", x)
    if cached_key is not None and cached_key.dtype is not x.dtype and autocast_dtype(x) is None:
        op.wrong_dtype("cached_key", cached_key, "x", x)
    check_recordings(
        op, make(Arguments, (x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts,
        chunk_size, left_context_chunks, cached_key, score_penalty, score_limit,)),
    )  # fmt: skip


def traced(
    x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size, left_context_chunks,
    cached_key, score_penalty, score_limit,
):  # fmt: skip
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("zipformer_attention_weights", x):
        return formula(
            x, pos, num_heads, query_head_dim, key_padding_mask=key_padding_mask, attn_mask=attn_mask,
            starts=starts, chunk_size=chunk_size, left_context_chunks=left_context_chunks,
            cached_key=cached_key, score_penalty=score_penalty, score_limit=score_limit,
        )  # fmt: skip
    return operator(
        x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size,
        left_context_chunks, cached_key, score_penalty, score_limit,
    )  # fmt: skip


def run_kernels(
    kernels, x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size,
    left_context_chunks, cached_key, score_penalty, score_limit,
):  # fmt: skip
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    weights_dtype = promoted(x)
    dtype = weights_dtype if kernels.backend == "cpu" else None
    weights = kernels.forward(
        operand(x, dtype), operand(pos, dtype), operand(cached_key, dtype), operand(key_padding_mask, None),
        operand(attn_mask, None), operand(starts, None), num_heads, query_head_dim, chunk_size,
        left_context_chunks,
    )  # fmt: skip
    if weights.dtype is not weights_dtype:
        weights = weights.to(weights_dtype)
    return weights


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.x),)


# --------------------------------------------------------------------------- gradients without the dispatcher
class ZipformerAttentionWeights(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts,
        chunk_size, left_context_chunks, cached_key, score_penalty, score_limit,
    ):  # fmt: skip
        if direct:
            weights = kernels.forward(
                x, pos, cached_key, key_padding_mask, attn_mask, starts, num_heads, query_head_dim,
                chunk_size, left_context_chunks,
            )  # fmt: skip
        else:
            weights = run_kernels(
                kernels, x, pos, num_heads, query_head_dim, key_padding_mask, attn_mask, starts, chunk_size,
                left_context_chunks, cached_key, score_penalty, score_limit,
            )  # fmt: skip
        weights = not_a_view(weights)
        ctx.save_for_backward(x, pos, key_padding_mask, attn_mask, starts, cached_key, weights)
        ctx.rest = (
            kernels,
            direct,
            num_heads,
            query_head_dim,
            chunk_size,
            left_context_chunks,
            score_penalty,
            score_limit,
        )
        return weights

    @staticmethod
    def backward(ctx, grad_weights, *_):
        if is_grad_enabled():
            refuse_double_backward("zipformer_attention_weights")
        # once: a checkpoint gives them one time
        x, pos, key_padding_mask, attn_mask, starts, cached_key, weights = ctx.saved_tensors
        (
            kernels,
            direct,
            num_heads,
            query_head_dim,
            chunk_size,
            left_context_chunks,
            score_penalty,
            score_limit,
        ) = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_weights is not None and is_batched(grad_weights))
        ):
            d_x, d_pos, d_cached_key = kernels.backward(
                operand(grad_weights, None, rows), weights, x, pos, cached_key, key_padding_mask, attn_mask,
                starts, num_heads, query_head_dim, chunk_size, left_context_chunks, score_penalty,
                score_limit,
            )  # fmt: skip
            return (
                None,
                None,
                d_x,
                None if pos is None else d_pos,
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
            )
        d_x, d_pos, d_cached_key = node_gradients(
            op, kernels, (grad_weights,), make(Saved, (x, pos, key_padding_mask, attn_mask, starts,
            cached_key, weights, num_heads, query_head_dim, chunk_size, left_context_chunks, score_penalty,
            score_limit,)),
        )  # fmt: skip
        return None, None, d_x, d_pos, None, None, None, None, None, None, None, d_cached_key, None, None


def differentiate(kernels, grads, saved, needs=None):
    """Returns the gradients by the kernels, each in its tensor's dtype."""
    (grad_weights,) = grads
    dtype = promoted(saved.x) if kernels.backend == "cpu" else None
    d_x, d_pos, d_cached_key = kernels.backward(
        operand(grad_weights, dtype, rows), saved.weights, operand(saved.x, dtype), operand(saved.pos, dtype),
        operand(saved.cached_key, dtype), operand(saved.key_padding_mask, None), operand(saved.attn_mask,
        None), operand(saved.starts, None), saved.num_heads, saved.query_head_dim, saved.chunk_size,
        saved.left_context_chunks, saved.score_penalty, saved.score_limit,
    )  # fmt: skip
    d_x = back(d_x, saved.x)
    d_pos = back(d_pos, saved.pos)
    d_cached_key = back(d_cached_key, saved.cached_key)
    return d_x, d_pos, d_cached_key


apply = applied(ZipformerAttentionWeights)


# --------------------------------------------------------------------------- the registered operator
def fake(
    x, pos, num_heads, query_head_dim, key_padding_mask=None, attn_mask=None, starts=None, chunk_size=-1,
    left_context_chunks=-1, cached_key=None, score_penalty=0.0, score_limit=25.0,
):  # fmt: skip
    T = x.shape[0]
    B = x.shape[1]
    L = cached_key.shape[0] if cached_key is not None else 0
    return (torch.empty if family.kernels(x) is None else _empty)(
        (num_heads, B, T, T + L), dtype=promoted(x), device=x.device
    )


op.serve(
    zipformer_attention_weights,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("weights",),
        deciding=("x",),
        strided=("weights",),
        differentiable=("x", "pos", "cached_key"),
        graded={"weights": ""},
        saves=("x", "pos", "key_padding_mask", "attn_mask", "starts", "cached_key", "weights"),
        autocast=("x", "pos", "cached_key"),
    ),
)
operator = register_op(
    op,
    "zipformer_attention_weights(Tensor x, Tensor? pos, SymInt num_heads, SymInt query_head_dim, Tensor? "
    "key_padding_mask=None, Tensor? attn_mask=None, Tensor? starts=None, SymInt chunk_size=-1, SymInt "
    "left_context_chunks=-1, Tensor? cached_key=None, float score_penalty=0.0, float score_limit=25.0) -> "
    "Tensor",
    "zipformer_attention_weights_backward(Tensor grad_weights, Tensor x, Tensor? pos, Tensor? "
    "key_padding_mask, Tensor? attn_mask, Tensor? starts, Tensor? cached_key, Tensor weights, SymInt "
    "num_heads, SymInt query_head_dim, SymInt chunk_size, SymInt left_context_chunks, float "
    "score_penalty, float score_limit) -> (Tensor, Tensor, Tensor)",
)
