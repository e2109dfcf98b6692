# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention with relative positions (Dai et al., "Transformer-XL", 2019, section 3.3):

score(i, j) = ((q_i + u) · k_j + (q_i + v) · R[j − i]) / √d, with R a projection of sinusoids.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common import attention_dropout, plumbing
from fastasr.models.common.attention_of_recordings import of_recordings
from fastasr.models.common.plain import is_plain
from fastasr.models.common.row import Row
from fastasr.ops._relative_positions import relative_shift


class RelPositionMultiHeadedAttention(torch.nn.Module):
    """query (B, T, D), pos_emb (1, 2T − 1, D), mask -> (B, T, D).

    Row T − 1 + o of pos_emb belongs to the keys o frames after the query. mask is (B, 1, T) or (B, T, T), True at keys
    that the query sees, or None. With a ``Row`` as the mask, query is (1, N, D), and pos_emb is that of the
    longest recording. The attention of a query that sees no key is 0 before the last projection. The module
    does not keep the weights, and forms them only for ``zero_triu`` or, with dropout, inside
    :func:`fastasr.upstream_draws`. See :func:`fastasr.ops.rel_attention`.
    """

    def __init__(self, n_head: int, n_feat: int, dropout_rate: float, zero_triu: bool = False) -> None:
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

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Row | Tensor | None
    ) -> Tensor:
        batch, frames = query.shape[:2]
        q, k, v = (y.view(batch, -1, self.h, self.d_k) for y in projections(self, query, key, value))
        q, k = normed(self, "q_norm", q), normed(self, "k_norm", k)
        p = plumbing.linear(self.linear_pos, pos_emb).view(pos_emb.shape[0], -1, self.h, self.d_k)
        if isinstance(mask, Row):
            dropped: Any = plumbing.dropped_share(self.dropout)
            # The gradient of a squeezed tensor is a view; that of q[0] would be a copy within zeros.
            q, k, v, p = (y.squeeze(0) for y in (q, k, v, p))
            out = of_recordings(mask, q, k, v, p, self.pos_bias_u, self.pos_bias_v, dropped)
            return plumbing.linear(self.linear_out, out.flatten(1).unsqueeze(0))
        hidden = None if mask is None else mask.eq(0)  # (B, 1 or T, T)
        reason = "zero_triu is set, or each sequence has position embeddings of its own"
        dropout = attention_dropout.dropout_of(
            self,
            plumbing.dropped_share(self.dropout),
            q.device,
            reason if self.zero_triu or len(p) > 1 else None,
        )
        if dropout is None:
            out = _with_weights(self, q, k, v, p, hidden)
        else:
            hides = masks(hidden, batch, frames)
            out = ops.rel_attention(
                q, k, v, p.squeeze(0), self.pos_bias_u, self.pos_bias_v, **hides, **dropout
            )
        return plumbing.linear(self.linear_out, out.reshape(batch, frames, self.h * self.d_k))


def projections(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
    layers = module.linear_q, module.linear_k, module.linear_v
    if query is key and key is value:
        return plumbing.linears(layers, query)
    return [plumbing.linear(layer, x) for layer, x in zip(layers, (query, key, value), strict=True)]


def normed(module: Any, name: str, x: Tensor) -> Tensor:
    """Returns x (B, T, H, d) after ESPnet's norm of queries or keys, which our class does not have."""
    norm = getattr(module, name, None)
    return x if norm is None or is_plain(norm, torch.nn.Identity) else norm(x.transpose(1, 2)).transpose(1, 2)


def _with_weights(
    module: RelPositionMultiHeadedAttention, q: Tensor, k: Tensor, v: Tensor, p: Tensor, hidden: Tensor | None
) -> Tensor:
    """Computes the formula directly, as upstream does, with upstream's draw of the dropout."""
    scale = module.d_k**-0.5
    content = (q + module.pos_bias_u).transpose(1, 2)  # (B, H, T, d)
    position = (q + module.pos_bias_v).transpose(1, 2) * scale
    by_offset = relative_shift(position @ p.permute(0, 2, 3, 1))  # (B, H, T, T)
    if module.zero_triu:
        by_offset = by_offset.tril()
    scores = torch.matmul(content * scale, k.permute(0, 2, 3, 1)) + by_offset
    if hidden is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        hidden = hidden.unsqueeze(1)  # (B, 1, 1 or T, T)
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
    return torch.matmul(plumbing.dropout(module.dropout, weights), v.transpose(1, 2)).transpose(1, 2)


def masks(hidden: Tensor | None, batch: int, frames: int) -> dict[str, Any]:
    """Returns the op's mask arguments for ``hidden`` (B or 1, 1 or T, T), True at keys that are not seen, or None."""
    if hidden is None:
        return {}
    # The mask is as long as the greatest length, a value that a tracer does not see.
    if torch.compiler.is_compiling():
        torch._check(hidden.shape[-1] == frames)
    if hidden.shape[1] == 1:
        return {"key_padding_mask": hidden[:, 0].expand(batch, -1)}
    return {"attn_mask": hidden.expand(batch, frames, -1)}
