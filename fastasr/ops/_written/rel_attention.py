# SPDX-License-Identifier: Apache-2.0
# `make op OP=rel_attention` writes this file from fastasr/ops/rel_attention.py: change that one.
"""softmax_j(((q[i] + bias_u)·k[j] + (q[i] + bias_v)·pos[T − 1 + j − i]) / √d) · v, without the weights in memory"""

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
from fastasr.ops.rel_attention import _check, _remainder_shape
from fastasr.ops.rel_attention import rel_attention as formula

op = OPS["rel_attention"]
family = op.family


class Arguments(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor | None = None
    bias_u: Tensor | None = None
    bias_v: Tensor | None = None
    offset_bias: Tensor | None = None
    offset_gate: Tensor | None = None
    key_bias: Tensor | None = None
    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    starts: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    context: tuple[int, int] = (-1, -1)
    chunk_size: int = 1
    soft_cap: float = 0.0
    pos_span: tuple[int, int] = (-1, -1)


class Saved(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor | None
    bias_u: Tensor | None
    bias_v: Tensor | None
    offset_bias: Tensor | None
    offset_gate: Tensor | None
    key_bias: Tensor | None
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    starts: Tensor | None
    dropout_seed: Tensor | None
    y: Tensor
    lse: Tensor
    remainder: Tensor
    dropout_p: float
    context: tuple[int, int]
    chunk_size: int
    soft_cap: float
    pos_span: tuple[int, int]


# --------------------------------------------------------------------------- the public function
def rel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None = None,
    bias_u: Tensor | None = None,
    bias_v: Tensor | None = None,
    *,
    offset_bias: Tensor | None = None,
    offset_gate: Tensor | None = None,
    key_bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    starts: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    context: tuple[int, int] = (-1, -1),
    chunk_size: int = 1,
    soft_cap: float = 0.0,
    pos_span: tuple[int, int] = (-1, -1),
) -> Tensor:
    """softmax_j(((q[i] + bias_u)·k[j] + (q[i] + bias_v)·pos[T − 1 + j − i]) / √d) · v, without the weights in memory.

    Args:
        q: (B, T, H, d), d of at least 1. float32, bfloat16, float16 or float64.
        k: (B, K, H, d), K of at least T: the last T are the queries' frames.
        v: (B, K, H, e), e of at least 1.
        pos: (T + K − 1, H or 1, d), the projected positions: row r is for a key r − (K − 1) frames behind the query. No
            rows where T is 0. With ``pos_span`` (l + r + 1, H or 1, d). None: scores have no part of positions.
        bias_u, bias_v: (H, d): added to q where it meets keys, and where it meets positions.
        offset_bias: (T + K − 1, H): added to the scores after the division by √d, by offset as the rows of ``pos``.
        offset_gate: (B, T, H): factors of offset_bias, for each query.
        key_bias: (B or 1, H or 1, K): added to the scores of a key after the division by √d.
        key_padding_mask: bool (B, K), True where a key is hidden from every query of its sequence.
        attn_mask: bool (T, K) or (B, T, K), True where a key (last) is hidden from a query.
        starts: int64 (R,): where recordings begin in every sequence, and behind them where the last one ends. Frames of
            different recordings do not see each other, and frames outside of all see nothing. Their order does not
            matter, and equal numbers are recordings without frames. On a GPU nothing waits for them. K is T then, and
            chunk_size 1.
        dropout_p: the share of weights that are set to 0 after the softmax; the others are divided by 1 − dropout_p.
        dropout_seed: int64 (1,), which chooses these weights; needed where dropout_p is more than 0. One seed and shape
            give the same weights on every backend.
        context: (left, right): a query sees the keys from ``left`` frames before its chunk to ``right`` frames behind
            it; -1: all of that side. No mask is made, and keys that no query of a block sees are not read.
        chunk_size: frames of a chunk, counted from the first key. 1: each frame has its own context.
        soft_cap: a of a tanh(score / a), which replaces the scores before keys are hidden; 0: none.
        pos_span: (l, r): row n of ``pos`` is for a key n − l frames behind the query; keys further away have the first
            or last row. (-1, -1): pos has a row for every key.
        All floating tensors have q's dtype, except under autocast, which casts them.
    Returns:
        (B, T, H, e), of q's dtype (autocast's under autocast), accumulated in float32 or better; 0 for a query that
        sees no key.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; an option is out of range; an argument is given without the one
            that it belongs to.
    """
    kernels = family.native
    if (
        kernels is not None
        and type(q) in PLAIN
        and q.is_cpu
        and q.is_contiguous()
        and type(k) in PLAIN
        and type(v) in PLAIN
        and (pos is None or type(pos) in PLAIN)
        and (bias_u is None or type(bias_u) in PLAIN)
        and (bias_v is None or type(bias_v) in PLAIN)
        and (offset_bias is None or type(offset_bias) in PLAIN)
        and (offset_gate is None or type(offset_gate) in PLAIN)
        and (key_bias is None or type(key_bias) in PLAIN)
        and (key_padding_mask is None or type(key_padding_mask) in PLAIN)
        and (attn_mask is None or type(attn_mask) in PLAIN)
        and (starts is None or type(starts) in PLAIN)
        and (dropout_seed is None or type(dropout_seed) in PLAIN)
        and type(dropout_p) is float
        and (dropout_p >= 0 and dropout_p < 1)
        and type(context) is tuple
        and len(context) == 2
        and type(context[0]) is type(context[1]) is int
        and type(chunk_size) is int
        and (chunk_size >= 1)
        and type(soft_cap) is float
        and (soft_cap >= 0)
        and type(pos_span) is tuple
        and len(pos_span) == 2
        and type(pos_span[0]) is type(pos_span[1]) is int
        and not is_autocast_enabled("cpu")
        and not is_dynamo_compiling()
        and not (transforms_active() or forward_ad._current_level >= 0)
    ):
        try:
            if is_grad_enabled() and (
                q.requires_grad
                or k.requires_grad
                or v.requires_grad
                or (pos is not None and pos.requires_grad)
                or (bias_u is not None and bias_u.requires_grad)
                or (bias_v is not None and bias_v.requires_grad)
                or (offset_bias is not None and offset_bias.requires_grad)
                or (offset_gate is not None and offset_gate.requires_grad)
                or (key_bias is not None and key_bias.requires_grad)
            ):
                return apply(
                    kernels, True, q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias,
                    key_padding_mask, attn_mask, starts, dropout_p, dropout_seed, context, chunk_size,
                    soft_cap, pos_span,
                )  # fmt: skip
            y, _, _ = kernels.forward(
                q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask, attn_mask,
                starts, dropout_seed, dropout_p, *context, chunk_size, soft_cap, *pos_span, False,
            )  # fmt: skip
            return y
        except NOT_MINE:
            pass  # the checked path takes what the kernels decline
        except RuntimeError:
            # tells what is wrong with the arguments, if anything is
            check(
                q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask, attn_mask,
                starts, dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span,
            )  # fmt: skip
            raise
    check(
        q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask, attn_mask, starts,
        dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span,
    )  # fmt: skip
    if is_compiling() or not (
        type(q) in PLAIN
        and type(k) in PLAIN
        and type(v) in PLAIN
        and (pos is None or type(pos) in PLAIN)
        and (bias_u is None or type(bias_u) in PLAIN)
        and (bias_v is None or type(bias_v) in PLAIN)
        and (offset_bias is None or type(offset_bias) in PLAIN)
        and (offset_gate is None or type(offset_gate) in PLAIN)
        and (key_bias is None or type(key_bias) in PLAIN)
        and (key_padding_mask is None or type(key_padding_mask) in PLAIN)
        and (attn_mask is None or type(attn_mask) in PLAIN)
        and (starts is None or type(starts) in PLAIN)
        and (dropout_seed is None or type(dropout_seed) in PLAIN)
    ):
        return traced(
            q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask, attn_mask,
            starts, dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span,
        )  # fmt: skip
    if transforms_active() or forward_ad._current_level >= 0:
        return by_formula(
            op, Arguments(q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask,
            attn_mask, starts, dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span),
        )  # fmt: skip
    kernels = family.kernels(q)
    if kernels is None:
        return laid_out(
            op, formula(q, k, v, pos, bias_u, bias_v, offset_bias=offset_bias, offset_gate=offset_gate,
            key_bias=key_bias, key_padding_mask=key_padding_mask, attn_mask=attn_mask, starts=starts,
            dropout_p=dropout_p, dropout_seed=dropout_seed, context=context, chunk_size=chunk_size,
            soft_cap=soft_cap, pos_span=pos_span),
        )  # fmt: skip
    cast_dtype = autocast_dtype(q)
    if cast_dtype is not None:
        q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias = cast(
            cast_dtype, q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias
        )
        kernels = family.kernels(q)
        if kernels is None:
            return formula(
                q, k, v, pos, bias_u, bias_v, offset_bias=offset_bias, offset_gate=offset_gate,
                key_bias=key_bias, key_padding_mask=key_padding_mask, attn_mask=attn_mask, starts=starts,
                dropout_p=dropout_p, dropout_seed=dropout_seed, context=context, chunk_size=chunk_size,
                soft_cap=soft_cap, pos_span=pos_span,
            )  # fmt: skip
    try:
        if is_grad_enabled() and (
            q.requires_grad
            or k.requires_grad
            or v.requires_grad
            or (pos is not None and pos.requires_grad)
            or (bias_u is not None and bias_u.requires_grad)
            or (bias_v is not None and bias_v.requires_grad)
            or (offset_bias is not None and offset_bias.requires_grad)
            or (offset_gate is not None and offset_gate.requires_grad)
            or (key_bias is not None and key_bias.requires_grad)
        ):
            return apply(
                kernels, False, q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias,
                key_padding_mask, attn_mask, starts, dropout_p, dropout_seed, context, chunk_size, soft_cap,
                pos_span,
            )  # fmt: skip
        y, _, _ = run_kernels(
            kernels, q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask,
            attn_mask, starts, dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span, False,
        )  # fmt: skip
    except Unlaunchable as error:
        family.give_up(error, q)
        return formula(
            q, k, v, pos, bias_u, bias_v, offset_bias=offset_bias, offset_gate=offset_gate, key_bias=key_bias,
            key_padding_mask=key_padding_mask, attn_mask=attn_mask, starts=starts, dropout_p=dropout_p,
            dropout_seed=dropout_seed, context=context, chunk_size=chunk_size, soft_cap=soft_cap,
            pos_span=pos_span,
        )  # fmt: skip
    return y


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    bias_u: Tensor | None,
    bias_v: Tensor | None,
    offset_bias: Tensor | None,
    offset_gate: Tensor | None,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    starts: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    context: tuple[int, int],
    chunk_size: int,
    soft_cap: float,
    pos_span: tuple[int, int],
) -> None:
    """Raises if the arguments do not fit the declaration."""
    if type(dropout_p) is not float:
        op.wrong_float("dropout_p", dropout_p)
    if not (dropout_p >= 0 and dropout_p < 1):
        op.fail("dropout_p", "at least 0 and less than 1", dropout_p)
    if not (type(context) is tuple and len(context) == 2 and type(context[0]) is type(context[1]) is int):
        op.wrong_pair("context", context)
    if type(chunk_size) is not int:
        op.wrong_int("chunk_size", chunk_size)
    if not (chunk_size >= 1):
        op.fail("chunk_size", "at least 1", chunk_size)
    if type(soft_cap) is not float:
        op.wrong_float("soft_cap", soft_cap)
    if not (soft_cap >= 0):
        op.fail("soft_cap", "at least 0", soft_cap)
    if not (type(pos_span) is tuple and len(pos_span) == 2 and type(pos_span[0]) is type(pos_span[1]) is int):
        op.wrong_pair("pos_span", pos_span)
    if not isinstance(q, Tensor) or q.dtype not in FLOATING or q.layout is not torch.strided:
        op.wrong_tensor("q", q)
    shape, right = q.shape, False
    if len(shape) == 4:
        B = shape[0]
        T = shape[1]
        H = shape[2]
        D = shape[3]
        right = H >= 1 and D >= 1
    if not right:
        op.wrong_shape("q", q, f"{listed('B', 'T', 'H', 'D')}, H >= 1, D >= 1")
    if not isinstance(k, Tensor) or k.dtype not in FLOATING or k.layout is not torch.strided:
        op.wrong_tensor("k", k)
    shape, right = k.shape, False
    if len(shape) == 4:
        K = shape[1]
        right = shape[0] == B and shape[2] == H and shape[3] == D and K >= T
    if not right:
        op.wrong_shape("k", k, f"{listed(B, 'K', H, D)}, K >= {T}")
    if k.device != q.device:
        op.wrong_device("k", k, "q", q)
    if not isinstance(v, Tensor) or v.dtype not in FLOATING or v.layout is not torch.strided:
        op.wrong_tensor("v", v)
    shape, right = v.shape, False
    if len(shape) == 4:
        E = shape[3]
        right = shape[0] == B and shape[1] == K and shape[2] == H and E >= 1
    if not right:
        op.wrong_shape("v", v, f"{listed(B, K, H, 'E')}, E >= 1")
    if v.device != q.device:
        op.wrong_device("v", v, "q", q)
    if pos is not None:
        if not isinstance(pos, Tensor) or pos.dtype not in FLOATING or pos.layout is not torch.strided:
            op.wrong_tensor("pos", pos)
        shape, right = pos.shape, False
        if len(shape) == 3:
            P = shape[1]
            right = shape[2] == D and (P == 1 or P == H)
        if not right:
            op.wrong_shape("pos", pos, f"{listed('R', 'P', D)}, (P == 1 or P == {H})")
        if pos.device != q.device:
            op.wrong_device("pos", pos, "q", q)
    if bias_u is not None:
        if (
            not isinstance(bias_u, Tensor)
            or bias_u.dtype not in FLOATING
            or bias_u.layout is not torch.strided
        ):
            op.wrong_tensor("bias_u", bias_u)
        if bias_u.shape != (H, D):
            op.wrong_shape("bias_u", bias_u, listed(H, D))
        if bias_u.device != q.device:
            op.wrong_device("bias_u", bias_u, "q", q)
    if bias_v is not None:
        if (
            not isinstance(bias_v, Tensor)
            or bias_v.dtype not in FLOATING
            or bias_v.layout is not torch.strided
        ):
            op.wrong_tensor("bias_v", bias_v)
        if bias_v.shape != (H, D):
            op.wrong_shape("bias_v", bias_v, listed(H, D))
        if bias_v.device != q.device:
            op.wrong_device("bias_v", bias_v, "q", q)
    if offset_bias is not None:
        if (
            not isinstance(offset_bias, Tensor)
            or offset_bias.dtype not in FLOATING
            or offset_bias.layout is not torch.strided
        ):
            op.wrong_tensor("offset_bias", offset_bias)
        if offset_bias.shape != ((T and T + K - 1), H):
            op.wrong_shape("offset_bias", offset_bias, listed((T and T + K - 1), H))
        if offset_bias.device != q.device:
            op.wrong_device("offset_bias", offset_bias, "q", q)
    if offset_gate is not None:
        if (
            not isinstance(offset_gate, Tensor)
            or offset_gate.dtype not in FLOATING
            or offset_gate.layout is not torch.strided
        ):
            op.wrong_tensor("offset_gate", offset_gate)
        if offset_gate.shape != (B, T, H):
            op.wrong_shape("offset_gate", offset_gate, listed(B, T, H))
        if offset_gate.device != q.device:
            op.wrong_device("offset_gate", offset_gate, "q", q)
    if key_bias is not None:
        if (
            not isinstance(key_bias, Tensor)
            or key_bias.dtype not in FLOATING
            or key_bias.layout is not torch.strided
        ):
            op.wrong_tensor("key_bias", key_bias)
        if (
            key_bias.shape != (B, H, K)
            and key_bias.shape != (1, H, K)
            and key_bias.shape != (B, 1, K)
            and key_bias.shape != (1, 1, K)
        ):
            op.wrong_shape(
                "key_bias",
                key_bias,
                f"{listed(B, H, K)} or {listed(1, H, K)} or {listed(B, 1, K)} or {listed(1, 1, K)}",
            )
        if key_bias.device != q.device:
            op.wrong_device("key_bias", key_bias, "q", q)
    if key_padding_mask is not None:
        if (
            not isinstance(key_padding_mask, Tensor)
            or key_padding_mask.dtype not in BOOL
            or key_padding_mask.layout is not torch.strided
        ):
            op.wrong_tensor("key_padding_mask", key_padding_mask, "a bool tensor")
        if key_padding_mask.shape != (B, K):
            op.wrong_shape("key_padding_mask", key_padding_mask, listed(B, K))
        if key_padding_mask.device != q.device:
            op.wrong_device("key_padding_mask", key_padding_mask, "q", q)
    if attn_mask is not None:
        if (
            not isinstance(attn_mask, Tensor)
            or attn_mask.dtype not in BOOL
            or attn_mask.layout is not torch.strided
        ):
            op.wrong_tensor("attn_mask", attn_mask, "a bool tensor")
        if attn_mask.shape != (T, K) and attn_mask.shape != (B, T, K):
            op.wrong_shape("attn_mask", attn_mask, f"{listed(T, K)} or {listed(B, T, K)}")
        if attn_mask.device != q.device:
            op.wrong_device("attn_mask", attn_mask, "q", q)
    if starts is not None:
        if not isinstance(starts, Tensor) or starts.dtype not in INT64 or starts.layout is not torch.strided:
            op.wrong_tensor("starts", starts, "an int64 tensor")
        shape, right = starts.shape, False
        if len(shape) == 1:
            N = shape[0]
            right = N >= 1
        if not right:
            op.wrong_shape("starts", starts, f"{listed('N')}, N >= 1")
        if starts.device != q.device:
            op.wrong_device("starts", starts, "q", q)
    if dropout_seed is not None:
        if (
            not isinstance(dropout_seed, Tensor)
            or dropout_seed.dtype not in INT64
            or dropout_seed.layout is not torch.strided
        ):
            op.wrong_tensor("dropout_seed", dropout_seed, "an int64 tensor")
        if dropout_seed.shape != (1,):
            op.wrong_shape("dropout_seed", dropout_seed, listed(1))
        if dropout_seed.device != q.device:
            op.wrong_device("dropout_seed", dropout_seed, "q", q)
    if k.dtype is not q.dtype and autocast_dtype(q) is None:
        op.wrong_dtype("k", k, "q", q)
    if v.dtype is not q.dtype and autocast_dtype(q) is None:
        op.wrong_dtype("v", v, "q", q)
    if pos is not None and pos.dtype is not q.dtype and autocast_dtype(q) is None:
        op.wrong_dtype("pos", pos, "q", q)
    if bias_u is not None and bias_u.dtype is not q.dtype and autocast_dtype(q) is None:
        op.wrong_dtype("bias_u", bias_u, "q", q)
    if bias_v is not None and bias_v.dtype is not q.dtype and autocast_dtype(q) is None:
        op.wrong_dtype("bias_v", bias_v, "q", q)
    if offset_bias is not None and offset_bias.dtype is not q.dtype and autocast_dtype(q) is None:
        op.wrong_dtype("offset_bias", offset_bias, "q", q)
    if offset_gate is not None and offset_gate.dtype is not q.dtype and autocast_dtype(q) is None:
        op.wrong_dtype("offset_gate", offset_gate, "q", q)
    if key_bias is not None and key_bias.dtype is not q.dtype and autocast_dtype(q) is None:
        op.wrong_dtype("key_bias", key_bias, "q", q)
    _check(
        op, make(Arguments, (q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias,
        key_padding_mask, attn_mask, starts, dropout_p, dropout_seed, context, chunk_size, soft_cap,
        pos_span,)),
    )  # fmt: skip


