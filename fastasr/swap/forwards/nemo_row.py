# SPDX-License-Identifier: Apache-2.0
"""NeMo's ConformerEncoder on a row of frames, see ``models.common.row``: its front end, positions and layers are called
as its own forward calls them, with the row in place of the masks."""

from typing import Any

import torch
from torch import Tensor

from fastasr.models.common import attention_dropout, plumbing, ragged
from fastasr.models.common.plain import is_plain_named, is_watched, runs
from fastasr.models.common.row import Capacity, Room, RowCall, Spans, all_frames
from fastasr.models.fast_conformer.convolution import is_batch_norm
from fastasr.models.fast_conformer.row import laid_out
from fastasr.models.fast_conformer.subsampling import are_plain, convolved, subsampled
from fastasr.packed_frames import PackedFrames
from fastasr.swap.forwards import layers
from fastasr.swap.forwards.common import share_of_dropout
from fastasr.swap.forwards.nemo import nemo_subsampling
from fastasr.swap.rule import Upstream, own_forward, unread_code, upstream_forward

# fingerprints of the encoder's forward and the layer's in nemo_toolkit 3.0
_KNOWN = {"ba3b26e462d4c58d7dcd2457"}
_LAYER = {"c584ec63e0520d37c6553196"}


def is_nemos(encoder: Upstream) -> bool:
    return type(encoder).__module__.startswith("nemo.")


def why_not(encoder: Upstream) -> str | None:
    """Returns why this encoder cannot run on a row, or None."""
    front = encoder.pre_encode
    if not runs(front, nemo_subsampling) or is_watched(front) or not are_plain(front.conv):
        return "its front end is not swapped, or has hooks"
    if encoder.self_attention_model != "rel_pos" or any(
        n >= 0 for c in encoder.att_context_size_all for n in c
    ):
        return "its attention has a limited context, or other positions"
    if encoder.reduction_position is not None:
        return "it reduces the rate between its layers"
    if not is_plain_named(encoder.pos_enc, ("RelPositionalEncoding",), encoder):
        return "its positions are not upstream's, or have hooks"
    for i, layer in enumerate(encoder.layers):
        reason = unread_code(f"layers.{i}", layer, own_forward, _LAYER) or layers.why_changed(layer)
        if reason is None and layer.is_adapter_available():
            reason = "it has adapters"
        if (
            reason is None
            and layer.conv.norm_type == "batch_norm"
            and not is_batch_norm(layer.conv.batch_norm)
        ):
            reason = "the norm of its convolution module is not torch's BatchNorm"
        if reason is not None:
            return f"layer {i}: {reason}"
    return unread_code("ConformerEncoder", encoder, own_forward, _KNOWN)


def packed(
    encoder: Upstream,
    capacity: Capacity,
    audio_signal: Tensor | PackedFrames,
    length: Tensor | None = None,
    cache_last_channel: Tensor | None = None,
    cache_last_time: Tensor | None = None,
    cache_last_channel_len: Tensor | None = None,
    bypass_pre_encode: bool = False,
) -> RowCall | str:
    """Returns a call of ``encoded`` for upstream's arguments, features (B, mel_bins, T₀) and lengths (B,), or for
    PackedFrames (N₀, mel_bins); or the reason why there is none, beside those of ``why_not``."""
    if cache_last_channel is not None or bypass_pre_encode:
        return "the call has caches of a stream, or frames that have passed the front end"
    features: Tensor | PackedFrames = audio_signal
    if isinstance(audio_signal, PackedFrames):
        if length is not None:
            return "it has lengths beside its PackedFrames"
        features = audio_signal.of_features()
        given = features.lengths
    elif audio_signal.dim() != 3 or audio_signal.shape[1] != encoder._feat_in:
        return "its features have another shape"
    else:
        features = audio_signal.transpose(1, 2)
        given = all_frames(audio_signal.transpose(1, 2)) if length is None else length.to(torch.int64)
    if encoder.is_access_enabled(getattr(encoder, "model_guid", None)):
        return "outputs of inner layers are asked for"
    if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") is torch.float16:
        return "autocast to float16 is on"
    shares = (share_of_dropout(layer.self_attn) for layer in encoder.layers)
    if any(map(attention_dropout.forms_weights, shares)):
        return "the dropout of attention weights is drawn as upstream draws it, or has hooks"
    conv = encoder.pre_encode.conv
    # upstream takes longer ones for these
    lengths = given.clamp(max=features.shape[1]) if isinstance(features, Tensor) else given
    if encoder.pos_enc.pe.shape[1] < 2 * (capacity.longest or 0) - 1:
        encoder.set_max_audio_length(capacity.longest)

    def finish(hidden: Tensor | PackedFrames) -> tuple[Tensor, Tensor]:
        if isinstance(hidden, PackedFrames):
            return hidden
        return hidden.transpose(1, 2), subsampled(conv, given)

    convs = [layer.conv.depthwise_conv for layer in encoder.layers]
    return laid_out(capacity, features, lengths, conv, convs, finish)


def encoded(encoder: Upstream, features: Tensor, begins: Tensor, ends: Tensor, longest: int) -> Tensor:
    """Features (1, N₀, mel_bins) of recordings, which lie at [begins, ends), both (R,), and have at most ``longest``
    frames -> hidden states (1, N, width)."""
    front, spans = encoder.pre_encode, Spans(begins, ends)
    x = plumbing.linear(front.out, convolved(front.conv, features, spans))
    row = subsampled(front.conv, spans).row(x)
    _, positions = encoder.pos_enc(x=x[:, : subsampled(front.conv, longest)])
    x = encoder.pos_enc.dropout(x * encoder.pos_enc.xscale if encoder.pos_enc.xscale else x)
    for share, layer in zip(encoder.layer_drop_probs, encoder.layers, strict=True):
        before = x
        x = layer(x=x, att_mask=row, pos_emb=positions, pad_mask=row)
        if encoder.training and share > 0.0:
            x = x * 0.0 + before if torch.rand(1) < share else (x - before) / (1.0 - share) + before
    return x if encoder.out_proj is None else encoder.out_proj(x)


def without_padding(
    encoder: Upstream, audio_signal: Tensor | PackedFrames, length: Tensor | None = None, **more: Any
) -> Any:
    """Runs a call that is not replayed: in training on a row that just fits it, because statistics over the batch then
    are those of a replay. It waits for the lengths."""
    if isinstance(audio_signal, PackedFrames):

        def encode(batch: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            hidden, lengths = without_padding(encoder, batch.transpose(1, 2), lengths)
            return hidden.transpose(1, 2), lengths

        given = {"length": length, **more}.items()
        others = [name for name, value in given if value is not None and value is not False]
        return ragged.of_packed(audio_signal, encode, f"{', '.join(others)} too" if others else None)
    if encoder.training and length is not None and audio_signal.dim() == 3:
        batch, _, frames = audio_signal.shape
        used = int(length.sum())
        if 0 < used < batch * frames:
            room = Room(used, batch, frames)
            found = why_not(encoder) or room.run(encoder, packed, encoded, audio_signal, length, **more)
            if not isinstance(found, str):
                return found
    return upstream_forward(encoder, audio_signal=audio_signal, length=length, **more)
