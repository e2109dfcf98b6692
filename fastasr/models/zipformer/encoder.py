# SPDX-License-Identifier: Apache-2.0
"""The Zipformer encoder: stacks of layers at different frame rates and widths. It halves the frame rate."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastasr.models.zipformer import ragged
from fastasr.models.zipformer.layer import ZipformerEncoderLayer
from fastasr.models.zipformer.resampling import SimpleDownsample, convert_num_channels
from fastasr.models.zipformer.schedules import FloatLike, ScheduledFloat
from fastasr.models.zipformer.stack import (
    STATES_PER_LAYER,
    DownsampledZipformerEncoder,
    ZipformerEncoder,
    check_chunks,
    chunk_mask,
)
from fastasr.packed_frames import PackedFrames

# An argument for stacks is one number for all, one for each, or these as a string, "1,2,4".
Ints = int | Sequence[int] | str


class Zipformer(torch.nn.Module):
    """x (time, batch, encoder_dim[0]), x_lens (batch,) -> ((time + 1) // 2, batch, max(encoder_dim)), lengths.

    The arguments are upstream's. An argument per stack is an int, a sequence of ints or a string like "1,2,4", with one
    value or as many as ``downsampling_factor`` has. ``chunk_size`` and ``left_context_frames`` take the same forms.

    With ``causal``, forward draws one of the chunk sizes and, unless it is -1, one of the left contexts; attention and
    convolutions then see whole chunks. src_key_padding_mask (batch, time) is True at padding.

    With ``encoder.ragged = True`` it computes nothing for padding, see ``ragged``, and takes PackedFrames (N,
    encoder_dim[0]) without a mask too, for which it returns PackedFrames (N', max(encoder_dim)) and their lengths.

    Raises ValueError for arguments that do not fit each other.
    """

    ragged = False
    encoders: Any  # a ModuleList of ZipformerEncoder and DownsampledZipformerEncoder

    def __init__(
        self,
        output_downsampling_factor: int = 2,
        downsampling_factor: tuple[int, ...] | str = (2, 4),
        encoder_dim: Ints = 384,
        num_encoder_layers: Ints = 4,
        encoder_unmasked_dim: Ints = 256,
        query_head_dim: Ints = 24,
        pos_head_dim: Ints = 4,
        value_head_dim: Ints = 12,
        num_heads: Ints = 8,
        feedforward_dim: Ints = 1536,
        cnn_module_kernel: Ints = 31,
        pos_dim: int = 192,
        dropout: FloatLike | None = None,
        warmup_batches: float = 4000.0,
        causal: bool = False,
        chunk_size: Ints = (-1,),
        left_context_frames: Ints = (-1,),
    ) -> None:
        super().__init__()
        if dropout is None:
            dropout = ScheduledFloat((0.0, 0.3), (20000.0, 0.1))
        downsampling_factor = int_tuple("downsampling_factor", downsampling_factor)
        stacks = len(downsampling_factor)

        def per_stack(name: str, value: Ints) -> tuple[int, ...]:
            return _per_stack(name, int_tuple(name, value), stacks)

        if output_downsampling_factor != 2:
            raise ValueError(
                f"Zipformer: output_downsampling_factor must be 2, got {output_downsampling_factor}"
            )
        self.output_downsampling_factor = output_downsampling_factor
        self.downsampling_factor = downsampling_factor
        self.encoder_dim = encoder_dim = per_stack("encoder_dim", encoder_dim)
        self.encoder_unmasked_dim = per_stack("encoder_unmasked_dim", encoder_unmasked_dim)
        self.num_encoder_layers = per_stack("num_encoder_layers", num_encoder_layers)
        self.query_head_dim = per_stack("query_head_dim", query_head_dim)
        self.value_head_dim = per_stack("value_head_dim", value_head_dim)
        pos_head_dim = per_stack("pos_head_dim", pos_head_dim)
        self.num_heads = per_stack("num_heads", num_heads)
        feedforward_dim = per_stack("feedforward_dim", feedforward_dim)
        self.cnn_module_kernel = per_stack("cnn_module_kernel", cnn_module_kernel)
        self.causal = causal
        self.chunk_size = int_tuple("chunk_size", chunk_size)
        self.left_context_frames = int_tuple("left_context_frames", left_context_frames)
        for unmasked, dim in zip(self.encoder_unmasked_dim, encoder_dim, strict=True):
            if unmasked > dim:
                raise ValueError(
                    f"Zipformer: encoder_unmasked_dim must not exceed encoder_dim, got "
                    f"{self.encoder_unmasked_dim} and {encoder_dim}"
                )

        encoders = []
        for i, factor in enumerate(downsampling_factor):
            layer = ZipformerEncoderLayer(
                embed_dim=encoder_dim[i],
                pos_dim=pos_dim,
                num_heads=self.num_heads[i],
                query_head_dim=self.query_head_dim[i],
                pos_head_dim=pos_head_dim[i],
                value_head_dim=self.value_head_dim[i],
                feedforward_dim=feedforward_dim[i],
                dropout=dropout,
                cnn_module_kernel=self.cnn_module_kernel[i],
                causal=causal,
            )
            # At first only the front end learns; the stacks join one after another during the warm-up.
            encoder: Any = ZipformerEncoder(
                layer,
                self.num_encoder_layers[i],
                pos_dim=pos_dim,
                dropout=dropout,
                warmup_begin=warmup_batches * (i + 1) / (stacks + 1),
                warmup_end=warmup_batches * (i + 2) / (stacks + 1),
                final_layerdrop_rate=0.035 * factor**0.5,
            )
            if factor != 1:
                encoder = DownsampledZipformerEncoder(
                    encoder, dim=encoder_dim[i], downsample=factor, dropout=dropout, causal=causal
                )
            encoders.append(encoder)
        self.encoders = torch.nn.ModuleList(encoders)
        self.downsample_output = SimpleDownsample(
            max(encoder_dim), downsample=output_downsampling_factor, dropout=dropout, causal=causal
        )

    def forward(
        self, x: Tensor | PackedFrames, x_lens: Tensor, src_key_padding_mask: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        if isinstance(x, PackedFrames):
            reason = None if self.ragged else "encoder.ragged is False"
            return ragged.of_packed(self, x, src_key_padding_mask, reason)
        lengths = ragged.lengths(self, x, src_key_padding_mask) if self.ragged else None
        if lengths is not None:
            return ragged.encoded(self, x, lengths), (x_lens + 1) // 2
        return encoded(self, x, x_lens, src_key_padding_mask, _called)

    def streaming_forward(
        self, x: Tensor, x_lens: Tensor, states: list[Tensor], src_key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """x (time, batch, channels), one chunk, with states from get_init_states or the previous chunk -> output,
        lengths, states for the next chunk. src_key_padding_mask is (batch, left_context_frames[0] + time).
        """
        outputs: list[Tensor] = []
        new_states: list[Tensor] = []
        first = 0
        for i, encoder in enumerate(self.encoders):
            factor = self.downsampling_factor[i]
            last = first + encoder.num_layers * STATES_PER_LAYER
            x, encoder_states = encoder.streaming_forward(
                convert_num_channels(x, self.encoder_dim[i]),
                states=states[first:last],
                left_context_len=self._left_context_len(factor),
                src_key_padding_mask=None
                if src_key_padding_mask is None
                else src_key_padding_mask[..., ::factor],
            )
            first = last
            outputs.append(x)
            new_states += encoder_states
        x = self.downsample_output(self._get_full_dim_output(outputs))
        return x, (x_lens + 1) // 2, new_states

    def get_init_states(
        self,
        batch_size: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    ) -> list[Tensor]:
        """Returns the states before the first chunk, which are zeros. Each layer has cached_key, cached_nonlin_attn,
        cached_val1, cached_val2, cached_conv1 and cached_conv2.
        """
        states = []
        for i, encoder in enumerate(self.encoders):
            left = self._left_context_len(self.downsampling_factor[i])
            dim = self.encoder_dim[i]
            key_dim = self.query_head_dim[i] * self.num_heads[i]
            value_dim = self.value_head_dim[i] * self.num_heads[i]
            pad = self.cnn_module_kernel[i] // 2
            shapes = (
                (left, batch_size, key_dim),
                (1, batch_size, left, 3 * dim // 4),
                (left, batch_size, value_dim),
                (left, batch_size, value_dim),
                (batch_size, dim, pad),
                (batch_size, dim, pad),
            )
            dtype = next(encoder.parameters()).dtype
            for _ in range(encoder.num_layers):
                states += [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        return states

    def _left_context_len(self, factor: int) -> int:
        frames = self.left_context_frames[0]
        if frames < 0:
            raise ValueError(
                f"Zipformer: streaming needs left_context_frames of 0 or more, got {self.left_context_frames}"
            )
        return frames // factor

    def get_feature_masks(self, x: Tensor) -> list[Tensor | float]:
        """Returns for each stack the mask that multiplies its features: 1.0 in eval mode, in training 0 and 1 of shape
        (1, batch, channels).

        It hides the channels beyond encoder_unmasked_dim in all stacks for an eighth of the sequences, and the upper
        half of these channels for about another eighth.
        """
        if not self.training:
            return [1.0] * len(self.encoder_dim)
        _, batch, channels = x.shape
        if channels != self.encoder_dim[0]:
            raise ValueError(f"Zipformer: x must have {self.encoder_dim[0]} channels, got {channels}")
        all_kept = torch.rand(1, batch, 1, device=x.device) > 0.125
        upper_kept = all_kept & (torch.rand(1, batch, 1, device=x.device) > 0.125)
        masks: list[Tensor | float] = []
        for dim, unmasked in zip(self.encoder_dim, self.encoder_unmasked_dim, strict=True):
            middle = unmasked + (dim - unmasked) // 2
            mask = torch.ones(1, batch, dim, dtype=x.dtype, device=x.device)
            mask[:, :, unmasked:middle] *= all_kept
            mask[:, :, middle:] *= upper_kept
            masks.append(mask)
        return masks

    def get_chunk_info(self) -> tuple[int, int]:
        """Draws (chunk size, left context in chunks) from Python's ``random``; -1 means no limit. A compiled call takes
        the only choice without a draw.
        """
        if not self.causal:
            return -1, -1
        if torch.compiler.is_compiling() and len(self.chunk_size) == len(self.left_context_frames) == 1:
            chunk_size, left_frames = self.chunk_size[0], self.left_context_frames[0]
            return (-1, -1) if chunk_size == -1 else (chunk_size, left_frames // chunk_size or 1)
        chunk_size = random.choice(self.chunk_size)
        if chunk_size == -1:
            return -1, -1
        left_context_chunks = random.choice(self.left_context_frames) // chunk_size  # -1 stays -1
        return chunk_size, left_context_chunks or 1

    def _get_full_dim_output(self, outputs: list[Tensor]) -> Tensor:
        """Returns the last stack's output. Channels that it lacks come from the last stack that has them."""
        pieces = [outputs[-1]]
        width = self.encoder_dim[-1]
        for output, dim in zip(outputs[-2::-1], self.encoder_dim[-2::-1], strict=True):
            if dim > width:
                pieces.append(output[..., width:dim])
                width = dim
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def encoded(
    encoder: Zipformer,
    x: Tensor,
    x_lens: Tensor,
    src_key_padding_mask: Tensor | None,
    run: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """Computes ``Zipformer.forward`` on the padded batch, for upstream's encoder too. ``run(stack, x, chunk_size=,
    left_context_chunks=, feature_mask=, src_key_padding_mask=)`` computes a stack.
    """
    feature_masks = encoder.get_feature_masks(x)
    chunk_size, left_context_chunks = encoder.get_chunk_info()
    check_chunks(encoder, chunk_size, left_context_chunks)
    outputs = []
    for i, stack in enumerate(encoder.encoders):
        factor = encoder.downsampling_factor[i]
        x = run(
            stack,
            convert_num_channels(x, encoder.encoder_dim[i]),
            chunk_size=chunk_size,
            left_context_chunks=left_context_chunks,
            feature_mask=feature_masks[i],
            src_key_padding_mask=None
            if src_key_padding_mask is None
            else src_key_padding_mask[..., ::factor].contiguous(),  # once, not in every layer
        )
        outputs.append(x)
    x = encoder.downsample_output(encoder._get_full_dim_output(outputs))
    return x, (x_lens + 1) // 2


def _called(
    stack: torch.nn.Module, x: Tensor, chunk_size: int, left_context_chunks: int, **call: Any
) -> Tensor:
    if chunk_size > 0 and isinstance(stack, (ZipformerEncoder, DownsampledZipformerEncoder)):
        call["left_context_chunks"] = left_context_chunks
    elif chunk_size > 0:
        call["attn_mask"] = chunk_mask(x.shape[0], chunk_size, left_context_chunks, x.device)
    return stack(x, chunk_size=chunk_size, **call)


def int_tuple(name: str, value: Ints) -> tuple[int, ...]:
    """Returns a tuple of ints from an int, a sequence of ints or a string like "1,2,4"."""
    if isinstance(value, str):
        parts: list[Any] = value.split(",")
    elif isinstance(value, int):
        parts = [value]
    else:
        parts = list(value)
    try:
        values = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        values = ()
    if not values or any(isinstance(part, float) for part in parts):
        raise ValueError(f"Zipformer: {name} must be an int, ints or a string of ints, got {value!r}")
    return values


def _per_stack(name: str, values: tuple[int, ...], stacks: int) -> tuple[int, ...]:
    if len(values) == 1:
        return values * stacks
    if len(values) != stacks:
        raise ValueError(f"Zipformer: {name} must have 1 or {stacks} values, one per stack, got {values}")
    return values
