# SPDX-License-Identifier: Apache-2.0
"""The encoder, front end, positions and blocks, and the same with a CTC head."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.fast_conformer import ragged
from fastasr.models.fast_conformer.block import FastConformerBlock, through_blocks
from fastasr.models.fast_conformer.positions import FastConformerPositions
from fastasr.models.fast_conformer.subsampling import FastConformerSubsampling, subsampled
from fastasr.packed_frames import PackedFrames


class FastConformerEncoder(torch.nn.Module):
    """Loads the state dicts of transformers' ``ParakeetEncoder``.

    Args:
        mel_bins: features of a frame, a multiple of ``factor``.
        width, layers, heads, hidden: the model's width, its blocks, their heads, the width within feed-forward blocks.
        taps: the taps of the convolutions over time, odd.
        channels, factor: the front end's channels and reduction; the factor is a power of 2.
        bias, conv_bias: whether projections and feed-forward blocks, and convolutions, have biases.
        dropout, activation_dropout, attention_dropout, position_dropout, layer_drop: rates in training.
        scale_input: whether the front end's output is multiplied by √width.

    With ``encoder.ragged = True`` it computes nothing for padding, see ``ragged``.
    """

    ragged = False
    layers: Any  # a ModuleList of FastConformerBlock

    def __init__(
        self,
        mel_bins: int = 80,
        width: int = 1024,
        layers: int = 24,
        heads: int = 8,
        hidden: int = 4096,
        taps: int = 9,
        channels: int = 256,
        factor: int = 8,
        bias: bool = True,
        conv_bias: bool = True,
        dropout: float = 0.1,
        activation_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        position_dropout: float = 0.0,
        layer_drop: float = 0.1,
        scale_input: bool = True,
    ) -> None:
        super().__init__()
        self.dropout, self.dropout_positions, self.layerdrop = dropout, position_dropout, layer_drop
        self.input_scale = math.sqrt(width) if scale_input else 1.0
        self.subsampling = FastConformerSubsampling(mel_bins, width, channels, factor)
        self.encode_positions = FastConformerPositions(width)
        self.layers = torch.nn.ModuleList(
            FastConformerBlock(
                width, heads, hidden, taps, bias, conv_bias, attention_dropout, activation_dropout
            )
            for _ in range(layers)
        )

    @classmethod
    def from_config(cls, config: Any) -> "FastConformerEncoder":
        """Returns an encoder of the sizes and rates of a transformers ``ParakeetEncoderConfig``."""
        return cls(
            mel_bins=config.num_mel_bins,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            hidden=config.intermediate_size,
            taps=config.conv_kernel_size,
            channels=config.subsampling_conv_channels,
            factor=config.subsampling_factor,
            bias=config.attention_bias,
            conv_bias=config.convolution_bias,
            dropout=config.dropout,
            activation_dropout=config.activation_dropout,
            attention_dropout=config.attention_dropout,
            position_dropout=config.dropout_positions,
            layer_drop=config.layerdrop,
            scale_input=config.scale_input,
        )

    def forward(
        self, input_features: Tensor | PackedFrames, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Features (B, T₀, mel_bins), mask (B, T₀), 1 at valid frames, or None -> ((B, T, width), mask (B, T) or None).

        T = ⌈T₀ / factor⌉. Output at padding frames is 0 only with ``ragged``; on a GPU it is not upstream's. With
        ``ragged`` it also takes PackedFrames (N₀, mel_bins) without a mask, and returns PackedFrames (N, width).
        """
        if isinstance(input_features, PackedFrames):
            reason = None if self.ragged else "encoder.ragged is False"

            def encode(batch: Tensor, mask: Tensor) -> Tensor:
                return FastConformerEncoder.forward(self, batch, mask)[0]

            return ragged.of_packed(self, input_features, attention_mask, encode, reason)
        lengths = ragged.lengths(self, input_features, attention_mask) if self.ragged else None
        if lengths is not None and attention_mask is not None:
            x = ragged.encoded(self, input_features, lengths)
            return x, masked(self, attention_mask, x)
        return padded(self, input_features, attention_mask)


def padded(
    encoder: FastConformerEncoder, features: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Does what the encoder does with padding. ``encoder`` may be transformers', with our modules in its blocks."""
    x = encoder.subsampling(features, attention_mask) * encoder.input_scale
    positions = encoder.encode_positions(x)
    x = F.dropout(x, encoder.dropout, encoder.training)
    positions = F.dropout(positions, encoder.dropout_positions, encoder.training)
    mask = masked(encoder, attention_mask, x)
    return through_blocks(encoder, x, mask, positions), mask


def masked(encoder: FastConformerEncoder, attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Returns (B, T), True at valid frames of x (B, T, width), for the features' mask (B, T₀), or None for None."""
    if attention_mask is None:
        return None
    lengths = subsampled(encoder.subsampling.layers, attention_mask.sum(-1))
    return torch.arange(x.shape[1], device=x.device, dtype=torch.int64) < lengths.unsqueeze(1)


class FastConformerCTC(torch.nn.Module):
    """An encoder and a convolution of one tap. Loads the state dicts of transformers' ``ParakeetForCTC``."""

    def __init__(self, encoder: FastConformerEncoder, vocabulary: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.ctc_head = torch.nn.Conv1d(encoder.subsampling.linear.out_features, vocabulary, 1)

    def forward(
        self, input_features: Tensor | PackedFrames, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (log-probabilities (B, T, vocabulary), mask (B, T) or None), or PackedFrames (N, vocabulary) for
        PackedFrames."""
        x, mask = found = self.encoder(input_features, attention_mask)
        logits = F.linear(x, self.ctc_head.weight[..., 0], self.ctc_head.bias).log_softmax(-1)
        return found._replace(frames=logits) if isinstance(found, PackedFrames) else (logits, mask)
