# SPDX-License-Identifier: Apache-2.0
"""Feed-forward modules: dropout(W2 dropout(activation(W1 x + b1)) + b2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left
from fastasr.models.common import activations, plumbing
from fastasr.models.common.plain import is_plain
from fastasr.swap.rule import Upstream


def nemo_feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves NeMo's Conformer, without the last dropout: x (..., width) -> same shape."""
    hidden = plumbing.dropout(self.dropout, activations.activated(self.linear1, self.activation, x))
    return plumbing.linear(self.linear2, hidden)


def gigaam_feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves GigaAM's Conformer, without dropout: x (..., width) -> same shape."""
    return plumbing.linear(self.linear2, activations.activated(self.linear1, self.activation, x))


def firered_feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves FireRedASR's Conformer, whose LayerNorm comes first, and which adds the residual: x (..., width) -> same
    shape."""
    if not is_plain(self.net, torch.nn.Sequential):
        _left.note(self, "net is not a plain Sequential")
        return type(self).forward(self, x)
    norm, *layers = self.net
    return _in_sequence(layers, norm(x), residual=x)


def speechbrain_feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves SpeechBrain's positionwise feed-forward, without the last dropout: x (B, T, width) -> same shape."""
    if not is_plain(self.ffn, torch.nn.Sequential):
        _left.note(self, "ffn is not a plain Sequential")
        return type(self).forward(self, x)
    first, activation, dropout, last = self.ffn
    if plumbing.is_idle(dropout):
        return plumbing.linear(last, activations.activated(first, activation, x))
    hidden = activations.activated(first, activation, x.transpose(0, 1))  # upstream draws in this order
    return plumbing.linear(last, plumbing.dropout(dropout, hidden)).transpose(0, 1)


def wav2vec2_feed_forward(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Wav2Vec2Conformer: hidden states (..., width) -> same shape."""
    hidden = activations.activated(self.intermediate_dense, self.intermediate_act_fn, hidden_states)
    hidden = plumbing.dropout(self.intermediate_dropout, hidden)
    return plumbing.dropout(self.output_dropout, plumbing.linear(self.output_dense, hidden))


def torchaudio_feed_forward(self: Upstream, input: Tensor) -> Tensor:
    """Serves torchaudio's Conformer, whose LayerNorm comes first: input (..., width) -> same shape."""
    if not is_plain(self.sequential, torch.nn.Sequential):
        _left.note(self, "sequential is not a plain Sequential")
        return type(self).forward(self, input)
    norm, *layers = self.sequential
    return _in_sequence(layers, norm(input))


def nemo_transformer_feed_forward(self: Upstream, x: Tensor) -> Tensor:
    """Serves NeMo's TransformerEncoder: x (..., width) -> same shape."""
    if not is_plain(self.net, torch.nn.Sequential):
        _left.note(self, "net is not a plain Sequential")
        return type(self).forward(self, x)
    return _in_sequence(self.net, x)


def granite_speech_feed_forward(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Granite Speech, whose LayerNorm comes first: hidden states (..., width) -> same shape."""
    layers = self.up_proj, self.silu, self.dropout, self.down_proj, self.dropout
    return _in_sequence(layers, self.pre_norm(hidden_states))


def fun_asr_feed_forward(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Fun-ASR-Nano: hidden states (..., width) -> same shape."""
    rate = self.hidden_dropout if self.training else 0.0
    hidden = activations.activated(self.fc1, self.activation_fn, hidden_states)
    hidden = plumbing.linear(self.fc2, F.dropout(hidden, rate) if rate else hidden)
    return F.dropout(hidden, rate) if rate else hidden


def phi4_feed_forward(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Phi-4-multimodal, whose LayerNorm comes first: hidden states (..., width) -> same shape: W2
    (a · SiLU(g)) for (a, g) = W1 LayerNorm(x)."""
    hidden = activations.activated(self.gate_up_proj, self.act_fn, self.layer_norm(hidden_states), gated=True)
    y = plumbing.linear(self.down_proj, plumbing.dropout(self.dropout, hidden))
    return plumbing.dropout(self.dropout, y)


def _in_sequence(layers: Upstream, x: Tensor, residual: Tensor | None = None) -> Tensor:
    first, activation, middle, last, dropout = layers
    hidden = plumbing.dropout(middle, activations.activated(first, activation, x))
    return plumbing.dropout(dropout, plumbing.linear(last, hidden), residual)
