# SPDX-License-Identifier: Apache-2.0
"""The encoder without padding: its layers run on the frames that exist, packed as ``models.common.ragged`` describes.

Every stack has a packing of its own frame rate in use while its layers run; attention, convolution, bypass and dropout
of whole sequences ask for it. A recording's output is the same as if it were alone: at its end the downsampling repeats
its own last frame, where upstream's reads frames of padding. In training balancers and whitening see the frames that
exist.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastasr.models.common import ragged
from fastasr.models.common.plain import any_watched, runs
from fastasr.models.common.ragged import Packing, in_use
from fastasr.models.common.row import RowFrames
from fastasr.models.zipformer.activations import ActivationDropoutAndLinear
from fastasr.models.zipformer.attention import RelPositionMultiheadAttentionWeights
from fastasr.models.zipformer.bypass import BypassModule
from fastasr.models.zipformer.convolution import ConvolutionModule
from fastasr.models.zipformer.layer import ZipformerEncoderLayer
from fastasr.models.zipformer.nonlin_attention import NonlinAttention
from fastasr.models.zipformer.resampling import convert_num_channels
from fastasr.models.zipformer.self_attention import SelfAttention
from fastasr.models.zipformer.stack import alone, check_chunks, scaled
from fastasr.packed_frames import PackedFrames

if TYPE_CHECKING:
    from fastasr.models.zipformer.encoder import Zipformer
    from fastasr.models.zipformer.resampling import SimpleDownsample

# Frames of padding, 20 ms each: with fewer the host takes more time for a training step than a GPU for the padding.
LEAST_ON_GPU = 150_000

_OURS: dict[str, Any] = {  # the classes whose forward each part of a layer must run
    "self_attn_weights": RelPositionMultiheadAttentionWeights,
    "self_attn1": SelfAttention,
    "self_attn2": SelfAttention,
    "nonlin_attention": NonlinAttention,
    "conv_module1": ConvolutionModule,
    "conv_module2": ConvolutionModule,
    "bypass": BypassModule,
    "bypass_mid": BypassModule,
    **{f"feed_forward{i}.out_proj": ActivationDropoutAndLinear for i in (1, 2, 3)},
}
_parts = attrgetter(*_OURS)


def why_not(encoder: "Zipformer") -> str | None:
    """Returns why this encoder cannot leave padding out, or None."""
    for name, module in _not_called(encoder):
        if any_watched([module]):
            return f"{name} has a hook, but packed frames do not call it; FSDP can wrap its layers instead"
    for i, stack in enumerate(encoder.encoders):
        if hasattr(stack, "downsample") and not runs(stack.out_combiner, BypassModule.forward):
            return f"out_combiner of stack {i} is not swapped"
        for j, layer in enumerate(getattr(stack, "encoder", stack).layers):
            where = f"layer {j} of stack {i}"
            if not runs(layer, ZipformerEncoderLayer.forward):
                return f"{where} is not swapped, or is one of icefall before pull request 1566"
            for (name, cls), part in zip(_OURS.items(), _parts(layer), strict=True):
                if not runs(part, cls.forward):
                    return f"{name} of {where} is not swapped"
    return None


def _not_called(encoder: "Zipformer") -> Iterator[tuple[str, torch.nn.Module]]:
    """Yields (name, module) for the modules whose parameters, or those of modules inside, ``encoded`` uses without
    calling them, so that a hook of FSDP would not gather these."""
    yield "downsample_output", encoder.downsample_output
    for i, stack in enumerate(encoder.encoders):
        yield f"encoders.{i}", stack
        if hasattr(stack, "downsample"):
            yield f"encoders.{i}.downsample", stack.downsample
            yield f"encoders.{i}.encoder", stack.encoder


def lengths(encoder: "Zipformer", x: Tensor, mask: Tensor | None) -> list[int] | None:
    """Does as ``common.ragged.lengths`` for x (time, batch, channels) and a mask (batch, time), True at padding, or
    None."""
    if mask is None or mask.shape != (x.shape[1], x.shape[0]):
        return None
    return ragged.lengths(encoder, ~mask.to(torch.bool), lambda: why_not(encoder), LEAST_ON_GPU)


def encoded(encoder: "Zipformer", x: Tensor, lengths: list[int]) -> Tensor:
    """x (time, batch, channels) -> ((time + 1) // 2, batch, channels), 0 behind each recording's end."""
    rows, packing = _encoded(encoder, x, lengths)
    return packing.batch(rows[:, 0], (len(x) + 1) // 2).transpose(0, 1)


def of_packed(
    encoder: "Zipformer", given: PackedFrames, mask: Tensor | None, reason: str | None = None
) -> tuple[PackedFrames, Tensor]:
    """Returns the encoder's output for PackedFrames (N, channels): PackedFrames (N', width), and their lengths. It
    waits for the lengths.

    Raises ValueError for a ``mask``, or a ``reason`` why the encoder cannot leave padding out.
    """
    reason = reason or ("a mask too" if mask is not None else None)
    reason = reason or ragged.why_not_hooked(encoder) or why_not(encoder)
    if reason is not None:
        raise ValueError(ragged.REFUSED.format(reason))
    given = given.of_features().to(given.frames.device)
    lengths = given.lengths.tolist()
    used = given.frames[: sum(lengths)]
    if not len(used):
        empty = used.new_zeros(0, max(encoder.encoder_dim))
        return PackedFrames(empty, given.lengths), given.lengths
    rows, packing = _encoded(encoder, used.unsqueeze(1).expand(-1, len(lengths), -1), lengths, used)
    return PackedFrames(rows[:, 0], packing.sizes), packing.sizes


def _encoded(
    encoder: "Zipformer", x: Tensor, lengths: list[int], rows: Tensor | None = None
) -> tuple[Tensor, Packing]:
    """Returns the output (N', 1, width) of the frames that exist of x (time, batch, channels), or of ``rows`` (N,
    channels), and their packing."""
    feature_masks = encoder.get_feature_masks(x)
    chunk_size, left_context_chunks = encoder.get_chunk_info()
    check_chunks(encoder, chunk_size, left_context_chunks)
    # a chunk as long as the recording, or longer, ends with it
    pads = not encoder.causal or 0 < chunk_size < min(filter(None, lengths))
    packing = Packing(lengths, x.device, pads)
    src = (packing.of_batch(x) if rows is None else rows).unsqueeze(1)
    src = through_stacks(encoder, src, packing, chunk_size, left_context_chunks, feature_masks)
    return src, packing.at_rate(encoder.downsample_output.downsample).slower


def through_stacks(
    encoder: "Zipformer",
    src: Tensor,
    packing: Packing | RowFrames,
    chunk_size: int,
    left_context_chunks: int,
    feature_masks: Sequence[Tensor | float],
) -> Tensor:
    """Packed frames (N, 1, channels) -> (N', 1, width) at the encoder's output rate."""
    outputs = []
    for stack, width, feature_mask in zip(encoder.encoders, encoder.encoder_dim, feature_masks, strict=True):
        src = convert_num_channels(src, width)
        src = _stack(stack, src, packing, chunk_size, left_context_chunks, feature_mask)
        outputs.append(src)
    return _downsampled(encoder.downsample_output, encoder._get_full_dim_output(outputs), packing)


def _stack(
    stack: Any,
    src: Tensor,
    packing: Packing | RowFrames,
    chunk_size: int,
    left_context_chunks: int,
    feature_mask: Tensor | float,
) -> Tensor:
    """Runs a stack on packed frames (N, 1, channels)."""
    window = chunk_size, left_context_chunks, feature_mask
    if not hasattr(stack, "downsample"):
        return _layers(stack, src, packing, *window)
    factor = stack.downsample_factor
    rate = packing.at_rate(factor)
    y = _downsampled(stack.downsample, src, packing)
    y = _layers(stack.encoder, y, rate.slower, chunk_size // factor, *window[1:])
    with in_use(packing):
        return stack.out_combiner(src, rate.upsampled(y))


def _layers(
    stack: Any,
    src: Tensor,
    packing: Packing | RowFrames,
    chunk_size: int,
    left_context_chunks: int,
    feature_mask: Tensor | float,
) -> Tensor:
    if isinstance(feature_mask, Tensor):
        feature_mask = packing.repeated(feature_mask[0]).unsqueeze(1)
    pos_emb = stack.encoder_pos(src[: packing.longest])
    chunks = {"left_context_chunks": left_context_chunks} if chunk_size > 0 else {}
    with in_use(packing):
        src = scaled(src, feature_mask)
        for layer in stack.layers:
            with alone(feature_mask):
                src = layer(src, pos_emb, chunk_size=chunk_size, **chunks)
            src = scaled(src, feature_mask)
    return src


def _downsampled(module: "SimpleDownsample", src: Tensor, packing: Packing | RowFrames) -> Tensor:
    """Does as SimpleDownsample for packed frames: each recording ends with its own last frame, repeated."""
    return packing.at_rate(module.downsample).averaged(src, module.bias.softmax(0))
