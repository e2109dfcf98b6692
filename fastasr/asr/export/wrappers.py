# SPDX-License-Identifier: Apache-2.0
"""Wraps a recogniser into the modules that runtimes load: encoder, decoder, joiner and CTC, for utterances and chunks.

Names, inputs and outputs are upstream's, and the submodules may be upstream's too. ``fastasr.asr.export`` writes them
as ONNX. While an exporter runs, our own encoder is computed by its plain definition.
"""

from typing import Any

import torch
from torch import Tensor

from fastasr.asr.export import plain
from fastasr.models.common.sequences import make_pad_mask

# features of a chunk beyond 2 chunk_size: the convolutions' 7, 3 frames of future at half the rate
PAD_LENGTH = 7 + 2 * 3


def width(bins: int) -> int:
    """Returns the channels that a Zipformer's front end leaves of a feature's."""
    return ((bins - 1) // 2 - 1) // 2


def bins_of(embed: Any) -> int:
    """Returns the channels of the features from the front end's width. Of the four numbers that fit a width, it is the
    multiple of eight, as 40, 80 and 128 are, or the smallest if none is.
    """
    first = 4 * embed.out_width + 3
    return next((bins for bins in range(first, first + 4) if bins % 8 == 0), first)


def _encode(wrapper: Any, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
    if wrapper.encoder.causal and plain.is_exporting():
        raise ValueError(f"{type(wrapper).__name__}: a causal encoder is exported for streaming")
    if _is_plain(wrapper):
        return plain.encode(wrapper.encoder_embed, wrapper.encoder, x, x_lens)
    x, x_lens = wrapper.encoder_embed(x, x_lens)
    mask = make_pad_mask(x_lens, x.shape[1])
    y, y_lens = wrapper.encoder(x.transpose(0, 1), x_lens, mask)
    return y.transpose(0, 1), y_lens


def _linear(layer: Any, x: Tensor) -> Tensor:
    return plain.linear(layer, x) if plain.is_exporting() else layer(x)


def _is_plain(wrapper: Any) -> bool:
    if not (plain.is_exporting() and plain.serves(wrapper.encoder_embed, wrapper.encoder)):
        return False
    if wrapper.encoder.training:
        raise ValueError(f"{type(wrapper).__name__}: export takes a model in eval mode")
    return True


class EncoderWrapper(torch.nn.Module):
    """features (batch, time, channels), feature_lengths -> encoder_out (batch, frames, channels), lengths."""

    def __init__(self, encoder: Any, encoder_embed: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder_embed = encoder_embed

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        return _encode(self, features, feature_lengths)


class OnnxEncoderWrapper(EncoderWrapper):
    """An EncoderWrapper whose output is projected for the joiner."""

    def __init__(self, encoder: Any, encoder_embed: Any, encoder_proj: Any) -> None:
        super().__init__(encoder, encoder_embed)
        self.encoder_proj = encoder_proj

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        y, y_lens = _encode(self, x, x_lens)
        return _linear(self.encoder_proj, y), y_lens


class OnnxCtcWrapper(EncoderWrapper):
    """x (batch, time, channels), x_lens -> CTC's log_probs (batch, frames, vocabulary), lengths."""

    def __init__(self, encoder: Any, encoder_embed: Any, ctc_output: Any) -> None:
        super().__init__(encoder, encoder_embed)
        self.ctc_output = ctc_output

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        y, y_lens = _encode(self, x, x_lens)
        return self.ctc_output(y), y_lens


class OnnxDecoderWrapper(torch.nn.Module):
    """y (batch, context_size) -> (batch, joiner_dim)."""

    def __init__(self, decoder: Any, decoder_proj: Any) -> None:
        super().__init__()
        self.decoder = decoder
        self.decoder_proj = decoder_proj

    def forward(self, y: Tensor) -> Tensor:
        return _linear(self.decoder_proj, self.decoder(y, need_pad=False).squeeze(1))


class OnnxJoinerWrapper(torch.nn.Module):
    """encoder_out, decoder_out (batch, joiner_dim), projected -> logits (batch, vocabulary)."""

    def __init__(self, output_linear: Any) -> None:
        super().__init__()
        self.output_linear = output_linear

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class _Streaming(torch.nn.Module):
    """The base of the streaming wrappers. The states are six tensors per layer, the front end's left padding, and the
    number of processed frames of each sequence.
    """

    processed_dtype = torch.int64

    def __init__(self, encoder: Any, encoder_embed: Any) -> None:
        super().__init__()
        if len(encoder.chunk_size) != 1 or len(encoder.left_context_frames) != 1:
            raise ValueError(
                f"{type(self).__name__}: streaming needs one chunk_size and one left_context_frames, got "
                f"{encoder.chunk_size} and {encoder.left_context_frames}"
            )
        if encoder.chunk_size[0] < 1 or encoder.left_context_frames[0] < 0:
            raise ValueError(
                f"{type(self).__name__}: needs a chunk_size above 0, left_context_frames of 0 or more, got "
                f"{encoder.chunk_size[0]} and {encoder.left_context_frames[0]}"
            )
        self.encoder = encoder
        self.encoder_embed = encoder_embed
        self.chunk_size = encoder.chunk_size[0]
        self.left_context_len = encoder.left_context_frames[0]
        self.pad_length = PAD_LENGTH

    def get_init_states(
        self,
        batch_size: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    ) -> list[Tensor]:
        """Returns the states before the first chunk."""
        return [
            *self.encoder.get_init_states(batch_size, device),
            self.encoder_embed.get_init_states(batch_size, device),
            torch.zeros(batch_size, dtype=self.processed_dtype, device=device),
        ]

    def _encode(self, x: Tensor, x_lens: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        processed = states[-1]
        # The mask of the left context's frames, oldest first, that lie before the stream's beginning.
        age = torch.arange(self.left_context_len - 1, -1, -1, device=x.device, dtype=torch.int64)
        unseen = processed.unsqueeze(1) <= age
        if _is_plain(self):
            y, new_states = plain.encode_chunk(self.encoder_embed, self.encoder, x, states, unseen)
            lengths = (x_lens - 7) // 2 - 3
            return y, (lengths + 1) // 2, [*new_states, (processed + lengths).to(processed.dtype)]
        x, x_lens, left_pad = self.encoder_embed.streaming_forward(x, x_lens, states[-2])
        mask = torch.cat([unseen, make_pad_mask(x_lens, x.shape[1])], dim=1)
        y, y_lens, encoder_states = self.encoder.streaming_forward(
            x.transpose(0, 1), x_lens, states[:-2], mask
        )
        new_processed = (processed + x_lens).to(processed.dtype)
        return y.transpose(0, 1), y_lens, [*encoder_states, left_pad, new_processed]


class StreamingEncoderWrapper(_Streaming):
    """A chunk of features (batch, 2 chunk_size + 13, channels), lengths, states -> encoder_out (batch, chunk_size / 2,
    channels), lengths, new states.
    """

    processed_dtype = torch.int32

    def forward(
        self, features: Tensor, feature_lengths: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        return self._encode(features, feature_lengths, states)


class OnnxStreamingEncoderWrapper(_Streaming):
    """A chunk x (batch, 2 chunk_size + 13, channels), states -> encoder_out projected for the joiner, new states."""

    def __init__(self, encoder: Any, encoder_embed: Any, encoder_proj: Any) -> None:
        super().__init__(encoder, encoder_embed)
        self.encoder_proj = encoder_proj

    def forward(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        y, _, states = self._encode(x, _full(x), states)
        return _linear(self.encoder_proj, y), states


class OnnxStreamingCtcWrapper(_Streaming):
    """A chunk x (batch, 2 chunk_size + 13, channels), states -> CTC's log_probs, new states."""

    def __init__(self, encoder: Any, encoder_embed: Any, ctc_output: Any) -> None:
        super().__init__(encoder, encoder_embed)
        self.ctc_output = ctc_output

    def forward(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        y, _, states = self._encode(x, _full(x), states)
        return self.ctc_output(y), states


def _full(x: Tensor) -> Tensor:
    """Returns the lengths (batch,) of sequences without padding."""
    return torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
