# SPDX-License-Identifier: Apache-2.0
"""A stack of layers at one frame rate, and a stack at a lower rate between downsampling and upsampling."""

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastasr.models.zipformer.bypass import BypassModule
from fastasr.models.zipformer.decisions import owning
from fastasr.models.zipformer.layer import takes_chunks
from fastasr.models.zipformer.positional_encoding import CompactRelPositionalEncoding
from fastasr.models.zipformer.resampling import SimpleDownsample, SimpleUpsample
from fastasr.models.zipformer.schedules import FloatLike, ScheduledFloat

STATES_PER_LAYER = 6


class ZipformerEncoder(torch.nn.Module):
    """``num_layers`` copies of ``encoder_layer``: src (time, batch, embed_dim) -> same shape.

    feature_mask, a number or a tensor that broadcasts with src, multiplies the input and the output of each layer. The
    layers' skip rates fall from ``initial_layerdrop_rate`` to ``final_layerdrop_rate`` between the batches
    ``warmup_begin`` and ``warmup_end``, one layer after the other. ``dropout`` is accepted and unused.

    attn_mask is passed to the layers. With left_context_chunks (-1: no limit) instead, attention sees a frame's own
    chunk of chunk_size frames and that many chunks before it; our own layers then need no mask.

    Raises ValueError unless 0 <= warmup_begin <= warmup_end.
    """

    layers: Any  # a ModuleList of ZipformerEncoderLayer

    def __init__(
        self,
        encoder_layer: torch.nn.Module,
        num_layers: int,
        pos_dim: int,
        dropout: FloatLike,
        warmup_begin: float,
        warmup_end: float,
        initial_layerdrop_rate: float = 0.5,
        final_layerdrop_rate: float = 0.05,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_begin <= warmup_end:
            raise ValueError(
                f"ZipformerEncoder: expected 0 <= warmup_begin <= warmup_end, got {warmup_begin}, {warmup_end}"
            )
        self.encoder_pos = CompactRelPositionalEncoding(pos_dim, dropout_rate=0.15, length_factor=1.0)
        self.layers = torch.nn.ModuleList(copy.deepcopy(encoder_layer) for _ in range(num_layers))
        self.num_layers = num_layers
        step = (1.0 / num_layers) * (warmup_end - warmup_begin)
        begin = warmup_begin
        for layer in self.layers:
            end = begin + step
            layer.bypass.skip_rate = ScheduledFloat(
                (begin, initial_layerdrop_rate), (end, final_layerdrop_rate), default=0.0
            )
            begin = end

    def forward(
        self,
        src: Tensor,
        chunk_size: int = -1,
        feature_mask: Tensor | float = 1.0,
        attn_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        left_context_chunks: int | None = None,
    ) -> Tensor:
        chunked, mask = left_context_chunks is not None and chunk_size > 0, None
        pos_emb = self.encoder_pos(src)
        src = scaled(src, feature_mask)
        for layer in self.layers:
            window: dict[str, Any] = {"attn_mask": attn_mask}
            if chunked and takes_chunks(layer):
                window["left_context_chunks"] = left_context_chunks
            elif chunked and left_context_chunks is not None and attn_mask is None:
                if mask is None:
                    mask = chunk_mask(src.shape[0], chunk_size, left_context_chunks, src.device)
                window["attn_mask"] = mask
            with alone(feature_mask):
                src = layer(
                    src, pos_emb, chunk_size=chunk_size, src_key_padding_mask=src_key_padding_mask, **window
                )
            src = scaled(src, feature_mask)
        return src

    def streaming_forward(
        self, src: Tensor, states: list[Tensor], left_context_len: int, src_key_padding_mask: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """src, one chunk, states (the six caches of each layer in turn) -> output, states for the next chunk.
        src_key_padding_mask is (batch, left_context_len + time).
        """
        pos_emb = self.encoder_pos(src, left_context_len)
        new_states = []
        for i, layer in enumerate(self.layers):
            caches = states[i * STATES_PER_LAYER : (i + 1) * STATES_PER_LAYER]
            src, *caches = layer.streaming_forward(
                src,
                pos_emb,
                *caches,
                left_context_len=left_context_len,
                src_key_padding_mask=src_key_padding_mask,
            )
            new_states += caches
        return src, new_states


def in_windows(
    stack: Any,
    src: Tensor,
    chunk_size: int,
    left_context_chunks: int,
    feature_mask: Tensor | float,
    src_key_padding_mask: Tensor | None,
) -> Tensor:
    """Runs a stack of upstream's, whose own forward knows masks alone, if each of its layers takes
    left_context_chunks."""
    call: Any = {"left_context_chunks": left_context_chunks, "src_key_padding_mask": src_key_padding_mask}
    if hasattr(stack, "downsample"):
        chunk_size //= stack.downsample_factor
        y = in_windows(stack.encoder, stack.downsample(src), chunk_size, feature_mask=feature_mask, **call)
        return stack.out_combiner(src, stack.upsample(y)[: src.shape[0]])
    pos_emb = stack.encoder_pos(src)
    src = scaled(src, feature_mask)
    for layer in stack.layers:
        src = scaled(layer(src, pos_emb, chunk_size=chunk_size, **call), feature_mask)
    return src


def check_chunks(encoder: Any, chunk_size: int, left_context_chunks: int) -> None:
    """Raises ValueError if the chunks do not fit the stacks of ``encoder``."""
    if chunk_size <= 0:
        return
    for factor, kernel in zip(encoder.downsampling_factor, encoder.cnn_module_kernel, strict=True):
        if chunk_size % factor != 0:
            raise ValueError(
                f"Zipformer: chunk_size must be divisible by downsampling_factor {encoder.downsampling_factor}, "
                f"got {chunk_size}"
            )
        if left_context_chunks >= 0 and chunk_size * left_context_chunks < kernel // 2 * factor:
            raise ValueError(
                f"Zipformer: left_context_frames must cover half of cnn_module_kernel at every rate, "
                f"{kernel // 2 * factor} frames, got {chunk_size * left_context_chunks}"
            )


def chunk_mask(frames: int, chunk_size: int, left_context_chunks: int, device: torch.device) -> Tensor:
    """Returns the mask (frames, frames), target by source, True for sources in a later chunk or before the left
    context."""
    chunk = torch.arange(frames, dtype=torch.int32, device=device) // chunk_size
    age = chunk.unsqueeze(-1) - chunk  # [target, source], in chunks
    if left_context_chunks < 0:
        return age < 0
    return (age < 0) | (age > left_context_chunks)


def scaled(src: Tensor, feature_mask: Tensor | float) -> Tensor:
    """Returns src * feature_mask. It skips the product in inference, where the mask is 1."""
    return src if isinstance(feature_mask, (int, float)) and feature_mask == 1 else src * feature_mask


def alone(feature_mask: Tensor | float) -> AbstractContextManager[None]:
    """Returns the context of a layer before ``scaled``: a product's gradient is the layer's alone."""
    return owning(isinstance(feature_mask, Tensor))


class DownsampledZipformerEncoder(torch.nn.Module):
    """Runs ``encoder`` at a frame rate lower by the factor ``downsample``, with a learned bypass around it.

    The result has src's shape. attn_mask and chunk_size are given at the outer rate, src_key_padding_mask at the inner
    one. With left_context_chunks, chunk_size must be a multiple of ``downsample``.
    """

    def __init__(
        self, encoder: ZipformerEncoder, dim: int, downsample: int, dropout: FloatLike, causal: bool
    ) -> None:
        super().__init__()
        self.downsample_factor = downsample
        self.downsample = SimpleDownsample(dim, downsample, dropout, causal)
        self.num_layers = encoder.num_layers
        self.encoder = encoder
        self.upsample = SimpleUpsample(dim, downsample)
        self.out_combiner = BypassModule(dim, straight_through_rate=0)

    def forward(
        self,
        src: Tensor,
        chunk_size: int = -1,
        feature_mask: Tensor | float = 1.0,
        attn_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        left_context_chunks: int | None = None,
    ) -> Tensor:
        factor = self.downsample_factor
        window = {} if left_context_chunks is None else {"left_context_chunks": left_context_chunks}
        y = self.encoder(
            self.downsample(src),
            chunk_size=chunk_size // factor,
            feature_mask=feature_mask,
            attn_mask=None if attn_mask is None else attn_mask[::factor, ::factor],
            src_key_padding_mask=src_key_padding_mask,
            **window,
        )
        y = self.upsample(y)
        if len(y) > len(src):  # else the slice would cost the backward pass a copy
            y = y[: len(src)]
        return self.out_combiner(src, y)

    def streaming_forward(
        self, src: Tensor, states: list[Tensor], left_context_len: int, src_key_padding_mask: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """See ZipformerEncoder. left_context_len and src_key_padding_mask are given at the inner rate."""
        y, states = self.encoder.streaming_forward(
            self.downsample(src),
            states=states,
            left_context_len=left_context_len,
            src_key_padding_mask=src_key_padding_mask,
        )
        return self.out_combiner(src, self.upsample(y)[: src.shape[0]]), states
