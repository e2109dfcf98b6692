# SPDX-License-Identifier: Apache-2.0
"""The encoder on a row of fixed length, as ``models.common.row`` describes: one recorded call serves every batch.

A recording's output is the same as if it were alone. Recordings begin at frames that every rate of the encoder has, so
that downsampling is a sum over neighbours. Convolutions and attention read on the device where recordings begin and
end; the chunks of a causal encoder begin with each recording. Attention computes its weights where it needs them,
because those of all frames of the row would not fit into memory. In training each draw for sequences is made for as
many recordings as the row has room for, and balancers and whitening see the frames that exist.
"""

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastasr.models.common.plain import runs
from fastasr.models.common.row import MULTIPLE, Capacity, RowCall, RowFrames, Spans, all_frames, why_beyond
from fastasr.models.zipformer import ragged
from fastasr.models.zipformer.convolution import ConvolutionModule, fused_weights
from fastasr.models.zipformer.stack import check_chunks
from fastasr.packed_frames import PackedFrames

if TYPE_CHECKING:
    from fastasr.models.zipformer.encoder import Zipformer

RATE = 2  # Frames of features, which Graphs counts, for one of the encoder's.


def why_not(encoder: "Zipformer") -> str | None:
    """Returns why this encoder cannot run on a row, or None."""
    reason = ragged.why_not(encoder)
    if reason is not None:
        return reason
    for name, module in encoder.named_modules():
        if getattr(module, "straight_through_rate", 0) != 0:
            return f"{name} lets sequences straight through"
        convolves = runs(module, ConvolutionModule.forward)
        if convolves and fused_weights(module, module.out_proj.weight.shape[1]) is None:
            return f"{name} has parts that are not upstream's, or have hooks"
    return None


def packed(
    encoder: "Zipformer",
    capacity: Capacity,
    x: Tensor | PackedFrames,
    x_lens: Tensor,
    src_key_padding_mask: Tensor | None = None,
) -> RowCall | str:
    """Returns a call of ``encoded`` for the arguments of ``Zipformer.forward``, or the reason why there is none, beside
    those of ``why_not``."""
    if capacity.parts:
        return "its stacks are not recorded one by one on a row"
    mask = src_key_padding_mask
    if isinstance(x, PackedFrames):
        if mask is not None:
            return "it has a mask beside its PackedFrames"
        x = x.of_features()
        given: Tensor | PackedFrames = x
        lengths = x.lengths
    else:
        given = x.transpose(0, 1)
        if mask is not None and mask.shape != given.shape[:2]:
            return "its mask is not one of lengths"
        lengths = all_frames(given) if mask is None else (~mask.bool()).sum(-1)
    reason = why_beyond(capacity, given, lengths, RATE)
    if reason is not None:
        return reason
    if isinstance(given, PackedFrames):
        given = given.to(given.frames.device, non_blocking=True)  # the lengths may be on the CPU
        lengths = given.lengths
    most, longest = (-(-(n or 0) // RATE) for n in (capacity.frames, capacity.longest))
    _extend_positions(encoder, longest)
    recordings, factor = capacity.recordings or 0, _factor(encoder)
    slots = (lengths + (factor - 1)) // factor * factor
    spans = Spans.laid_out(lengths, slots, recordings)
    rows = most + recordings * (factor - 1)
    rows = -(-rows // (factor * MULTIPLE)) * factor * MULTIPLE
    half = encoder.downsample_output.downsample

    def unpack(y: Tensor) -> tuple[Tensor | PackedFrames, Tensor]:
        after = Spans(spans.begins // half, (spans.ends + (half - 1)) // half)
        y = y.transpose(0, 1)
        if isinstance(given, PackedFrames):
            found = after.without_gaps(y, len(lengths), -(-most // half) + recordings)
            return found, found.lengths
        y = after.unpacked(y, len(lengths), -(-given.shape[1] // half))
        return y.transpose(0, 1), (x_lens + 1) // 2

    row = spans.packed(given, rows).transpose(0, 1)
    return RowCall((row, *spans, longest), lengths.sum() * RATE, unpack)


def encoded(encoder: "Zipformer", x: Tensor, begins: Tensor, ends: Tensor, longest: int) -> Tensor:
    """Frames (N, 1, channels) of recordings, which lie at [begins, ends), both (R,), and have at most ``longest``
    frames -> (N / 2, 1, width)."""
    factors = sorted({*encoder.downsampling_factor, encoder.downsample_output.downsample} - {1})
    row = RowFrames(Spans(begins, ends), len(x), longest, x, tuple(factors))
    feature_masks = encoder.get_feature_masks(x.expand(-1, row.count, -1))
    chunks = encoder.get_chunk_info()
    check_chunks(encoder, *chunks)
    return ragged.through_stacks(encoder, x, row, *chunks, feature_masks)


def _extend_positions(encoder: "Zipformer", longest: int) -> None:
    """Makes the tables of positions long enough, which a recording could not do."""
    for stack, factor in zip(encoder.encoders, encoder.downsampling_factor, strict=True):
        table: Any = getattr(stack, "encoder", stack).encoder_pos
        frames = -(-longest // factor)
        if table.pe.shape[0] < 2 * frames - 1:
            table.extend_pe(table.pe.new_empty(1).expand(frames))


def _factor(encoder: "Zipformer") -> int:
    """Returns the frames of which every rate has a whole number."""
    return math.lcm(*encoder.downsampling_factor, encoder.downsample_output.downsample)
