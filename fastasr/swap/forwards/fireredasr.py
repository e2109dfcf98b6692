# SPDX-License-Identifier: Apache-2.0
"""Modules of FireRedASR's Conformer, which add the residual themselves."""

from typing import Any

from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import plumbing
from fastasr.models.common.ragged import Packing
from fastasr.models.fast_conformer.attention import projected
from fastasr.models.fast_conformer.convolution import after_gate, pointwise
from fastasr.swap.forwards.common import (
    by_mask,
    by_recording,
    dropped,
    drops,
    in_sequence,
    in_sequential,
    is_one_table,
)
from fastasr.swap.rule import Upstream


def firered_attention(
    self: Upstream, q: Tensor, k: Tensor, v: Tensor, pos_emb: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """Serves FireRedASR's RelPosMultiHeadAttention, which normalises queries, keys and values each by a LayerNorm of
    its own: q, which is k and v too, (B, T, width), position embeddings (1, 2T − 1, width), mask (B, 1, T), 0 at hidden
    keys, or None -> ((B, T, width), None)."""
    (batch, frames), dropout = q.shape[:2], None
    packing = mask if isinstance(mask, Packing) else None
    if packing is None:
        fits = q is k is v and is_one_table(pos_emb, frames)
        dropout = drops(self, q, fits and (mask is None or mask.shape == (batch, 1, frames)))
        if dropout is None:
            return type(self).forward(self, q, k, v, pos_emb, mask)
    heads = self.pos_bias_u.shape
    norms = self.layer_norm_q, self.layer_norm_k, self.layer_norm_v
    layers = self.w_qs, self.w_ks, self.w_vs
    queries, keys, values = (
        plumbing.linear(layer, norm(q)).view(batch, frames, *heads)
        for layer, norm in zip(layers, norms, strict=True)
    )
    rows = projected(self, self.linear_pos, pos_emb[0]).view(-1, *heads)
    if dropout is None:
        y = by_recording(self, packing, queries, keys, values, rows)
    else:
        hidden: dict[str, Any] = {} if mask is None else {"key_padding_mask": mask[:, 0].eq(0)}
        given = hidden | dropout
        y = ops.rel_attention(queries, keys, values, rows, self.pos_bias_u, self.pos_bias_v, **given)
    return plumbing.dropout(self.dropout, plumbing.linear(self.fc, y.flatten(2)), q), None


def firered_convolution(self: Upstream, x: Tensor, mask: Any = None) -> Tensor:
    """Serves FireRedASR's Conformer: x (B, T, width), mask (B, 1, T), 1 at valid frames, or None -> (B, T, width).
    Upstream sets padding to 0 before ``pointwise_conv1``, which has no bias, so that the gated frame is 0."""
    packed = mask is None or isinstance(mask, Packing)
    first, hidden = self.pointwise_conv1, None if packed else mask[:, 0].ne(1)
    n = self.pre_layer_norm(x)
    by_frame = plumbing.is_pointwise_conv1d(first) and first.bias is None
    if hidden is not None and not by_frame:
        n = n.masked_fill(hidden.unsqueeze(-1), 0.0)
    layers = self.depthwise_conv, self.batch_norm, self.swish, self.pointwise_conv2
    by = by_mask(mask if packed else hidden if by_frame else None)
    y = dropped(self.dropout, after_gate(pointwise(first, n), *layers, **by, by_frame=True))
    return x + (y if hidden is None else y.masked_fill(hidden.unsqueeze(-1), 0.0))


def firered_feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves FireRedASR's Conformer, whose LayerNorm comes first: x (..., width) -> same shape."""
    layers = in_sequential(self.net, 6)
    if layers is None:
        _left.note(self, "net is not a plain Sequential of 6 modules")
        return type(self).forward(self, x)
    return in_sequence(layers[1:], layers[0](x), residual=x)
