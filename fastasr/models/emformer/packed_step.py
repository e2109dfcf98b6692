# SPDX-License-Identifier: Apache-2.0
"""Runs one segment of a stream through an Emformer layer in one native call; states stay torchaudio's tensors.

The call is in csrc/cpu/streaming/emformer_step.h. :mod:`fastasr.models.common.packed_layers` tells when the weights are
packed, what that costs, and how to decline it.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastasr import _left
from fastasr.models.common.packed_layers import PackedLayer, PackedLayers, may_serve, note_declined
from fastasr.models.common.plain import is_plain
from fastasr.ops import _activation, _dispatch

if TYPE_CHECKING:
    from fastasr.models.emformer.layer import EmformerLayer
    from fastasr.models.emformer.stream import Step

# The rows of a segment are its frames, right context, summary and memory, times streams. With more rows, a matrix
# product is bound by arithmetic instead of by reading the weights.
MOST_ROWS = 128

_ACTIVATIONS = {nn.ReLU: "relu", nn.GELU: "gelu", nn.SiLU: "silu"}


def step(
    layer: "EmformerLayer",
    utterance: Tensor,
    right_context: Tensor,
    state: list[Tensor],
    mems: Tensor,
    shared: "Step | _Full",
    by_operations: Callable[..., Sequence[Tensor]],
) -> list[Tensor] | None:
    """Returns [utterance, right context, next mems, the four new states] of a segment, or None if the native call
    cannot be used.

    It can be used for layers in eval mode, without gradients, in float32 on the CPU, and for segments of the layer's
    length that have at most 128 rows with right context and memory. ``shared`` holds what the layers of the step have
    in common (lengths, history, kept). ``by_operations`` is a function that computes the same by the operations.
    """
    weight = next(layer.parameters(), None)  # A layer's attribute may be a parametrization, which computes.
    if not may_serve(layer, utterance, weight):
        note_declined(layer, utterance, weight, "infer")
        return None
    if not _is_meant_for(layer, utterance, right_context):
        return None
    packed = _PACKED.of(layer, by_operations)
    if packed.reason or not packed.fits(utterance, right_context, state, mems):
        reason = packed.why(layer) or "states, memory or right context that the native call does not read"
        _left.note(layer, reason, "infer")
        return None
    return packed.run(utterance, right_context, state, mems, shared)


def _is_meant_for(layer: "EmformerLayer", utterance: Tensor, right_context: Tensor) -> bool:
    """Says whether this is a whole segment of few rows. Any other takes the operations, which serve it better."""
    memory = layer.max_memory_size if layer.use_mem else 0
    frames, streams = utterance.shape[:2]
    rows = streams * (frames + right_context.shape[0] + memory + 1)
    return frames == layer.segment_length and rows <= MOST_ROWS


class _PackedLayer(PackedLayer["EmformerLayer"]):
    METHODS = "forward", "infer"

    def _pack(self, layer: "EmformerLayer") -> None:
        attention, ff = layer.attention, list[Any](layer.pos_ff)
        linears = attention.emb_to_key_value, attention.emb_to_query, attention.out_proj, ff[1], ff[4]
        norms = layer.layer_norm_input, ff[0], layer.layer_norm_output
        self._dim, self._segment = attention.input_dim, layer.segment_length
        self._memory = layer.max_memory_size if layer.use_mem else 0
        self._left = layer.left_context_length
        activation = _activation.NAMES.index(_ACTIVATIONS[type(ff[2])])
        inner, tanh = ff[1].out_features, int(attention.tanh_on_mem)
        self._numbers = [self._dim, attention.num_heads, inner, activation, tanh]
        self._eps = [float(norm.eps) for norm in norms]
        self._weights = torch.ops.fastasr_cpu.emformer_layer_pack.default(
            self._numbers,
            self._eps,
            [linear.weight.contiguous() for linear in linears],
            [_dense(linear.bias, linear.weight[:, 0], 0.0) for linear in linears],
            [
                _dense(parameter, attention.out_proj.weight[:, 0], missing)
                for norm in norms
                for parameter, missing in ((norm.weight, 1.0), (norm.bias, 0.0))
            ],
        )

    def _example(
        self, by_operations: Callable[..., Sequence[Tensor]]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Computes a segment of two streams with 2 frames of right context both ways."""
        streams, right = 2, 2
        rows = self._segment, right, min(1, self._memory), self._memory, self._left, self._left
        waves = [
            torch.arange(1.0, n * streams * self._dim + 1, dtype=torch.float32, device="cpu")
            .mul_(0.7 + 0.1 * i)
            .sin_()
            .view(n, streams, self._dim)
            for i, n in enumerate(rows)
        ]
        utterance, right_context, mems, *before = waves
        past = torch.full(
            (1, streams), self._left + self._segment * self._memory, dtype=torch.int32, device="cpu"
        )
        shared = _Full(self._left, self._memory, self._segment)
        arguments = utterance, right_context, [*before, past], mems, shared
        return self.run(*arguments), by_operations(*arguments)

    def fits(self, utterance: Tensor, right_context: Tensor, state: list[Tensor], mems: Tensor) -> bool:
        """Says whether the native call can read these arguments without conversion."""
        frames, streams, dim = utterance.shape
        rows = self._memory, self._left, self._left
        return (
            frames == self._segment
            and dim == self._dim
            and _plain(utterance)
            and right_context.shape[1:] == (streams, dim)
            and _plain(right_context)
            and (not self._memory or (mems.shape == (1, streams, dim) and _plain(mems)))
            and all(t.shape == (n, streams, dim) and _plain(t) for t, n in zip(state[:3], rows, strict=True))
            and state[3].dtype is torch.int32
            and state[3].shape == (1, streams)
            and state[3].is_cpu
        )

    def run(
        self,
        utterance: Tensor,
        right_context: Tensor,
        state: list[Tensor],
        mems: Tensor,
        shared: "Step | _Full",
    ) -> list[Tensor]:
        return torch.ops.fastasr_cpu.emformer_layer_step.default(
            self._numbers,
            self._eps,
            self._weights,
            utterance,
            right_context,
            mems,
            [t.contiguous() for t in state],
            shared.lengths,
            shared.history,
            shared.kept,
            torch.get_num_threads(),
        )

    def _why_not_ever(self, layer: "EmformerLayer") -> str:
        for name in ("attention.emb_to_key_value", "attention.emb_to_query", "attention.out_proj"):
            if not is_plain(layer.get_submodule(name), nn.Linear):
                return f"{name} is not a plain Linear"
        for name in ("layer_norm_input", "layer_norm_output"):
            if not is_plain(layer.get_submodule(name), nn.LayerNorm):
                return f"{name} is not a plain LayerNorm"
        parts = tuple(layer.pos_ff)
        kinds = (nn.LayerNorm,), (nn.Linear,), tuple(_ACTIVATIONS), (nn.Dropout,), (nn.Linear,), (nn.Dropout,)
        if len(parts) != len(kinds) or not all(
            is_plain(part, *kind) for part, kind in zip(parts, kinds, strict=True)
        ):
            return "pos_ff is not LayerNorm, Linear, ReLU, GELU or SiLU, Dropout, Linear, Dropout"
        if getattr(parts[2], "approximate", "none") != "none":
            return "the GELU is an approximate one"
        if not is_plain(layer.dropout, nn.Dropout):
            return "dropout is not a plain Dropout"
        return ""


class _Full:
    """The values that all layers share in a step whose left context and memory are full."""

    def __init__(self, left: int, memory: int, frames: int) -> None:
        self.lengths, self.behind = None, torch.zeros((), dtype=torch.int64, device="cpu")
        self.history = torch.tensor([left, memory], dtype=torch.int64, device="cpu")
        self.kept = torch.arange(frames, frames + left, dtype=torch.int64, device="cpu")


def _plain(t: Tensor) -> bool:
    return (
        type(t) in _dispatch.PLAIN
        and t.dtype is torch.float32
        and t.is_cpu
        and (t.numel() == 0 or t.stride(2) == 1)
    )


def _dense(parameter: Tensor | None, like: Tensor, missing: float) -> Tensor:
    return like.new_full(like.shape, missing) if parameter is None else parameter.contiguous()


_PACKED = PackedLayers(_PackedLayer)
why_not = _PACKED.why_not
