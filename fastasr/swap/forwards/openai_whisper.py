# SPDX-License-Identifier: Apache-2.0
"""Modules of the package openai-whisper, whose linear layers cast their weights to the dtype of the input."""

from typing import Any

from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import activations
from fastasr.models.common.plain import any_watched, is_watched, weight_and_bias
from fastasr.models.fast_conformer.masks import OTHER
from fastasr.swap.forwards.beams import queries, rows
from fastasr.swap.forwards.common import in_sequential, is_part
from fastasr.swap.rule import Upstream


def linear(self: Upstream, x: Tensor) -> Tensor:
    """Serves the linear layer: x (..., in_features) -> (..., out_features)."""
    return ops.linear(x, *_parameters(self, x))


def _parameters(layer: Upstream, x: Tensor) -> tuple[Tensor, Tensor | None]:
    weight, bias = weight_and_bias(layer)
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def block(
    self: Upstream,
    x: Tensor,
    xa: Tensor | None = None,
    mask: Tensor | None = None,
    kv_cache: dict[Any, Tensor] | None = None,
) -> Tensor:
    """Serves a layer of the encoder, x (B, T, width) -> same shape, and one of the decoder, which gets the encoder's
    frames (B, K, width) too; n beams share those of one recording, x (n, T, width) and frames (1, K, width)."""
    if self.cross_attn is not None:
        x = x + self.attn(self.attn_ln(x), mask=mask, kv_cache=kv_cache)[0]
        x = x + _attention_to_frames(self.cross_attn, self.cross_attn_ln(x), xa, kv_cache)
    elif mask is not None or kv_cache is not None:
        _left.note(self, OTHER)
        return type(self).forward(self, x, xa, mask, kv_cache)
    else:
        x = x + _attention(self, self.attn_ln(x))
    return x + _mlp(self, self.mlp_ln(x))


def decoder(self: Upstream, x: Tensor, xa: Tensor, kv_cache: dict[Any, Tensor] | None = None) -> Tensor:
    """Serves the decoder: tokens (B, T), the encoder's frames and upstream's cache -> logits (B, T, vocabulary) in
    float32. The product with the embeddings is most of a token's work in a small model."""
    first = next(iter(kv_cache.values())).shape[1] if kv_cache else 0
    y = self.token_embedding(x) + self.positional_embedding[first : first + x.shape[-1]]
    y = y.to(xa.dtype)
    for layer in self.blocks:
        y = layer(y, xa, mask=self.mask, kv_cache=kv_cache)
    y = self.ln(y)
    return ops.linear(y, self.token_embedding.weight.to(y.dtype)).float()


def _attention_to_frames(attention: Upstream, x: Tensor, frames: Any, cache: Any) -> Tensor:
    shared = frames is not None and len(frames) == 1 and not _is_watched(attention)
    beams = len(x) if shared else 1
    y: Tensor = attention(x if beams == 1 else queries(x, beams), frames, kv_cache=cache)[0]
    return y if beams == 1 else rows(y, beams)


def _is_watched(attention: Upstream) -> bool:
    """Says whether a hook would see the rows of beams. Upstream's cache watches the products of the frames."""
    parts = (part for name, part in attention.named_children() if name not in ("key", "value"))
    return is_watched(attention) or any_watched(parts)


def _attention(self: Upstream, x: Tensor) -> Tensor:
    attn = self.attn
    if not _is_named("MultiHeadAttention", attn, self):
        return attn(x)[0]
    q, k, v = (layer(x).unflatten(-1, (attn.n_head, -1)) for layer in (attn.query, attn.key, attn.value))
    return attn.out(ops.rel_attention(q, k, v).flatten(2))


def _mlp(self: Upstream, x: Tensor) -> Tensor:
    layers = in_sequential(self.mlp, 3)
    name = None if layers is None else activations.fused_name(layers[1], identity=False)
    if layers is None or name is None or not _is_named("Linear", layers[0], self):
        return self.mlp(x)
    return layers[2](ops.linear_activation(x, *_parameters(layers[0], x), name))


def _is_named(name: str, part: Upstream, owner: Upstream) -> bool:
    return type(part).__name__ == name and is_part(part, owner)
