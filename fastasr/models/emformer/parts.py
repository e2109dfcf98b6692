# SPDX-License-Identifier: Apache-2.0
"""The parts of a layer that are the same for whole utterances and for segments of a stream."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastasr.models.common import plumbing
from fastasr.models.common.inference import is_unmodified
from fastasr.ops import linear, linear_activation, residual_norm

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
_KERNELS = {module: name for name, module in ACTIVATIONS.items()}


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def segment_means(module: nn.Module, utterance: Tensor) -> Tensor:
    """Returns the means over segments, (n, B, D)."""
    return module.memory_op(utterance.permute(1, 2, 0)).permute(2, 0, 1)


def project(
    attention: nn.Module, h: Tensor, summaries: Tensor | None, mems: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the queries of [h, summaries] and the keys and values of [mems, h]."""
    asking = h if summaries is None else torch.cat([h, summaries])
    asked = h if mems is None else torch.cat([mems, h])
    query = linear(asking, attention.emb_to_query.weight, attention.emb_to_query.bias)
    both = linear(asked, attention.emb_to_key_value.weight, attention.emb_to_key_value.bias)
    return query, *both.chunk(2, dim=2)


def seen_frames(lengths: Tensor, frames: int) -> Tensor:
    """Returns how many frames of each sequence can be seen. Upstream counts the padding behind the longest as valid."""
    if lengths.is_floating_point():
        lengths = lengths.ceil()
    return (lengths + (frames - lengths.max())).to(torch.int64)


def finish(layer: nn.Module, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the part of the layer after the attention: (output for the rows of x, memory from the summaries)."""
    attention, ff, rows = layer.attention, layer.pos_ff, x.shape[0]
    out = linear(mixed, attention.out_proj.weight, attention.out_proj.bias)
    mems = out[rows:]
    mems = torch.tanh(mems) if attention.tanh_on_mem else torch.clamp(mems, min=-10, max=10)
    x = plumbing.dropout(layer.dropout, out[:rows], x)
    h = plumbing.dropout(ff[3], _activated(ff[1], ff[2], layer_norm(ff[0], x)))
    h = plumbing.dropout(ff[5], linear(h, ff[4].weight, ff[4].bias))
    norm = layer.layer_norm_output
    if norm.weight is None or norm.bias is None or h.dtype is not x.dtype:
        return layer_norm(norm, h + x), mems
    return residual_norm(x, h, norm.weight, norm.bias, norm.eps), mems


def _activated(affine: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    name = _KERNELS.get(type(activation))
    plain = name is not None and is_unmodified(activation, _KERNELS) and not plumbing.is_watched(activation)
    if not plain or getattr(activation, "approximate", "none") != "none":
        return activation(linear(x, affine.weight, affine.bias))
    return linear_activation(x, affine.weight, affine.bias, name)
