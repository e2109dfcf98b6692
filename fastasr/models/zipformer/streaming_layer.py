# SPDX-License-Identifier: Apache-2.0
"""Runs one chunk through a streaming layer in one native call; states stay upstream's tensors.

The call is ``layer_step`` in csrc/cpu/streaming/zipformer_chunk.h. :mod:`fastasr.models.common.packed_layers` tells
when the weights are packed, what that costs, and how to decline it.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common.linear import Linear
from fastasr.models.common.packed_layers import PackedLayer, PackedLayers, may_serve, note_declined
from fastasr.models.common.plain import is_plain, runs
from fastasr.models.zipformer.attention import RelPositionMultiheadAttentionWeights
from fastasr.models.zipformer.convolution import ConvolutionModule
from fastasr.models.zipformer.nonlin_attention import NonlinAttention
from fastasr.models.zipformer.packing import Packed, StackSizes, pack_layer
from fastasr.models.zipformer.self_attention import SelfAttention

if TYPE_CHECKING:
    from fastasr.models.zipformer.layer import ZipformerEncoderLayer

# The rows of a chunk are frames times streams. With more rows, reading the weights no longer dominates.
MOST_ROWS = 128

# The number of chunk sizes for which a layer keeps its small tables.
CHUNK_SIZES = 4

_STREAMING: dict[str, Any] = {  # the classes whose streaming_forward each part must run
    "self_attn_weights": RelPositionMultiheadAttentionWeights,
    "self_attn1": SelfAttention,
    "self_attn2": SelfAttention,
    "nonlin_attention": NonlinAttention,
    "conv_module1": ConvolutionModule,
    "conv_module2": ConvolutionModule,
}
_PROJECTED = (*_STREAMING, "feed_forward1", "feed_forward2", "feed_forward3")


def step(
    layer: "ZipformerEncoderLayer",
    src: Tensor,
    pos_emb: Tensor,
    states: Sequence[Tensor],
    left_context_len: int,
    masked: Tensor | None,
    by_submodules: Callable[..., Any],
) -> list[Tensor] | None:
    """Returns [output, the six new states] of ``layer.streaming_forward``, or None if the native call cannot be used.

    It can be used for layers in eval mode, without gradients, in float32 on the CPU, whose submodules run our code, and
    for chunks of at most 128 rows. ``by_submodules`` is a function that computes the same by the submodules.
    """
    bias = getattr(layer.norm, "bias", None)
    if not may_serve(layer, src, bias):
        note_declined(layer, src, bias, "streaming_forward")
        return None
    if src.shape[0] * src.shape[1] > MOST_ROWS:
        return None
    packed = _PACKED.of(layer, by_submodules)
    if packed.reason or not packed.fits(src, pos_emb, states, left_context_len, masked):
        reason = packed.why(layer) or "states, masks or positions that the native call does not read"
        _left.note(layer, reason, "streaming_forward")
        return None
    return packed.run(src, pos_emb, states, left_context_len, masked)


class _PackedLayer(PackedLayer["ZipformerEncoderLayer"]):
    METHODS, OPERATIONS = ("forward", "streaming_forward"), "submodules"

    def __init__(self, layer: "ZipformerEncoderLayer", by_submodules: Callable[..., Any]) -> None:
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._layer: Callable[[], Any] = weakref.ref(layer)
        super().__init__(layer, by_submodules)

    def _pack(self, layer: "ZipformerEncoderLayer") -> None:
        self.sizes = StackSizes.of(layer)
        self._positions = layer.self_attn_weights.linear_pos.in_features
        packed = Packed()
        pack_layer(packed, layer, layer.norm.bias.new_zeros(1, self._positions), 1)
        self._weights = torch.ops.fastasr_cpu.zipformer_layer_weights.default(self.sizes, packed.weights)

    def _example(self, by_submodules: Callable[..., Any]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Computes a chunk of 3 frames with 5 frames of left context both ways."""
        frames, left = 3, 5
        wave = (
            torch.arange(1.0, frames * self.sizes.dim + 1, dtype=torch.float32, device="cpu").mul_(0.7).sin_()
        )
        src = wave.view(frames, 1, self.sizes.dim)
        pos_emb = (
            torch.arange(
                1.0, (left + 2 * frames - 1) * self._positions + 1, dtype=torch.float32, device="cpu"
            )
            .mul_(0.3)
            .sin_()
        )
        pos_emb = pos_emb.view(1, -1, self._positions)
        states = [
            torch.arange(1.0, shape.numel() + 1, dtype=torch.float32, device="cpu")
            .mul_(0.9 + 0.1 * i)
            .sin_()
            .view(shape)
            for i, shape in enumerate(map(torch.Size, self.sizes.state_shapes(1, left)))
        ]
        masked = torch.zeros(1, left + frames, dtype=torch.bool, device="cpu")
        masked[:, [1, -1]] = True
        got = self.run(src, pos_emb, states, left, masked)
        self._tables.clear()
        return got, by_submodules(src, pos_emb, states, left, masked)

    def fits(
        self,
        src: Tensor,
        pos_emb: Tensor,
        states: Sequence[Tensor],
        left: int,
        masked: Tensor | None,
    ) -> bool:
        """Says whether the native call can read these arguments without conversion."""
        frames, streams, dim = src.shape
        return (
            dim == self.sizes.dim
            and pos_emb.shape == (1, left + 2 * frames - 1, self._positions)
            and all(
                state.shape == shape and state.dtype is torch.float32 and state.is_cpu
                for state, shape in zip(states, self.sizes.state_shapes(streams, left), strict=True)
            )
            and (
                masked is None
                or (masked.dtype is torch.bool and masked.is_cpu and masked.shape == (streams, left + frames))
            )
        )

    def run(
        self,
        src: Tensor,
        pos_emb: Tensor,
        states: Sequence[Tensor],
        left: int,
        masked: Tensor | None,
    ) -> list[Tensor]:
        return torch.ops.fastasr_cpu.zipformer_layer_step.default(
            self.sizes,
            left,
            self._weights,
            self._vectors(src.shape[0], left, pos_emb),
            src.contiguous(),
            [state.contiguous() for state in states],
            None if masked is None else masked.contiguous(),
            torch.get_num_threads(),
        )

    def _vectors(self, frames: int, left: int, pos_emb: Tensor) -> Tensor:
        """Returns biases, norms, convolutions and projected positions for chunks of ``frames``."""
        known = self._tables.get((frames, left))
        if known is not None and torch.equal(known[0], pos_emb):
            return known[1]
        packed = Packed()
        with torch.no_grad():
            pack_layer(packed, self._layer(), pos_emb[0], frames)
        vectors = torch.ops.fastasr_cpu.zipformer_layer_vectors.default(
            self.sizes, frames, left, packed.biases, packed.tables
        )
        while len(self._tables) >= CHUNK_SIZES:
            del self._tables[next(iter(self._tables))]
        self._tables[frames, left] = pos_emb.clone(), vectors
        return vectors

    def _why_not_ever(self, layer: "ZipformerEncoderLayer") -> str:
        for name, ours in _STREAMING.items():
            if not runs(getattr(layer, name), ours.streaming_forward, "streaming_forward"):
                return f"{name} runs other code than fastasr's"
        for name in _PROJECTED:
            module = getattr(layer, name)
            if not _is_linear(module.in_proj):
                return f"{name}.in_proj is not a plain Linear"
        for name in ("self_attn_weights.linear_pos", "self_attn1.out_proj", "self_attn2.out_proj"):
            if not _is_linear(layer.get_submodule(name)):
                return f"{name} is not a plain Linear"
        if not _is_linear(layer.nonlin_attention.out_proj):
            return "nonlin_attention.out_proj is not a plain Linear"
        conv = layer.conv_module1.depthwise_conv
        if type(conv).__name__ != "ChunkCausalDepthwiseConv1d" or conv.kernel_size < 3:
            return "its convolutions are not causal, or of one tap"
        return ""


def _is_linear(module: torch.nn.Module) -> bool:
    return is_plain(module, torch.nn.Linear, Linear)


_PACKED = PackedLayers(_PackedLayer)
why_not = _PACKED.why_not
