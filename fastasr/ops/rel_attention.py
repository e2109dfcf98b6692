# SPDX-License-Identifier: Apache-2.0
r"""Attention with relative positions of Transformer-XL (Dai et al., 2019, section 3.3), without the T×T weights.

For every sequence and head, with queries i in 0 … T − 1 and keys j in 0 … K − 1, the last T of which stand at the
queries' frames (K = T but for a stream, whose first K − T keys come from a cache):

    s[i,j] = ((q[i] + u)·k[j] + (q[i] + w)·R[T − 1 + j − i]) / √d,    y[i] = Σ_j softmax_j(s[i,j]) m[i,j] v[j]

over the keys that query i sees; a query that sees none gives 0. Row r of R stands for the key r − (K − 1) frames behind
the query; u and w are the biases of content and of position. R may end l frames before the query and r frames behind
it, and keys beyond have its first or last row (Shaw et al., 2018), where dR then adds up. Instead of R, or with it, a
number b by offset, times one g by query, may be added to the score, as T5's bias (Raffel et al., 2020) and WavLM's
gated one (Chen et al., 2022):

    s[i,j] = … + g[i] b[T − 1 + j − i] + c[j]

c is a number by key, as a mask of numbers that all queries share. A soft cap a bounds the scores, as Gemma's: s ← a
tanh(s / a), before keys are hidden. A limited context hides keys without a mask: with f = i + K − T, the query's frame,
and chunks of c frames, query i sees

    c⌊f / c⌋ − left ≤ j < c⌊f / c⌋ + c + right

Recordings may lie one after the other in one sequence: a query then sees the keys of its own recording alone. Kernels
read the boundaries where they lie, so that one recorded graph serves batches of all lengths.

m is 1, or under dropout 0 for the share p of all weights and 1 / (1 − p) for the others: a hash of a seed and of the
weight's place (:mod:`fastasr.ops._weights_dropout`), which no pass keeps. With G = dy, P the weights and
D[i] = Σ_j P m G vᵀ:

    dv = (P m)ᵀ G        dS = P (m G vᵀ − D) / √d
    dq = dS k + dS′ R,    dk = dSᵀ (q + u),    dR = dS′ᵀ (q + w),    du = Σ dS k,    dw = Σ dS′ R
    db = √d Σ g dS′,      dg = √d Σ_j b dS,      dc = √d Σ_i dS,      dS ← dS (1 − (s / a)²) first under a soft cap

where dS′[i, T − 1 + j − i] = dS[i, j]: the same numbers ordered by offset instead of by key, every row one element
further left than the one before.

Upstream: ``RelPositionMultiHeadedAttention`` of ESPnet's Conformer, Branchformer and E-Branchformer between its
projections, and RETURNN's; both form the (T, 2T − 1) scores by offset, shift them, and keep some six (B, H, T, T)
tensors for the backward pass. Here scores by offset are formed for one block of queries and keys at a time and shifted
where they are added. Forward keeps y and the log-sum-exp of each query, and Triton's kernels in 16 bits what rounding
takes from y, with which D is G · y without a sweep over the keys. Backward computes the scores again: memory is
O(T) in both. Blocks of keys outside the context of a block of queries are left out: work is then O(T) too.
"""

from typing import Annotated

import torch
from torch import Tensor

from fastasr.ops import _weights_dropout
from fastasr.ops._op import Arguments, Op, op
from fastasr.ops._relative_positions import apart, outside_context, relative_shift, rows_by_offset
from fastasr.ops._remainder import remainder_shape


def _check(op: Op, a: Arguments) -> None:
    if a.dropout_p and a.dropout_seed is None:
        op.fail("dropout_seed", "a Tensor where dropout_p is more than 0", None)
    if a.bias_v is not None and a.pos is None:
        op.fail("bias_v", "it together with pos", "no pos")
    if a.offset_gate is not None and a.offset_bias is None:
        op.fail("offset_gate", "it together with offset_bias", "no offset_bias")
    if a.starts is not None and a.k.shape[1] != a.q.shape[1]:
        op.fail("k", "as many frames as q with starts", a.k.shape[1])
    if a.starts is not None and a.chunk_size != 1:
        op.fail("chunk_size", "1 with starts", a.chunk_size)
    rows, (left, right) = a.q.shape[1] and a.q.shape[1] + a.k.shape[1] - 1, a.pos_span
    if min(left, right) < 0 and (left, right) != (-1, -1):
        op.fail("pos_span", "two numbers of at least 0, or (-1, -1)", a.pos_span)
    if left >= 0 and a.pos is None:
        op.fail("pos_span", "it together with pos", "no pos")
    expected = rows if left < 0 else left + right + 1
    if a.pos is not None and a.pos.shape[0] != expected:
        op.fail("pos", f"{expected} rows", tuple(a.pos.shape))
    if min(a.context) < -1:
        op.fail("context", "two numbers, each -1 or at least 0", a.context)


