# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention with relative positions (Dai et al., "Transformer-XL", 2019, section 3.3):

score(i, j) = ((q_i + u) · k_j + (q_i + v) · R[j − i]) / √d, with R a projection of sinusoids.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.mega import plumbing


def relative_shift(scores: Tensor) -> Tensor:
    """(..., T, 2T − 1) by offset -> (..., T, T) by key: element (i, j) is that of offset j − i. A view."""
    frames = scores.shape[-2]
    if frames < 2:
        return scores
    # a row less one element apart, each key's scores stand in one column
    flat = scores.flatten(-2)[..., frames - 1 : -1]
    return flat.unflatten(-1, (frames, 2 * frames - 2))[..., :frames]


class RelPositionMultiHeadedAttention(torch.nn.Module):
    """query (B, T, D), pos_emb (1, 2T − 1, D), its rows from offset −(T − 1) to T − 1 of key from query, mask (B, 1, T)
    or (B, T, T) with True where a key counts, or None -> (B, T, D).

    A query that sees no key gives zeros before the last projection. The weights are not kept.
    """

    def __init__(self, n_head, n_feat, dropout_rate, zero_triu=False):
        super().__init__()
        if n_feat % n_head:
            raise ValueError(
                f"RelPositionMultiHeadedAttention: n_feat: expected a multiple of n_head ({n_head}), got {n_feat}"
            )
        self.d_k, self.h, self.zero_triu = n_feat // n_head, n_head, zero_triu
        self.linear_q = torch.nn.Linear(n_feat, n_feat)
        self.linear_k = torch.nn.Linear(n_feat, n_feat)
        self.linear_v = torch.nn.Linear(n_feat, n_feat)
        self.linear_out = torch.nn.Linear(n_feat, n_feat)
        self.dropout = torch.nn.Dropout(p=dropout_rate)
        self.linear_pos = torch.nn.Linear(n_feat, n_feat, bias=False)
        self.pos_bias_u = torch.nn.Parameter(torch.empty(n_head, self.d_k))
        self.pos_bias_v = torch.nn.Parameter(torch.empty(n_head, self.d_k))
        torch.nn.init.xavier_uniform_(self.pos_bias_u)
        torch.nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, query, key, value, pos_emb, mask):
        batch, frames = query.shape[:2]
        q = plumbing.linear(self.linear_q, query).view(batch, frames, self.h, self.d_k)
        k = plumbing.linear(self.linear_k, key).view(batch, -1, self.h, self.d_k).transpose(1, 2)
        v = plumbing.linear(self.linear_v, value).view(batch, -1, self.h, self.d_k).transpose(1, 2)
        p = plumbing.linear(self.linear_pos, pos_emb).view(pos_emb.shape[0], -1, self.h, self.d_k)
        scale = self.d_k**-0.5
        content = (q + self.pos_bias_u).transpose(1, 2)  # (B, H, T, d)
        position = (q + self.pos_bias_v).transpose(1, 2) * scale
        by_offset = relative_shift(position @ p.permute(0, 2, 3, 1))  # (B, H, T, T)
        if self.zero_triu:
            by_offset = by_offset.tril()
        hidden = None if mask is None else mask.unsqueeze(1).eq(0)  # (B, 1, 1 or T, T)
        idle = plumbing.is_idle(self.dropout)
        if idle and not torch.is_grad_enabled():
            out = _without_gradient(content, k, v, by_offset, hidden)
        else:
            scores = torch.matmul(content * scale, k.transpose(-2, -1)) + by_offset
            if hidden is None:
                weights = torch.softmax(scores, dim=-1)
            else:
                scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
                weights = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
            out = torch.matmul(plumbing.dropout(self.dropout, weights), v)
        out = out.transpose(1, 2).reshape(batch, frames, self.h * self.d_k)
        return plumbing.linear(self.linear_out, out)


def _without_gradient(content, k, v, by_offset, hidden):
    """The same through torch's fused attention, which takes the positions' scores as an additive mask."""
    if hidden is None:
        return F.scaled_dot_product_attention(content, k, v, attn_mask=by_offset)
    by_offset = by_offset.masked_fill(hidden, torch.finfo(by_offset.dtype).min)
    out = F.scaled_dot_product_attention(content, k, v, attn_mask=by_offset)
    return out.masked_fill(hidden.all(-1, keepdim=True), 0.0)
