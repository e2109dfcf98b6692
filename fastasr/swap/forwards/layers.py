# SPDX-License-Identifier: Apache-2.0
"""Layers of other packages' Conformers without padding (``accelerate(ragged=True)``): a layer packs the frames that
exist, runs upstream's code on these rows with a ``Packing`` in place of its masks, which our attention and convolution
read, and gives 0 at padding. Packing costs two copies of the frames in a layer; all that runs between the layers, such
as hooks, gets padded batches. On a GPU batches stay padded: every layer would wait for the lengths.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.common import attention_dropout, plumbing, ragged
from fastasr.models.common.plain import is_plain, runs
from fastasr.models.common.ragged import Packing
from fastasr.models.common.row import Row
from fastasr.models.fast_conformer.attention import STANDARD
from fastasr.models.fast_conformer.masks import implementation, read, seen
from fastasr.swap.forwards import fireredasr, nemo, transformers_conformer, whisper
from fastasr.swap.forwards.common import other_scale, share_of_dropout
from fastasr.swap.rule import Upstream, upstream_forward

_ATTENTIONS = (
    fireredasr.firered_attention,
    nemo.gigaam_attention,
    nemo.gigaam_rotary_attention,
    nemo.nemo_attention,
    transformers_conformer.relative_key_attention,
    transformers_conformer.wav2vec2_attention,
    whisper.whisper_attention,
)
_CONVOLUTIONS = (
    fireredasr.firered_convolution,
    nemo.gigaam_convolution,
    nemo.nemo_convolution,
    transformers_conformer.causal_seamless_convolution,
    transformers_conformer.seamless_convolution,
)


def why_not(layer: Upstream) -> str | None:
    """Returns why this layer cannot leave padding out, or None."""
    if not next(layer.parameters()).is_cpu:
        return "its layers leave padding out on a CPU alone"
    return why_changed(layer)


def why_changed(layer: Upstream) -> str | None:
    """Returns which of its parts does not take packed frames, or None."""
    attends, convolves = _parts(layer)
    if not any(runs(attends, forward) for forward in _ATTENTIONS):
        return "its attention is not swapped"
    if (reason := other_scale(attends)) is not None or convolves is None:
        return reason
    if not any(runs(convolves, forward) for forward in _CONVOLUTIONS):
        return "its convolution module is not swapped"
    table = getattr(attends, "distance_embedding", None)
    if table is not None and not is_plain(table, torch.nn.Embedding):
        return "its table of positions is no plain embedding"
    glu: Any = getattr(convolves, "glu", F.glu)  # FireRedASR's is the function.
    products = convolves.pointwise_conv1, convolves.pointwise_conv2
    plain = glu is F.glu or is_plain(glu, torch.nn.GLU)
    if not plain or not all(map(plumbing.is_pointwise_conv1d, products)):
        return "its convolution module holds a changed part"
    conv = convolves.depthwise_conv
    causal = runs(convolves, transformers_conformer.causal_seamless_convolution)
    around = (conv.kernel_size[0] - 1, 0) if causal else (0, 0)
    if plumbing.conv_delay(conv, around=around) is None:
        return "its convolution is not torch's depthwise convolution"
    if getattr(convolves, "norm_type", "batch_norm") not in ("batch_norm", "layer_norm"):
        return f"its convolution has the norm {convolves.norm_type}"
    return None


def gigaam_layer(
    self: Upstream, x: Tensor, pos_emb: Tensor, att_mask: Tensor | None = None, pad_mask: Tensor | None = None
) -> Tensor:
    """Serves GigaAM's layer: x (B, T, width), masks bool (B, T, T) and (B, T), True at padding, or None."""

    def call(x: Tensor, *masks: Packing | Tensor | None) -> Tensor:
        return upstream_forward(self, x, pos_emb, *masks)

    valid = None if pad_mask is None else ~pad_mask
    return _packed(self, call, x, valid, pad_mask, (att_mask, pad_mask))


def firered_layer(
    self: Upstream,
    x: Tensor,
    pos_emb: Tensor,
    slf_attn_mask: Tensor | None = None,
    pad_mask: Tensor | None = None,
) -> Tensor:
    """Serves FireRedASR's block: x (B, T, width), masks (B, 1, T), 1 at valid frames, or None."""

    def call(x: Tensor, *masks: Packing | Tensor | None) -> Tensor:
        return upstream_forward(self, x, pos_emb, *masks)

    valid = pad_mask[:, 0].eq(1) if pad_mask is not None and slf_attn_mask is pad_mask else None
    return _packed(self, call, x, valid, pad_mask, (slf_attn_mask, pad_mask))


