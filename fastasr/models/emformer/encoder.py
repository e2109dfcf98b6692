# SPDX-License-Identifier: Apache-2.0
"""The stack of layers, over whole utterances and over segments of a stream."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastasr._tables import kept
from fastasr.models.common.plain import is_watched, runs
from fastasr.models.emformer.layer import EmformerLayer, upstream_attends
from fastasr.models.emformer.parts import seen_frames, segment_means
from fastasr.models.emformer.stream import Step, infer_segment
from fastasr.models.emformer.utterance import encode_utterance
from fastasr.ops._segments import segments_of


class Emformer(nn.Module):
    """A stack of Emformer layers.

    Args:
        input_dim: channels of a frame. num_heads: heads of attention. ffn_dim: hidden channels of the feed-forward
            networks. num_layers: number of layers. segment_length: frames of a segment.
        dropout: rate for the attention weights, the attention and the feed-forward network.
        activation: activation of the feed-forward network, "relu", "gelu" or "silu".
        left_context_length, right_context_length: frames that a segment sees before and after itself.
        max_memory_size: number of earlier segments whose means a segment sees; 0 for none.
        weight_init_scale_strategy: "depthwise" (gain 1 / sqrt(layer)), "constant" (1 / sqrt 2) or None.
        tanh_on_mem: whether memory goes through tanh, instead of being clamped to ±10.
        negative_inf: kept for upstream's signature; it has no effect, since hidden keys are left out.
    Raises:
        ValueError: an option has another value than those above, or num_heads does not divide input_dim.
    """

    emformer_layers: Any  # a ModuleList of EmformerLayer
    _gen_attention_mask: Callable[[Tensor], Tensor]  # torchaudio's

    def __init__(
        self,
        input_dim: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        segment_length: int,
        dropout: float = 0.0,
        activation: str = "relu",
        left_context_length: int = 0,
        right_context_length: int = 0,
        max_memory_size: int = 0,
        weight_init_scale_strategy: str | None = "depthwise",
        tanh_on_mem: bool = False,
        negative_inf: float = -1e8,
    ) -> None:
        super().__init__()
        self.use_mem = max_memory_size > 0
        self.memory_op = nn.AvgPool1d(kernel_size=segment_length, stride=segment_length, ceil_mode=True)
        self.emformer_layers = nn.ModuleList(
            EmformerLayer(
                input_dim,
                num_heads,
                ffn_dim,
                segment_length,
                dropout=dropout,
                activation=activation,
                left_context_length=left_context_length,
                max_memory_size=max_memory_size,
                weight_init_gain=gain,
                tanh_on_mem=tanh_on_mem,
                negative_inf=negative_inf,
            )
            for gain in _init_gains(weight_init_scale_strategy, num_layers)
        )
        self.left_context_length = left_context_length
        self.right_context_length = right_context_length
        self.segment_length = segment_length
        self.max_memory_size = max_memory_size

    def forward(self, input: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances.

        Args:
            input: (B, T + right_context_length, D), utterances followed by their right context.
            lengths: (B,), valid frames of each utterance. As in torchaudio, it is ignored for a single utterance, and
                the longest utterance counts as T frames.
        Returns:
            The encoding (B, T, D) and the lengths.
        """
        x = input.transpose(0, 1)
        frames = x.shape[0] - self.right_context_length
        right_context = x.index_select(
            0, _right_context_rows(frames, self.segment_length, self.right_context_length, x.device)
        )
        output = x[:frames]
        mems = segment_means(self, output)[:-1] if self.use_mem else x.new_empty(0)
        mask = None
        if not all(_is_own(layer, "forward") for layer in self.emformer_layers):
            mask = self._gen_attention_mask(output)  # layers that run upstream's code need it
        # Our own layers pass [right context | utterance] on as one tensor, which saves copies.
        blocks, whole = right_context.shape[0], None
        seen = seen_frames(lengths, frames) if x.shape[1] > 1 else None
        for layer in self.emformer_layers:
            if _is_unwatched(layer):
                whole = torch.cat([right_context, output]) if whole is None else whole
                whole, mems = encode_utterance(layer, whole, frames, seen, mems)
                continue
            if whole is not None:
                right_context, output, whole = whole[:blocks], whole[blocks:], None
            output, right_context, mems = layer(output, lengths, right_context, mems, mask)
        output = output if whole is None else whole[blocks:]
        return output.transpose(0, 1), lengths

    def infer(
        self, input: Tensor, lengths: Tensor, states: list[list[Tensor]] | None = None
    ) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """Encodes the next segment of a stream.

        Args:
            input: (B, segment_length + right_context_length, D).
            lengths: (B,), valid frames of the input, right context included.
            states: the states that the previous call returned; the lists are updated in place. Each layer has its
                memory (M, B, D), keys and values of the left context, (L, B, D) each, and the number of frames so far,
                (1, B) int32.
        Returns:
            The encoding (B, segment_length, D), its lengths, and the states.
        Raises:
            ValueError: input has another number of frames.
        """
        expected = self.segment_length + self.right_context_length
        if input.shape[1] != expected:
            raise ValueError(
                f"Emformer.infer: input: expected {expected} frames (segment_length + right_context_length), got "
                f"{input.shape[1]}"
            )
        x = input.transpose(0, 1)
        output, right_context = x[: self.segment_length], x[self.segment_length :]
        lengths = torch.clamp(lengths - self.right_context_length, min=0)
        mems = segment_means(self, output) if self.use_mem else x.new_empty(0)
        layers, step, next_states = self.emformer_layers, None, []
        for i, layer in enumerate(layers):
            state = None if states is None else states[i]
            if _is_own(layer, "infer"):
                if step is None:
                    past = None if state is None else state[3]
                    step = Step(layer, output.shape[0], output.shape[1], lengths, past, x.device)
                output, right_context, state, mems = infer_segment(
                    layer, output, right_context, state, mems, step
                )
            else:
                output, right_context, state, mems = layer.infer(output, lengths, right_context, state, mems)
            next_states.append(state)
        return output.transpose(0, 1), lengths, next_states


def _init_gains(strategy: str | None, layers: int) -> list[float | None]:
    if strategy is None:
        return [None] * layers
    if strategy == "depthwise":
        return [1 / math.sqrt(i + 1) for i in range(layers)]
    if strategy == "constant":
        return [1 / math.sqrt(2)] * layers
    raise ValueError(
        f"Emformer: weight_init_scale_strategy: expected 'depthwise', 'constant' or None, got {strategy!r}"
    )


def _is_own(layer: EmformerLayer, name: str) -> bool:
    return runs(layer, getattr(EmformerLayer, name), name) and not upstream_attends(layer)


def _is_unwatched(layer: EmformerLayer) -> bool:
    """Says whether a call of the layer runs its own forward and nothing else."""
    return not is_watched(layer) and _is_own(layer, "forward")


@kept(64)
def _right_context_rows(frames: int, segment: int, right: int, device: torch.device) -> Tensor:
    """Returns the rows of the frames that follow each segment. Behind the last segment is the utterance's right
    context."""
    with torch.inference_mode(False):
        segments = segments_of(frames, segment)
        starts = torch.clamp(
            (torch.arange(segments, device=device, dtype=torch.int64) + 1) * segment, max=frames
        )
        return (starts[:, None] + torch.arange(right, device=device, dtype=torch.int64)).flatten()
