# SPDX-License-Identifier: Apache-2.0
"""The encoder on a row of fixed length, as ``models.common.row`` describes: one recorded call serves every batch.

A recording's output is the same as if it were alone. In training BatchNorm's statistics are over the frames that exist,
and each dropout draws numbers for all frames of the row.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.common import plumbing
from fastasr.models.common import row as rows
from fastasr.models.common.plain import is_watched, runs
from fastasr.models.common.row import Capacity, RowCall, Spans, all_frames
from fastasr.models.fast_conformer import ragged
from fastasr.models.fast_conformer.block import through_blocks
from fastasr.models.fast_conformer.convolution import is_batch_norm
from fastasr.models.fast_conformer.subsampling import (
    FastConformerSubsampling,
    Layers,
    are_plain,
    convolved,
    frames_per_output,
    subsampled,
)
from fastasr.packed_frames import PackedFrames

if TYPE_CHECKING:
    from fastasr.models.fast_conformer.encoder import FastConformerEncoder


def why_not(encoder: "FastConformerEncoder") -> str | None:
    """Returns why this encoder cannot run on a row, or None."""
    front = encoder.subsampling
    if not runs(front, FastConformerSubsampling.forward) or is_watched(front) or not are_plain(front.layers):
        return "its front end is not swapped, or has hooks"
    for i, layer in enumerate(encoder.layers):
        if not is_batch_norm(layer.conv.norm):
            return f"the norm of the convolution module of layer {i} is not torch's BatchNorm"
    return ragged.why_not(encoder)


def packed(
    encoder: "FastConformerEncoder",
    capacity: Capacity,
    features: Tensor | PackedFrames,
    mask: Tensor | None,
    finish: Callable[[Any], Any],
) -> RowCall | str:
    """Returns a call of ``encoded`` for features (B, T₀, mel_bins) and a mask (B, T₀), 1 at valid frames, or None, or
    for PackedFrames (N₀, mel_bins); or the reason why there is none, beside those of ``why_not``. ``finish`` gets the
    hidden states (B, T, width), 0 behind each recording's end, or PackedFrames (N, width)."""
    if isinstance(features, PackedFrames):
        if mask is not None:
            return "it has a mask beside its PackedFrames"
        features = features.of_features()
        lengths = features.lengths
    elif features.dim() != 3 or (mask is not None and mask.shape != features.shape[:2]):
        return "its mask is not one of lengths"
    else:
        lengths = all_frames(features) if mask is None else mask.sum(-1, dtype=torch.int64)
    reason = ragged.obstacle_of_call(encoder)
    convs = [layer.conv.depthwise_conv for layer in encoder.layers]
    return reason or laid_out(capacity, features, lengths, encoder.subsampling.layers, convs, finish)


def laid_out(
    capacity: Capacity,
    features: Tensor | PackedFrames,
    lengths: Tensor,
    layers: Layers,
    convs: Sequence[Any],
    finish: Callable[[Any], Any],
) -> RowCall | str:
    """Does as ``common.row.laid_out`` for a front end of ``layers`` and blocks with these convolutions over time."""
    front: Any = {"factor": frames_per_output(layers), "subsampled": partial(subsampled, layers)}
    return rows.laid_out(capacity, features, lengths, finish, between=rows.gap(convs), **front)


def encoded(
    encoder: "FastConformerEncoder", features: Tensor, begins: Tensor, ends: Tensor, longest: int
) -> Tensor:
    """Features (1, N₀, mel_bins) of recordings, which lie at [begins, ends), both (R,), and have at most ``longest``
    frames -> hidden states (1, N, width)."""
    front = encoder.subsampling
    layers, spans = front.layers, Spans(begins, ends)
    x = plumbing.linear(front.linear, convolved(layers, features, spans)) * encoder.input_scale
    row = subsampled(layers, spans).row(x)
    positions = encoder.encode_positions(x[:, : subsampled(layers, longest)])
    x = F.dropout(x, encoder.dropout, encoder.training)
    return through_blocks(encoder, x, row, positions)
