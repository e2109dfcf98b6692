# SPDX-License-Identifier: Apache-2.0
"""The encoder without padding: its blocks run on the frames that exist, packed as ``models.common.ragged`` describes.

The blocks get a ``Packing`` where the padded encoder gives them a mask; our attention and convolution module read it.
A recording's output is the same as if it were alone, and 0 behind its end. In training BatchNorm's statistics are over
the frames that exist, and each dropout draws numbers for these frames alone.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.common import attention_dropout, plumbing, ragged
from fastasr.models.common.plain import is_watched, runs
from fastasr.models.common.ragged import Packing
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import STANDARD, FastConformerAttention
from fastasr.models.fast_conformer.block import through_blocks
from fastasr.models.fast_conformer.convolution import FastConformerConvolution
from fastasr.models.fast_conformer.subsampling import (
    FastConformerSubsampling,
    are_plain,
    in_a_row,
    subsampled,
)
from fastasr.packed_frames import PackedFrames

if TYPE_CHECKING:
    from fastasr.models.fast_conformer.encoder import FastConformerEncoder


def why_not(encoder: "FastConformerEncoder") -> str | None:
    """Returns why this encoder cannot leave padding out, or None."""
    for i, layer in enumerate(encoder.layers):
        if not runs(layer.self_attn, FastConformerAttention.forward):
            return f"the attention of layer {i} is not swapped"
        if not runs(layer.conv, FastConformerConvolution.forward):
            return f"the convolution module of layer {i} is not swapped"
        if plumbing.conv_delay(layer.conv.depthwise_conv) is None:
            return f"the convolution of layer {i} is not torch's depthwise convolution"
    return None


def lengths(
    encoder: "FastConformerEncoder", features: Tensor, mask: Tensor | None, reason: str | None = None
) -> list[int] | None:
    """Does as ``common.ragged.lengths`` for a mask (B, T₀), True or 1 at valid frames, or None. The padding stays for
    ``reason``, if given."""
    if mask is None or mask.shape != features.shape[:2]:
        return None
    return ragged.lengths(
        encoder, mask.to(torch.bool), lambda: reason or obstacle_of_call(encoder) or why_not(encoder)
    )


def of_packed(
    encoder: "FastConformerEncoder",
    given: PackedFrames,
    mask: Tensor | None,
    encode: Callable[[Tensor, Tensor], Tensor],
    reason: str | None = None,
) -> PackedFrames:
    """Does as ``common.ragged.of_packed`` for an ``encode`` that takes a mask (B, T₀). The call may have no ``mask``
    beside its PackedFrames."""

    def through_batch(batch: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        frame = torch.arange(batch.shape[1], device=batch.device, dtype=torch.int64)
        hidden = encode(batch, frame < lengths[:, None])
        return hidden, subsampled(encoder.subsampling.layers, lengths)

    return ragged.of_packed(given, through_batch, reason or (None if mask is None else "a mask too"))


def obstacle_of_call(encoder: "FastConformerEncoder") -> str | None:
    """Returns why a call cannot leave padding out now, or None."""
    implementation = masks.implementation(getattr(encoder, "config", None))
    if implementation not in STANDARD:
        return f"its attention implementation is {implementation}"
    if encoder.training and encoder.dropout_positions > 0.0:
        return "the dropout of positions draws other numbers for each recording"
    if encoder.training and any(
        attention_dropout.forms_weights(layer.self_attn.attention_dropout) for layer in encoder.layers
    ):
        return "the dropout of attention weights is drawn as upstream draws it"
    return None


def encoded(encoder: "FastConformerEncoder", features: Tensor, lengths: list[int]) -> Tensor:
    """Features (B, T₀, mel_bins), the recordings' frames as a list -> (B, ⌈T₀ / factor⌉, width), 0 behind each end."""
    layers = encoder.subsampling.layers
    packing = Packing(subsampled(layers, lengths), features.device)
    recordings = [one[:length] for one, length in zip(features, lengths, strict=True)]
    ours = runs(encoder.subsampling, FastConformerSubsampling.forward)
    if ours and are_plain(layers) and not is_watched(encoder.subsampling):
        x = in_a_row(encoder.subsampling, recordings)
    else:
        x = torch.cat([encoder.subsampling(one[None])[0] for one in recordings if len(one)])
    x = (x * encoder.input_scale).unsqueeze(0)  # [1, N, width]
    positions = encoder.encode_positions(x[:, : max(packing.lengths)])
    x = F.dropout(x, encoder.dropout, encoder.training)
    x = through_blocks(encoder, x, packing, positions)
    return packing.batch(x[0], subsampled(layers, features.shape[1]))
