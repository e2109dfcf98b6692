# SPDX-License-Identifier: Apache-2.0
r"""Attention with one head and a relative-position bias in plain PyTorch, for streaming and where no kernel applies.

    s[i, j] = q[i] . k[j] scaling + bias[j - i]        W = softmax_j(s), s = -inf where j may not be seen

q (B, C, Lq, Z), k (B, C, Lk, Z) for C chunks that do not see each other. Queries are the last Lq of the Lk positions.
"""

import torch
from torch import Tensor

from fastasr._recording import on_host

CAUSAL = "causal"  # an attention mask may be this name instead of a matrix


def weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    attn_mask: Tensor | str | None = None,
) -> Tensor:
    """Returns W (B, C, Lq, Lk) in the scores' dtype, computed in float32 or better.

    bias: (Lq, Lk). mask: (B, C, Lk), True = padding; a row that is all padding counts as unmasked. attn_mask:
    (1, Lq, Lk), True = may not be seen, or CAUSAL.
    """
    scores = torch.matmul(q * scaling, k.transpose(2, 3)) + bias
    if attn_mask is not None:
        if isinstance(attn_mask, str):
            attn_mask = causal(q.shape[2], k.shape[2], q.device)
        scores = scores.masked_fill(attn_mask.unsqueeze(1), float("-inf"))
    if mask is not None:
        mask = mask & ~mask.all(dim=-1, keepdim=True)
        scores = scores.masked_fill(mask.unsqueeze(2), float("-inf"))
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).type_as(scores)


def causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """Returns (1, queries, keys), True above the diagonal that ends at the last query and key."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return mask.triu(keys - queries + 1).unsqueeze(0)


def is_causal(attn_mask: Tensor | str) -> bool:
    """Says whether a mask is the causal one. A tensor's values are read on the CPU only, since a GPU would have to
    wait.
    """
    if isinstance(attn_mask, str):
        if attn_mask != CAUSAL:
            raise ValueError(f"MEGA: attn_mask: expected a tensor or {CAUSAL!r}, got {attn_mask!r}")
        return True
    if attn_mask is None or not on_host(attn_mask):
        return False
    rows, columns = attn_mask.shape[-2:]
    return attn_mask.shape[0] == 1 and torch.equal(attn_mask, causal(rows, columns, attn_mask.device))