def nemo_layer(
    self: Upstream,
    x: Tensor,
    att_mask: Row | Tensor | None = None,
    pos_emb: Tensor | None = None,
    pad_mask: Row | Tensor | None = None,
    cache_last_channel: Tensor | None = None,
    cache_last_time: Tensor | None = None,
) -> Any:
    """Serves NeMo's layer: x (B, T, width), masks bool (B, T, T) and (B, T), True at hidden frames, or None. A limited
    context, a stream's cache and adapters run on padding. A ``Row`` in place of the masks stays."""

    def call(
        x: Tensor, attends: Packing | Row | Tensor | None, convolves: Packing | Row | Tensor | None
    ) -> Any:
        return upstream_forward(self, x, attends, pos_emb, convolves, cache_last_channel, cache_last_time)

    if isinstance(att_mask, Row) or isinstance(pad_mask, Row):
        return call(x, att_mask, pad_mask)
    plain = cache_last_channel is None and not self.is_adapter_available()
    if plain and att_mask is not None and pad_mask is not None and seen(att_mask, hides=True).by_length:
        valid = ~pad_mask
    else:
        valid = None
    return _packed(self, call, x, valid, pad_mask, (att_mask, pad_mask))


def seamless_layer(
    self: Upstream,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    relative_position_embeddings: Tensor | None = None,
    conv_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Serves the layers of SeamlessM4T, v2 and w2v-BERT 2.0: hidden states (B, T, width), masks (B, 1, T, T) and (B,
    T), True or 1 at valid frames, or None. Recordings longer than a chunk of v2 run on padding."""

    def call(x: Tensor, attends: Packing | Tensor | None, convolves: Packing | Tensor | None) -> Tensor:
        named = {"attention_mask": attends, "conv_attention_mask": convolves} | kwargs
        if relative_position_embeddings is not None:  # v2 has no such argument
            named["relative_position_embeddings"] = relative_position_embeddings
        return upstream_forward(self, x, **named)

    config, mask = self.self_attn.config, conv_attention_mask
    chunk = getattr(config, "speech_encoder_chunk_size", None)
    fits = chunk is None or hidden_states.shape[1] <= chunk
    fits = fits and implementation(config) in STANDARD
    valid = mask.bool() if fits and mask is not None else None
    return _packed(self, call, hidden_states, valid, mask, (attention_mask, mask))


def wav2vec2_layer(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Serves the layers of wav2vec 2.0 and its copies: hidden states (B, T, width), attention mask (B or 1, 1, T, T) as
    its implementation takes it, or None."""

    def call(x: Tensor, attends: Packing | Tensor | None, convolves: Packing | None) -> Tensor:
        return upstream_forward(self, x, attention_mask=attends, **kwargs)

    valid, name = None, implementation(self.attention.config)
    if name in STANDARD:
        pairs = read(attention_mask, name, *hidden_states.shape[:2])
        by = None if pairs is None else seen(pairs)
        if by is not None and by.by_length and by.empty_rows is None:
            valid = ~by.hidden_keys
    return _packed(self, call, hidden_states, valid, attention_mask, (attention_mask, None))


def _packed(
    layer: Upstream,
    call: Callable[..., Any],
    x: Tensor,
    valid: Tensor | None,
    owner: Tensor | None,
    masks: tuple[Tensor | None, ...],
) -> Any:
    """Returns ``call(x, *masks)``, on the frames of x (B, T, width) that are ``valid`` if they can be packed. All
    layers get one ``owner``, the mask with which the packing is kept."""
    packing = None
    if x.is_cpu and valid is not None and valid.shape == x.shape[:2]:
        packing = _packing(layer, valid, owner)
    if packing is None:
        return call(x, *masks)
    slots = [x.shape[1]] * len(x)
    y = call(packing.gathered(x.flatten(0, 1), slots).unsqueeze(0), packing, packing)
    return packing.batch(y[0], x.shape[1])


def _packing(layer: Upstream, valid: Tensor, owner: Any) -> Packing | None:
    lengths = ragged.lengths(layer, valid, lambda: _obstacle(layer))
    if lengths is None:
        return None
    kept = getattr(owner, "_fastasr_packing", None)
    if kept is None or kept.lengths != lengths:
        kept = owner._fastasr_packing = Packing(lengths, valid.device)
    return kept


def _obstacle(layer: Upstream) -> str | None:
    share = share_of_dropout(_parts(layer)[0])
    if attention_dropout.forms_weights(share):
        return "the dropout of attention weights is drawn as upstream draws it, or has hooks"
    return why_not(layer)


def _parts(layer: Upstream) -> tuple[Upstream, Upstream | None]:
    """Returns the layer's attention and its convolution module, which those of wav2vec 2.0 lack."""
    if hasattr(layer, "attention"):
        return layer.attention, None
    found = (getattr(layer, "self_attn", None), getattr(layer, "conv_module", None))
    return found[0] or layer.mhsa, found[1] or layer.conv
