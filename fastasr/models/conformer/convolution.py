# SPDX-License-Identifier: Apache-2.0
"""Convolution modules: W_out activation(norm(depthwise(glu(W_in LayerNorm(x))))), with dropout at the end."""

from fastasr.models.common import plumbing
from fastasr.models.fast_conformer.convolution import FastConformerConvolution, gated_convolution


def espnet_convolution(self, x):
    """ESPnet's Conformer. x (B, T, width) -> same shape. Padding is not masked."""
    return gated_convolution(
        x, self.pointwise_conv1, self.depthwise_conv, self.norm, self.activation, self.pointwise_conv2
    )


def fastspeech2_convolution(self, hidden_states, attention_mask=None):
    """transformers' FastSpeech2Conformer, which has Parakeet's module. hidden states (B, T, width) -> same shape."""
    return FastConformerConvolution.forward(self, hidden_states, attention_mask)


def wav2vec2_convolution(self, hidden_states):
    """transformers' Wav2Vec2Conformer. hidden states (B, T, width) -> same shape. Padding is not masked."""
    if plumbing.is_watched(self.glu):
        return type(self).forward(self, hidden_states)
    y = gated_convolution(
        self.layer_norm(hidden_states),
        self.pointwise_conv1,
        self.depthwise_conv,
        self.batch_norm,
        self.activation,
        self.pointwise_conv2,
    )
    return _dropped(self.dropout, y)


def torchaudio_convolution(self, input):
    """torchaudio's Conformer. input (B, T, width) -> same shape. Padding is not masked."""
    first, gate, *rest, dropout = self.sequential
    if plumbing.is_watched(self.sequential) or plumbing.is_watched(gate):
        return type(self).forward(self, input)
    return _dropped(dropout, gated_convolution(self.layer_norm(input), first, *rest))


def _dropped(dropout, y):
    """Returns the dropout of y (B, T, width). Upstream draws it channels first."""
    if plumbing.is_idle(dropout):
        return y
    return dropout(y.transpose(1, 2).contiguous()).transpose(1, 2)
