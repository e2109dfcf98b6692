# SPDX-License-Identifier: Apache-2.0
"""Packs a streaming Zipformer and its front end for the native step: sizes, matrices and small tables.

``cpu::ChunkPlan`` (csrc/cpu/streaming/zipformer_chunk_plan.cpp) defines the order. This module computes once what is
the same for every chunk: the projected positions, the scale of the convolutions within a chunk, the softmax of the
downsampling and exp(log_scale) of the norms.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastasr.models.zipformer.packing import EncoderSizes, Packed, ZipformerSizes, pack_layer
from fastasr.ops import _weight_formats
from fastasr.ops._weight_formats import FORMATS

CONVOLUTIONS = [((3, 3), (1, 1), (0, 1)), ((3, 3), (2, 2), (0, 0)), ((3, 3), (1, 2), (0, 0))]
OUTPUT_DOWNSAMPLING = 2


@torch.no_grad()
def pack(
    model: Any, chunk_size: int, left_context_frames: int, weights: str = "fp32"
) -> tuple[EncoderSizes, list[ZipformerSizes], Packed]:
    """Packs ``model.encoder_embed`` and ``model.encoder``, causal and in eval mode, for chunks of one size. Returns the
    encoder's sizes, those of its stacks, and what is packed.

    Raises ValueError for arguments that do not fit the model, NotImplementedError for a model that the native step does
    not support.
    """
    encoder, embed = model.encoder, model.encoder_embed
    _check_model(encoder, embed)
    _check_frames(encoder, chunk_size, left_context_frames)
    if weights not in FORMATS:
        raise ValueError(f"NativeBackend: weights must be one of {', '.join(FORMATS)}, got {weights!r}")
    _weight_formats.check("NativeBackend", weights, matrices(encoder))
    convolutions = _convolutions(embed)
    expand = embed.convnext.pointwise_conv1
    width = embed.out.in_features // convolutions[-1].out_channels
    most_bins = 4 * width + 6  # the most bins that give maps of this width
    first, second, third = (conv.out_channels for conv in convolutions)
    maps = first, second, third
    sizes = EncoderSizes(
        chunk_size, left_context_frames, most_bins, *maps, expand.out_channels, FORMATS[weights]
    )
    packed = Packed()
    _pack_front_end(packed, embed, width, most_bins)
    stacks = [_pack_stack(packed, stack, sizes) for stack in encoder.encoders]
    packed.table(encoder.downsample_output.bias.softmax(0))
    return sizes, stacks, packed


def matrices(encoder: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields names and parameters of the matrices that are stored in fewer bits: all of the encoder's layers but the
    projection of positions, which packing applies beforehand.
    """
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 2 and not name.endswith("linear_pos.weight"):
            yield name, parameter.detach()


def _check_model(encoder: Any, embed: Any) -> None:
    if encoder.training or embed.training:
        raise ValueError("NativeBackend: the model is in training mode; call eval() first")
    if not encoder.causal:
        raise ValueError("NativeBackend: the encoder is not causal, so it cannot stream")
    for module in (encoder, embed):
        for name, parameter in module.named_parameters():
            if parameter.dtype != torch.float32 or not parameter.is_cpu:
                raise NotImplementedError(
                    f"parameters must be float32 on the CPU, {name} is {parameter.dtype} on {parameter.device}"
                )
    found = [(conv.kernel_size, conv.stride, conv.padding) for conv in _convolutions(embed)]
    if found != CONVOLUTIONS:
        raise NotImplementedError(f"the front end's convolutions must be {CONVOLUTIONS}, got {found}")
    taps = tuple(embed.convnext.depthwise_conv.kernel_size)
    if taps != (7, 7):
        raise NotImplementedError(f"ConvNeXt's convolution must have 7 x 7 taps, got {taps}")
    if encoder.downsample_output.downsample != OUTPUT_DOWNSAMPLING:
        raise NotImplementedError(
            f"the output must be downsampled by 2, got {encoder.downsample_output.downsample}"
        )


def _check_frames(encoder: Any, chunk_size: int, left_context_frames: int) -> None:
    factors = [_factor(stack) for stack in encoder.encoders]
    for name, frames, least, divisors in (
        ("chunk_size", chunk_size, OUTPUT_DOWNSAMPLING, [OUTPUT_DOWNSAMPLING, *factors]),
        ("left_context_frames", left_context_frames, 0, factors),
    ):
        if not isinstance(frames, int) or frames < least or any(frames % divisor for divisor in divisors):
            raise ValueError(
                f"NativeBackend: {name} must be an int of {least} or more that each of "
                f"{sorted(set(divisors))} divides, got {frames!r}"
            )


def _pack_front_end(packed: Packed, embed: Any, width: int, most_bins: int) -> None:
    first, second, third = _convolutions(embed)
    packed.table(_taps_first(first.weight).flatten(0, 1).repeat(1, most_bins))  # [9, bins * maps]
    packed.table(first.bias.repeat(most_bins))
    for conv in (second, third):
        packed.product(conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)  # as patches lie in memory
    depthwise = embed.convnext.depthwise_conv
    packed.table(depthwise.weight)
    packed.table(depthwise.bias)
    packed.linears(embed.convnext.pointwise_conv1, embed.convnext.pointwise_conv2)
    out = embed.out
    by_bin = out.weight.unflatten(1, (-1, width)).transpose(1, 2)  # [channels, width, maps]
    packed.product(by_bin.flatten(1), out.bias)
    packed.table(embed.out_norm.bias)
    packed.table(embed.out_norm.log_scale.exp())


def _pack_stack(packed: Packed, stack: Any, sizes: EncoderSizes) -> ZipformerSizes:
    """Packs a stack and returns its sizes."""
    factor = _factor(stack)
    encoder = stack if factor == 1 else stack.encoder
    frames, left = sizes.chunk // factor, sizes.left // factor
    if factor > 1:
        packed.table(stack.downsample.bias.softmax(0))
        packed.table(stack.out_combiner.bypass_scale)
    own = ZipformerSizes.of(encoder.layers[0], factor, len(encoder.layers))
    x = packed.weights[0].new_zeros(frames, 1, own.dim)
    positions = encoder.encoder_pos(x, left)[0]  # [left + 2 frames - 1, D]
    for layer in encoder.layers:
        pack_layer(packed, layer, positions, frames)
    return own


def _convolutions(embed: Any) -> list[Any]:
    return [module for module in embed.conv if isinstance(module, torch.nn.Conv2d)]


def _factor(stack: Any) -> int:
    return stack.downsample.downsample if hasattr(stack, "downsample") else 1


def _taps_first(weight: Tensor) -> Tensor:
    """(channels, 1, height, width) -> (height, width, channels)"""
    return weight[:, 0].permute(1, 2, 0)
