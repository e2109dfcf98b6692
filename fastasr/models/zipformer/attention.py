# SPDX-License-Identifier: Apache-2.0
"""Relative-position attention weights.

    s[h,b,i,j] = q[h,b,i] . k[h,b,j] + p[h,b,i] . R[h, T-1-i+j]        R = linear_pos(pos_emb), 2T-1 rows
    weights    = softmax_j(s), masked scores set to -1000 first

Inference on CPU does this in place: the scores are added to, masked and normalised where they lie. When the
position scores of all heads and sequences together are larger than what the allocator keeps (32 MiB: glibc
returns anything above to the system at each release, and writing it again costs a page fault every 4 KiB), they
are computed a piece at a time in one small buffer. In place the results are bitwise those of upstream's sequence; in
pieces the matrix products may round differently.
"""

import copy
import logging
import random

import torch

from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.gradient_scale import penalize_abs_values_gt
from fastasr.models.zipformer.identity import Identity
from fastasr.models.zipformer.inference import is_plain_inference
from fastasr.models.zipformer.initial_scale import ScaledLinear
from fastasr.models.zipformer.schedules import ScheduledFloat, whitening_schedule
from fastasr.models.zipformer.self_attention import check_cache
from fastasr.models.zipformer.softmax import softmax
from fastasr.models.zipformer.whitening import Whiten

# Position scores above this size (bytes) are computed in pieces of at most PIECE_BYTES.
WHOLE_BYTES = 32 << 20
PIECE_BYTES = 6 << 20


