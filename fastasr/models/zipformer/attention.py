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

import random

import torch

from fastasr.models.zipformer.inference import is_plain_inference

# Position scores above this size (bytes) are computed in pieces of at most PIECE_BYTES.
WHOLE_BYTES = 32 << 20
PIECE_BYTES = 6 << 20


class RelPositionMultiheadAttentionWeights(torch.nn.Module):
    """x (T, B, C), pos_emb (1 or B, 2T-1, pos_dim) -> attention weights (heads, B, T, T).

    ``forward`` is written for instances of upstream's class: anywhere but in plain inference on CPU it is that
    class's own forward which runs.
    """

    def forward(self, x, pos_emb, key_padding_mask=None, attn_mask=None):
        if not is_plain_inference(self, x, self.in_proj.weight, 3) or pos_emb.requires_grad:
            return type(self).forward(
                self, x, pos_emb, key_padding_mask=key_padding_mask, attn_mask=attn_mask
            )
        return _weights(self, x, pos_emb, key_padding_mask, attn_mask)


def _weights(module, x, pos_emb, key_padding_mask, attn_mask):
    heads, dim, pos_dim = module.num_heads, module.query_head_dim, module.pos_head_dim
    frames, batch, _ = x.shape
    projected = module.in_proj(x)
    q, k, p = projected.split([heads * dim, heads * dim, projected.shape[-1] - 2 * heads * dim], -1)
    assert p.shape[-1] == heads * pos_dim, (p.shape[-1], heads, pos_dim)
    q = module.copy_query(q).reshape(frames, batch, heads, dim).permute(2, 1, 0, 3)  # [H, B, T, dq]
    k = module.whiten_keys(module.balance_keys(k)).reshape(frames, batch, heads, dim)
    k = k.permute(2, 1, 3, 0)  # [H, B, dq, T]
    p = module.copy_pos_query(p).reshape(frames, batch, heads, pos_dim).permute(2, 1, 0, 3)  # [H, B, T, dp]
    relative = module.linear_pos(pos_emb).reshape(-1, 2 * frames - 1, heads, pos_dim)
    relative = relative.permute(2, 0, 3, 1)  # [H, 1 or B, dp, 2T-1]
    if attn_mask is not None:
        assert attn_mask.dtype == torch.bool, attn_mask.dtype
    if key_padding_mask is not None:
        assert key_padding_mask.shape == (batch, frames), key_padding_mask.shape
        key_padding_mask = key_padding_mask.to(torch.bool).unsqueeze(1)  # [B, 1, T]

    size = heads * batch * frames * (2 * frames - 1) * x.element_size()
    compute = _whole if size <= WHOLE_BYTES else _pieces
    weights = compute(q, k, p, relative, key_padding_mask, attn_mask)
    if random.random() < 0.001:  # upstream draws here in inference
        module._print_attn_entropy(weights)
    return weights


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
    rows = _rows_per_piece(frames, q.element_size())
    weights = q.new_empty(heads, batch, frames, frames)
    offset_buffer, score_buffer = q.new_empty(rows * (frames + rows - 1)), q.new_empty(rows * frames)
    for h in range(heads):
        for b in range(batch):
            offsets = relative[h, b if relative.shape[1] > 1 else 0]  # [dp, 2T-1]
            for first in range(0, frames, rows):
                piece = slice(first, min(first + rows, frames))
                n = piece.stop - first
                start, width = frames - piece.stop, frames + n - 1  # the offsets that these rows use
                by_offset = offset_buffer[: n * width].view(n, width)
                torch.mm(p[h, b, piece], offsets[:, start : start + width], out=by_offset)
                scores = score_buffer[: n * frames].view(n, frames)
                torch.mm(q[h, b, piece], k[h, b], out=scores)
                scores += _by_key(by_offset, n - 1)
                if attn_mask is not None:
                    scores.masked_fill_((attn_mask if attn_mask.ndim == 2 else attn_mask[b])[piece], -1000)
                if key_padding_mask is not None:
                    scores.masked_fill_(key_padding_mask[b], -1000)
                torch.softmax(scores, -1, out=weights[h, b, piece])
    return weights


def _rows_per_piece(frames, element_size):
    """Rows of which the position scores take at most PIECE_BYTES."""
    rows = frames
    while rows > 16 and rows * (frames + rows - 1) * element_size > PIECE_BYTES:
        rows = (rows + 1) // 2
    return rows