def _remainder_shape(backend: str, a: Arguments) -> tuple[int, ...]:
    return remainder_shape(backend, (*a.q.shape[:3], a.v.shape[3]), a.q.dtype)


_FLOATING = "q k v pos bias_u bias_v offset_bias offset_gate key_bias"
_TENSORS = f"{_FLOATING} key_padding_mask attn_mask starts dropout_seed"
_OPTIONS = "dropout_p *context chunk_size soft_cap *pos_span"


@op(
    "cpu triton",
    one_dtype=_FLOATING,
    keeps={
        "lse": Annotated[Tensor, "B H T", "wide q"],
        "remainder": Annotated[Tensor, _remainder_shape, "q"],
    },
    forward=f"{_TENSORS} {_OPTIONS} keep",
    backward=f"grad {_TENSORS} y lse remainder {_OPTIONS}",
    check=_check,
)
def rel_attention(
    q: Annotated[Tensor, "B T H D, H >= 1, D >= 1"],
    k: Annotated[Tensor, "B K H D, K >= T"],
    v: Annotated[Tensor, "B K H E, E >= 1"],
    pos: Annotated[Tensor, "R P D, (P == 1 or P == H)"] | None = None,
    bias_u: Annotated[Tensor, "H D"] | None = None,
    bias_v: Annotated[Tensor, "H D"] | None = None,
    *,
    offset_bias: Annotated[Tensor, "(T and T+K-1) H"] | None = None,
    offset_gate: Annotated[Tensor, "B T H"] | None = None,
    key_bias: Annotated[Tensor, "B H K | 1 H K | B 1 K | 1 1 K"] | None = None,
    key_padding_mask: Annotated[Tensor, "B K", bool] | None = None,
    attn_mask: Annotated[Tensor, "T K | B T K", bool] | None = None,
    starts: Annotated[Tensor, "N, N >= 1", torch.int64] | None = None,
    dropout_p: Annotated[float, ">= 0 and < 1"] = 0.0,
    dropout_seed: Annotated[Tensor, "1", torch.int64] | None = None,
    context: tuple[int, int] = (-1, -1),
    chunk_size: Annotated[int, ">= 1"] = 1,
    soft_cap: Annotated[float, ">= 0"] = 0.0,
    pos_span: tuple[int, int] = (-1, -1),
) -> Annotated[Tensor, "B T H E", "q"]:
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
    scale = q.shape[-1] ** -0.5
    content = ((q if bias_u is None else q + bias_u) * scale).transpose(1, 2)  # [B, H, T, d]
    scores = torch.matmul(content, k.permute(0, 2, 3, 1))
    if pos is not None:
        position = ((q if bias_v is None else q + bias_v) * scale).transpose(1, 2)
        rows = pos if pos_span[0] < 0 else rows_by_offset(pos, q.shape[1], k.shape[1], pos_span)
        by_offset = torch.matmul(position, rows.permute(1, 2, 0))  # [B, H, T, T + K - 1]
        scores = scores + relative_shift(by_offset)
    if offset_bias is not None:
        biases = offset_bias.t().unsqueeze(1).expand(-1, q.shape[1], -1)  # [H, T, T + K - 1]
        gate = 1.0 if offset_gate is None else offset_gate.transpose(1, 2).unsqueeze(-1)  # [B, H, T, 1]
        scores = scores + gate * relative_shift(biases)
    if key_bias is not None:
        scores = scores + key_bias.unsqueeze(2)
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    masks = [] if key_padding_mask is None else [key_padding_mask[:, None, None, :]]
    masks += [] if attn_mask is None else [attn_mask.unsqueeze(-3)]
    masks += [] if max(context) < 0 else [outside_context(scores, context, chunk_size)]
    masks += [] if starts is None else [apart(starts, q.shape[1])]
    for mask in masks:
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1)
    for mask in masks:
        weights = weights.masked_fill(mask, 0)
    if dropout_p and dropout_seed is not None:
        kept = _weights_dropout.kept(dropout_seed, dropout_p, *weights.shape)
        weights = weights * kept / (1 - dropout_p)
    return torch.matmul(weights, v.transpose(1, 2)).transpose(1, 2)