def traced(
    q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask, attn_mask, starts,
    dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span,
):  # fmt: skip
    """Serves torch.compile, torch.export and subclasses of tensors by the registered operator."""
    if not served("rel_attention", q):
        return formula(
            q, k, v, pos, bias_u, bias_v, offset_bias=offset_bias, offset_gate=offset_gate, key_bias=key_bias,
            key_padding_mask=key_padding_mask, attn_mask=attn_mask, starts=starts, dropout_p=dropout_p,
            dropout_seed=dropout_seed, context=context, chunk_size=chunk_size, soft_cap=soft_cap,
            pos_span=pos_span,
        )  # fmt: skip
    y, _, _ = operator(
        q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask, attn_mask, starts,
        dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span, is_grad_enabled() and
        (q.requires_grad or k.requires_grad or v.requires_grad or (pos is not None and pos.requires_grad) or
        (bias_u is not None and bias_u.requires_grad) or (bias_v is not None and bias_v.requires_grad) or
        (offset_bias is not None and offset_bias.requires_grad) or (offset_gate is not None and
        offset_gate.requires_grad) or (key_bias is not None and key_bias.requires_grad)),
    )  # fmt: skip
    return y


def run_kernels(
    kernels, q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask, attn_mask,
    starts, dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span, keep,
):  # fmt: skip
    """Calls kernels with tensors as they read them, and gives the results the declared dtypes."""
    y_dtype = promoted(q)
    lse_dtype = wide(q)
    dtype = y_dtype if kernels.backend == "cpu" else None
    y, lse, remainder = kernels.forward(
        operand(q, dtype), operand(k, dtype), operand(v, dtype), operand(pos, dtype), operand(bias_u, dtype),
        operand(bias_v, dtype), operand(offset_bias, dtype), operand(offset_gate, dtype), operand(key_bias,
        dtype), operand(key_padding_mask, None), operand(attn_mask, None), operand(starts, None),
        operand(dropout_seed, None), dropout_p, *context, chunk_size, soft_cap, *pos_span, keep,
    )  # fmt: skip
    if y.dtype is not y_dtype:
        y = y.to(y_dtype)
    if lse.dtype is not lse_dtype:
        lse = lse.to(lse_dtype)
    if remainder.dtype is not y_dtype:
        remainder = remainder.to(y_dtype)
    return y, lse, remainder


