# SPDX-License-Identifier: Apache-2.0
"""A layer of the Emformer: LayerNorm, attention within segments, feed-forward network, LayerNorm."""

import torch
from torch import Tensor, nn

from fastasr import _left
from fastasr.models.common.plain import is_upstreams
from fastasr.models.emformer.parts import ACTIVATIONS, seen_frames
from fastasr.models.emformer.stream import Step, infer_segment
from fastasr.models.emformer.utterance import encode_utterance

_WATCHED = "its attention has hooks or another forward"
_HIDDEN = -1e4  # A score this low has weight 0 beside any other, so hidden keys can be left out.


class EmformerAttention(nn.Module):
    """The projections of a layer's attention; :class:`EmformerLayer` computes the attention."""

    def __init__(
        self,
        input_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        weight_init_gain: float | None = None,
        tanh_on_mem: bool = False,
        negative_inf: float = -1e8,
    ) -> None:
        super().__init__()
        if input_dim % num_heads != 0:
            raise ValueError(
                f"EmformerAttention: input_dim: expected a multiple of num_heads ({num_heads}), got {input_dim}"
            )
        if negative_inf > _HIDDEN:
            raise ValueError(
                f"EmformerAttention: negative_inf: expected at most {_HIDDEN:g} (keys are left out, not weighed "
                f"down), got {negative_inf}"
            )
        self.input_dim = input_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.tanh_on_mem = tanh_on_mem
        self.negative_inf = negative_inf
        self.scaling = (input_dim // num_heads) ** -0.5
        self.emb_to_key_value = nn.Linear(input_dim, 2 * input_dim)
        self.emb_to_query = nn.Linear(input_dim, input_dim)
        self.out_proj = nn.Linear(input_dim, input_dim)
        if weight_init_gain:
            nn.init.xavier_uniform_(self.emb_to_key_value.weight, gain=weight_init_gain)
            nn.init.xavier_uniform_(self.emb_to_query.weight, gain=weight_init_gain)


def upstream_attends(layer: "EmformerLayer") -> bool:
    """Says whether this is a layer of upstream's whose attention must be called, since it has hooks or a forward of its
    own. The attention of our class only holds the projections.
    """
    attention = layer.attention
    if type(attention) is EmformerAttention:
        return False
    return "infer" in vars(attention) or not is_upstreams(attention, layer)


class EmformerLayer(nn.Module):
    """LayerNorm, segment attention, feed-forward network, LayerNorm, with residuals."""

    def __init__(
        self,
        input_dim: int,
        num_heads: int,
        ffn_dim: int,
        segment_length: int,
        dropout: float = 0.0,
        activation: str = "relu",
        left_context_length: int = 0,
        max_memory_size: int = 0,
        weight_init_gain: float | None = None,
        tanh_on_mem: bool = False,
        negative_inf: float = -1e8,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"EmformerLayer: activation: expected one of {tuple(ACTIVATIONS)}, got {activation!r}"
            )
        self.attention = EmformerAttention(
            input_dim, num_heads, dropout, weight_init_gain, tanh_on_mem, negative_inf
        )
        self.dropout = nn.Dropout(dropout)
        self.memory_op = nn.AvgPool1d(kernel_size=segment_length, stride=segment_length, ceil_mode=True)
        self.pos_ff = nn.Sequential(
            nn.LayerNorm(input_dim),
            nn.Linear(input_dim, ffn_dim),
            ACTIVATIONS[activation](),
            nn.Dropout(dropout),
            nn.Linear(ffn_dim, input_dim),
            nn.Dropout(dropout),
        )
        self.layer_norm_input = nn.LayerNorm(input_dim)
        self.layer_norm_output = nn.LayerNorm(input_dim)
        self.left_context_length = left_context_length
        self.segment_length = segment_length
        self.max_memory_size = max_memory_size
        self.input_dim = input_dim
        self.use_mem = max_memory_size > 0

    def forward(
        self,
        utterance: Tensor,
        lengths: Tensor,
        right_context: Tensor,
        mems: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the layer over whole utterances.

        Args:
            utterance: (T, B, D). lengths: (B,), valid frames.
            right_context: (n R, B, D), a block of R frames for each of the n segments.
            mems: (n - 1, B, D), or without elements if the layer has no memory.
            attention_mask: upstream's mask. It is not read, since the segments' windows define the same mask.
        Returns:
            The encoded utterance and right context, and the memory for the next layer.
        """
        if upstream_attends(self):
            _left.note(self, _WATCHED)
            return type(self).forward(self, utterance, lengths, right_context, mems, attention_mask)
        frames, batch, _ = utterance.shape
        seen = seen_frames(lengths, frames) if batch > 1 else None
        blocks = right_context.shape[0]
        y, next_mems = encode_utterance(self, torch.cat([right_context, utterance]), frames, seen, mems)
        return y[blocks:], y[:blocks], next_mems

    def infer(
        self,
        utterance: Tensor,
        lengths: Tensor,
        right_context: Tensor,
        state: list[Tensor] | None,
        mems: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """Runs the layer over one segment of a stream; see :meth:`Emformer.infer`."""
        if upstream_attends(self):
            _left.note(self, _WATCHED, "infer")
            return type(self).infer(self, utterance, lengths, right_context, state, mems)
        past = None if state is None else state[3]
        step = Step(self, utterance.shape[0], utterance.shape[1], lengths, past, utterance.device)
        return infer_segment(self, utterance, right_context, state, mems, step)
