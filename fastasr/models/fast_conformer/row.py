# SPDX-License-Identifier: Apache-2.0
"""The encoder on a row of fixed length, as ``models.common.row`` describes: one recorded call serves every batch.

A recording's output is the same as if it were alone. In training BatchNorm's statistics are over the frames that exist,
and each dropout draws numbers for all frames of the row.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.common import plumbing
from fastasr.models.common.plain import is_watched, runs
from fastasr.models.common.row import Capacity, RowCall, Spans, all_frames, why_beyond
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

MULTIPLE = 16  # Rows have a multiple of so many frames, as tensor cores like them.


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
        if mask is not None or features.frames.dim() != 2:
            return "it has a mask beside its PackedFrames, or these have another shape"
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
    """Returns the call on a row of features (B, T₀, mel_bins) of these lengths (B,), or of PackedFrames (N₀, mel_bins),
    for a front end of ``layers`` and blocks with these convolutions over time, or what of them is too large."""
    reason = why_beyond(capacity, features, lengths)
    if reason is not None:
        return reason
    if isinstance(features, PackedFrames):
        features = features.to(features.frames.device, non_blocking=True)  # the lengths may be on the CPU
        lengths = features.lengths
    batch = len(lengths)
    recordings, factor, between = capacity.recordings or 0, frames_per_output(layers), _between(convs)
    most = -(-(capacity.frames or 0) // factor) + recordings  # frames that exist
    rows = -(-(most + recordings * between) // MULTIPLE) * MULTIPLE
    out_lengths = subsampled(layers, lengths)
    after = Spans.laid_out(out_lengths, out_lengths + between, recordings)
    begins = after.begins * factor
    before = Spans(begins, begins + F.pad(lengths, (0, recordings - batch)))

    def unpack(hidden: Tensor) -> Any:
        if isinstance(features, PackedFrames):
            return finish(after.without_gaps(hidden, batch, most))
        return finish(after.unpacked(hidden, batch, subsampled(layers, features.shape[1])))

    arguments = before.packed(features, rows * factor), *before, capacity.longest
    return RowCall(arguments, lengths.sum(), unpack)


def encoded(
    encoder: "FastConformerEncoder", features: Tensor, begins: Tensor, ends: Tensor, longest: int
) -> Tensor:
    """Features (1, N₀, mel_bins) of recordings, which lie at [begins, ends), both (R,), and have at most ``longest``
    frames -> hidden states (1, N, width)."""
    front = encoder.subsampling
    layers, spans = front.layers, Spans(begins, ends)
    x = plumbing.linear(front.linear, convolved(layers, features, spans)) * encoder.input_scale
    row = subsampled(layers, spans).row(x.shape[1])
    positions = encoder.encode_positions(x[:, : subsampled(layers, longest)])
    x = F.dropout(x, encoder.dropout, encoder.training)
    return through_blocks(encoder, x, row, positions)


def _between(convs: Sequence[Any]) -> int:
    """Returns how many frames of nobody must lie between recordings: those that a convolution sees on one side."""
    return max([1, *(conv.weight.shape[-1] // 2 + abs(plumbing.conv_delay(conv) or 0) for conv in convs)])