def result_dtypes(a) -> tuple[torch.dtype, ...]:
    return (promoted(a.q), wide(a.q), promoted(a.q))


# --------------------------------------------------------------------------- gradients without the dispatcher
class RelAttention(Function):
    @staticmethod
    def forward(
        ctx, kernels, direct, q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias,
        key_padding_mask, attn_mask, starts, dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span,
    ):  # fmt: skip
        if direct:
            y, lse, remainder = kernels.forward(
                q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask, attn_mask,
                starts, dropout_seed, dropout_p, *context, chunk_size, soft_cap, *pos_span, True,
            )  # fmt: skip
        else:
            y, lse, remainder = run_kernels(
                kernels, q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask,
                attn_mask, starts, dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span, True,
            )  # fmt: skip
        y = not_a_view(y)
        ctx.save_for_backward(
            q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask, attn_mask,
            starts, dropout_seed, y, lse, remainder,
        )  # fmt: skip
        ctx.rest = kernels, direct, dropout_p, context, chunk_size, soft_cap, pos_span
        return y

    @staticmethod
    def backward(ctx, grad_y, *_):
        if is_grad_enabled():
            refuse_double_backward("rel_attention")
        # once: a checkpoint gives them one time
        (
            q,
            k,
            v,
            pos,
            bias_u,
            bias_v,
            offset_bias,
            offset_gate,
            key_bias,
            key_padding_mask,
            attn_mask,
            starts,
            dropout_seed,
            y,
            lse,
            remainder,
        ) = ctx.saved_tensors
        kernels, direct, dropout_p, context, chunk_size, soft_cap, pos_span = ctx.rest
        if direct and not (
            transforms_active()
            or forward_ad._current_level >= 0
            or (grad_y is not None and is_batched(grad_y))
        ):
            d_q, d_k, d_v, d_pos, d_bias_u, d_bias_v, d_offset_bias, d_offset_gate, d_key_bias = kernels.backward(
                operand(grad_y, None), q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias,
                key_padding_mask, attn_mask, starts, dropout_seed, y, lse, remainder, dropout_p, *context,
                chunk_size, soft_cap, *pos_span,
            )  # fmt: skip
            return (
                None,
                None,
                d_q,
                d_k,
                d_v,
                None if pos is None else d_pos,
                None if bias_u is None else d_bias_u,
                None if bias_v is None else d_bias_v,
                None if offset_bias is None else d_offset_bias,
                None if offset_gate is None else d_offset_gate,
                None if key_bias is None else d_key_bias,
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
        d_q, d_k, d_v, d_pos, d_bias_u, d_bias_v, d_offset_bias, d_offset_gate, d_key_bias = node_gradients(
            op, kernels, (grad_y,), make(Saved, (q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate,
            key_bias, key_padding_mask, attn_mask, starts, dropout_seed, y, lse, remainder, dropout_p,
            context, chunk_size, soft_cap, pos_span,)),
        )  # fmt: skip
        return (
            None,
            None,
            d_q,
            d_k,
            d_v,
            d_pos,
            d_bias_u,
            d_bias_v,
            d_offset_bias,
            d_offset_gate,
            d_key_bias,
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
    dtype = promoted(saved.q) if kernels.backend == "cpu" else None
    d_q, d_k, d_v, d_pos, d_bias_u, d_bias_v, d_offset_bias, d_offset_gate, d_key_bias = kernels.backward(
        operand(grad_y, dtype), operand(saved.q, dtype), operand(saved.k, dtype), operand(saved.v, dtype),
        operand(saved.pos, dtype), operand(saved.bias_u, dtype), operand(saved.bias_v, dtype),
        operand(saved.offset_bias, dtype), operand(saved.offset_gate, dtype), operand(saved.key_bias, dtype),
        operand(saved.key_padding_mask, None), operand(saved.attn_mask, None), operand(saved.starts, None),
        operand(saved.dropout_seed, None), saved.y, saved.lse, saved.remainder, saved.dropout_p,
        *saved.context, saved.chunk_size, saved.soft_cap, *saved.pos_span,
    )  # fmt: skip
    d_q = back(d_q, saved.q)
    d_k = back(d_k, saved.k)
    d_v = back(d_v, saved.v)
    d_pos = back(d_pos, saved.pos)
    d_bias_u = back(d_bias_u, saved.bias_u)
    d_bias_v = back(d_bias_v, saved.bias_v)
    d_offset_bias = back(d_offset_bias, saved.offset_bias)
    d_offset_gate = back(d_offset_gate, saved.offset_gate)
    d_key_bias = back_in_shape(d_key_bias, saved.key_bias)
    return d_q, d_k, d_v, d_pos, d_bias_u, d_bias_v, d_offset_bias, d_offset_gate, d_key_bias


apply = applied(RelAttention)


# --------------------------------------------------------------------------- the registered operator
def fake(
    q, k, v, pos=None, bias_u=None, bias_v=None, offset_bias=None, offset_gate=None, key_bias=None,
    key_padding_mask=None, attn_mask=None, starts=None, dropout_p=0.0, dropout_seed=None, context=(-1, -1),
    chunk_size=1, soft_cap=0.0, pos_span=(-1, -1), keep=False,
):  # fmt: skip
    keep = keep and family.kernels(q) is not None
    B = q.shape[0]
    T = q.shape[1]
    H = q.shape[2]
    E = v.shape[3]
    arguments = Arguments(
        q, k, v, pos, bias_u, bias_v, offset_bias, offset_gate, key_bias, key_padding_mask, attn_mask, starts,
        dropout_p, dropout_seed, context, chunk_size, soft_cap, pos_span,
    )  # fmt: skip
    return (
        torch.empty((B, T, H, E), dtype=promoted(q), device=q.device),
        torch.empty((B, H, T) if keep else (0,), dtype=wide(q), device=q.device),
        torch.empty(
            _remainder_shape(family.kernels(q).backend, arguments) if keep else (0,),
            dtype=promoted(q),
            device=q.device,
        ),
    )


op.serve(
    rel_attention,
    Written(
        Arguments=Arguments,
        check=check,
        run_kernels=run_kernels,
        fake=fake,
        result_dtypes=result_dtypes,
        Saved=Saved,
        apply=apply,
        differentiate=differentiate,
        results=("y", "lse", "remainder"),
        deciding=("q",),
        differentiable=("q", "k", "v", "pos", "bias_u", "bias_v", "offset_bias", "offset_gate", "key_bias"),
        graded={"y": ""},
        saves=(
            "q",
            "k",
            "v",
            "pos",
            "bias_u",
            "bias_v",
            "offset_bias",
            "offset_gate",
            "key_bias",
            "key_padding_mask",
            "attn_mask",
            "starts",
            "dropout_seed",
            "y",
            "lse",
            "remainder",
        ),
        kept=("lse", "remainder"),
        autocast=("q", "k", "v", "pos", "bias_u", "bias_v", "offset_bias", "offset_gate", "key_bias"),
    ),
)
operator = register_op(
    op,
    "rel_attention(Tensor q, Tensor k, Tensor v, Tensor? pos=None, Tensor? bias_u=None, Tensor? "
    "bias_v=None, Tensor? offset_bias=None, Tensor? offset_gate=None, Tensor? key_bias=None, Tensor? "
    "key_padding_mask=None, Tensor? attn_mask=None, Tensor? starts=None, float dropout_p=0.0, Tensor? "
    "dropout_seed=None, SymInt[2] context=[-1, -1], SymInt chunk_size=1, float soft_cap=0.0, SymInt[2] "
    "pos_span=[-1, -1], bool keep=False) -> (Tensor, Tensor, Tensor)",
    "rel_attention_backward(Tensor grad_y, Tensor q, Tensor k, Tensor v, Tensor? pos, Tensor? bias_u, "
    "Tensor? bias_v, Tensor? offset_bias, Tensor? offset_gate, Tensor? key_bias, Tensor? "
    "key_padding_mask, Tensor? attn_mask, Tensor? starts, Tensor? dropout_seed, Tensor y, Tensor lse, "
    "Tensor remainder, float dropout_p, SymInt[2] context, SymInt chunk_size, float soft_cap, SymInt[2] "
    "pos_span) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
