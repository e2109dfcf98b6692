# SPDX-License-Identifier: Apache-2.0
"""The parts of a layer that are the same for whole utterances and for segments of a stream."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastasr.models.common import activations, plumbing
from fastasr.models.common.plain import is_plain
from fastasr.ops import residual_norm

if TYPE_CHECKING:
    from fastasr.models.emformer.encoder import Emformer
    from fastasr.models.emformer.layer import EmformerAttention, EmformerLayer

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


def segment_means(module: "EmformerLayer | Emformer", utterance: Tensor) -> Tensor:
    """Returns the means over segments, (n, B, D)."""
    return module.memory_op(utterance.permute(1, 2, 0)).permute(2, 0, 1)


def project(
    attention: "EmformerAttention", h: Tensor, summaries: Tensor | None, mems: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the queries of [h, summaries] and the keys and values of [mems, h]."""
    asking = h if summaries is None else torch.cat([h, summaries])
    asked = h if mems is None else torch.cat([mems, h])
    query = plumbing.linear(attention.emb_to_query, asking)
    both = plumbing.linear(attention.emb_to_key_value, asked)
    key, value = both.chunk(2, dim=2)
    return query, key, value


def seen_frames(lengths: Tensor, frames: int) -> Tensor:
    """Returns how many frames of each sequence can be seen. Upstream counts the padding behind the longest as valid."""
    if lengths.is_floating_point():
        lengths = lengths.ceil()
    return (lengths + (frames - lengths.max())).to(torch.int64)


def finish(layer: "EmformerLayer", mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the part of the layer after the attention: (output for the rows of x, memory from the summaries)."""
    attention, rows = layer.attention, x.shape[0]
    out = plumbing.linear(attention.out_proj, mixed)
    mems = out[rows:]
    mems = torch.tanh(mems) if attention.tanh_on_mem else torch.clamp(mems, min=-10, max=10)
    x = plumbing.dropout(layer.dropout, out[:rows], x)
    h, norm = _fed_forward(layer.pos_ff, x), layer.layer_norm_output
    if not plumbing.is_layer_norm(norm) or h.dtype is not x.dtype:
        return norm(h + x), mems
    return residual_norm(x, h, norm.weight, norm.bias, norm.eps), mems


def _fed_forward(ff: nn.Module, x: Tensor) -> Tensor:
    if not is_plain(ff, nn.Sequential) or len(ff) != 6:
        return ff(x)
    norm, first, activation, middle, last, dropout = ff
    h = activations.dropped(first, activation, middle, norm(x))
    return plumbing.dropout(dropout, plumbing.linear(last, h))