class RelPositionMultiheadAttentionWeights(torch.nn.Module):
    """x (T, B, C), pos_emb (1 or B, 2T-1, pos_dim) -> attention weights (heads, B, T, T).

    key_padding_mask (B, T) and attn_mask ((B,) T, T) are True where a source counts for nothing. In training,
    per call, the position scores are left out at ``pos_emb_skip_rate``, and on 10 % of the calls scores
    beyond 25 are penalised by 1e-4 times their excess. Both are drawn from Python's ``random``; so is, in any
    mode, one number by which 0.1 % of the calls in eval mode log the entropy of the weights.

    Raises ValueError for masks of another shape and TypeError for an attn_mask that is not boolean.
    """

    def __init__(
        self,
        embed_dim,
        pos_dim,
        num_heads,
        query_head_dim,
        pos_head_dim,
        dropout=0.0,
        pos_emb_skip_rate=ScheduledFloat((0.0, 0.5), (4000.0, 0.0)),  # noqa: B008 (copied)
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.query_head_dim = query_head_dim
        self.pos_head_dim = pos_head_dim
        self.dropout = dropout
        self.pos_emb_skip_rate = copy.deepcopy(pos_emb_skip_rate)
        self.name = None
        self.in_proj = ScaledLinear(
            embed_dim, num_heads * (2 * query_head_dim + pos_head_dim), initial_scale=query_head_dim**-0.25
        )
        self.whiten_keys = Whiten(
            num_groups=num_heads,
            whitening_limit=whitening_schedule(3.0),
            prob=(0.025, 0.25),
            grad_scale=0.025,
        )
        # Softmax ignores a constant added to the keys, so rounding could let their mean wander.
        self.balance_keys = Balancer(
            query_head_dim * num_heads,
            channel_dim=-1,
            min_positive=0.4,
            max_positive=0.6,
            min_abs=0.0,
            max_abs=100.0,
            prob=0.025,
        )
        self.linear_pos = ScaledLinear(pos_dim, num_heads * pos_head_dim, bias=False, initial_scale=0.05)
        self.copy_pos_query = Identity()
        self.copy_query = Identity()

    def forward(self, x, pos_emb, key_padding_mask=None, attn_mask=None):
        _check_masks(x, key_padding_mask, attn_mask)
        plain = is_plain_inference(self, x, self.in_proj.weight, 3) and not pos_emb.requires_grad
        q, k, p = _projections(self, x)
        q, k, p = self.copy_query(q), self.whiten_keys(self.balance_keys(k)), self.copy_pos_query(p)
        with_positions = not self.training or random.random() >= float(self.pos_emb_skip_rate)
        relative = self.linear_pos(pos_emb) if with_positions else None
        penalized = self.training and random.random() < 0.1
        masks = (
            None if key_padding_mask is None else key_padding_mask.to(torch.bool).unsqueeze(1),  # [B, 1, T]
            attn_mask,
        )
        weights = _weights(self, q, k, p, relative, *masks, penalized, plain)
        if random.random() < 0.001 and not self.training:
            _log_entropy(self, weights)
        if self.dropout != 0.0:
            weights = torch.nn.functional.dropout(weights, p=self.dropout, training=self.training)
        return weights

    def streaming_forward(self, x, pos_emb, cached_key, left_context_len, key_padding_mask):
        """x (T, B, C), one chunk; pos_emb (1 or B, left_context_len + 2T - 1, pos_dim); cached_key
        (left_context_len, B, heads * query_head_dim); key_padding_mask (B, left_context_len + T) or None ->
        weights (heads, B, T, left_context_len + T), the cache for the next chunk.
        """
        check_cache(
            "RelPositionMultiheadAttentionWeights", "cached_key", cached_key.shape[0], left_context_len
        )
        q, k, p = _projections(self, x)
        k = torch.cat([cached_key, k])
        _check_masks(k, key_padding_mask, None)
        cached_key = k[k.shape[0] - left_context_len :]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.to(torch.bool).unsqueeze(1)
        relative = self.linear_pos(pos_emb)
        plain = is_plain_inference(self, x, self.in_proj.weight, 3) and not (
            pos_emb.requires_grad or (torch.is_grad_enabled() and cached_key.requires_grad)
        )
        return _weights(self, q, k, p, relative, key_padding_mask, None, False, plain), cached_key


def _log_entropy(module, weights):
    if logging.getLogger().isEnabledFor(logging.INFO):
        weights = weights.detach().to(torch.float32)
        entropy = torch.special.entr(weights).sum(-1).mean((1, 2))
        logging.info("name=%s, entropy of the attention weights by head: %s", module.name, entropy)


def _check_masks(sources, key_padding_mask, attn_mask):
    frames, batch, _ = sources.shape
    if key_padding_mask is not None and tuple(key_padding_mask.shape) != (batch, frames):
        raise ValueError(
            f"RelPositionMultiheadAttentionWeights: key_padding_mask must be ({batch}, {frames}), "
            f"got {tuple(key_padding_mask.shape)}"
        )
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise TypeError(
            f"RelPositionMultiheadAttentionWeights: attn_mask must be torch.bool, got {attn_mask.dtype}"
        )


def _projections(module, x):
    """q, k, p of x (T, B, C): (T, B, heads * dim) each."""
    width = module.num_heads * module.query_head_dim
    return module.in_proj(x).split([width, width, module.num_heads * module.pos_head_dim], -1)


def _weights(module, q, k, p, relative, key_padding_mask, attn_mask, penalized, plain):
    """The softmax of the scores: q, p (T, B, heads * dim), k (S, B, heads * dim), relative (1 or B, T + S - 1,
    heads * dim) or None for no position scores, key_padding_mask (B, 1, S), attn_mask ((B,) T, S).
    """
    heads, dim, pos_dim = module.num_heads, module.query_head_dim, module.pos_head_dim
    targets, batch, _ = q.shape
    sources = k.shape[0]
    q = q.reshape(targets, batch, heads, dim).permute(2, 1, 0, 3)  # [H, B, T, dq]
    k = k.reshape(sources, batch, heads, dim).permute(2, 1, 3, 0)  # [H, B, dq, S]
    p = p.reshape(targets, batch, heads, pos_dim).permute(2, 1, 0, 3)  # [H, B, T, dp]
    if relative is not None:
        relative = relative.reshape(-1, targets + sources - 1, heads, pos_dim)
        relative = relative.permute(2, 0, 3, 1)  # [H, 1 or B, dp, T+S-1]
    if not plain:
        return _differentiable(module, q, k, p, relative, key_padding_mask, attn_mask, penalized)
    size = heads * batch * targets * (targets + sources - 1) * q.element_size()
    compute = _whole if size <= WHOLE_BYTES else _pieces
    return compute(q, k, p, relative, key_padding_mask, attn_mask)


def _differentiable(module, q, k, p, relative, key_padding_mask, attn_mask, penalized):
    scores = torch.matmul(q, k)  # [H, B, T, S]
    if relative is not None:
        scores = scores + _by_key(torch.matmul(p, relative), q.shape[2] - 1)
    if penalized:
        scores = penalize_abs_values_gt(scores, limit=25.0, penalty=1.0e-04, name=module.name)
    for mask in (attn_mask, key_padding_mask):
        if mask is not None:
            scores = scores.masked_fill(mask, -1000)
    return softmax(scores, dim=-1)


def _by_key(scores, first):
    """Scores by offset (contiguous, [..., n, width]) as a view by key: row r, key j is offset first - r + j."""
    *outer, rows, width = scores.shape
    return scores.as_strided((*outer, rows, width - first), (*scores.stride()[:-2], width - 1, 1), first)


def _whole(q, k, p, relative, key_padding_mask, attn_mask):
    scores = torch.matmul(q, k)  # [H, B, T, T]
    scores += _by_key(torch.matmul(p, relative), q.shape[2] - 1)
    for mask in (attn_mask, key_padding_mask):
        if mask is not None:
            scores.masked_fill_(mask, -1000)
    return torch.softmax(scores, -1)


def _pieces(q, k, p, relative, key_padding_mask, attn_mask):
    heads, batch, frames, _ = q.shape
    sources = k.shape[-1]
    rows = _rows_per_piece(frames, sources, q.element_size())
    weights = q.new_empty(heads, batch, frames, sources)
    offset_buffer, score_buffer = q.new_empty(rows * (sources + rows - 1)), q.new_empty(rows * sources)
    for h in range(heads):
        for b in range(batch):
            offsets = relative[h, b if relative.shape[1] > 1 else 0]  # [dp, T+S-1]
            for first in range(0, frames, rows):
                piece = slice(first, min(first + rows, frames))
                n = piece.stop - first
                start, width = frames - piece.stop, sources + n - 1  # the offsets that these rows use
                by_offset = offset_buffer[: n * width].view(n, width)
                torch.mm(p[h, b, piece], offsets[:, start : start + width], out=by_offset)
                scores = score_buffer[: n * sources].view(n, sources)
                torch.mm(q[h, b, piece], k[h, b], out=scores)
                scores += _by_key(by_offset, n - 1)
                if attn_mask is not None:
                    scores.masked_fill_((attn_mask if attn_mask.ndim == 2 else attn_mask[b])[piece], -1000)
                if key_padding_mask is not None:
                    scores.masked_fill_(key_padding_mask[b], -1000)
                torch.softmax(scores, -1, out=weights[h, b, piece])
    return weights


def _rows_per_piece(frames, sources, element_size):
    """Rows of which the position scores take at most PIECE_BYTES."""
    rows = frames
    while rows > 16 and rows * (sources + rows - 1) * element_size > PIECE_BYTES:
        rows = (rows + 1) // 2
    return rows
