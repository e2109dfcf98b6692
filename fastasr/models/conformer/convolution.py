# SPDX-License-Identifier: Apache-2.0
"""Convolution modules: W_out activation(norm(depthwise(glu(W_in LayerNorm(x))))), with dropout at the end."""

from fastasr import ops
from fastasr.models.common import plumbing
from fastasr.models.fast_conformer.convolution import FastConformerConvolution, gated_convolution, pointwise


def espnet_convolution(self, x):
    """ESPnet's Conformer. x (B, T, width) -> same shape. Padding is not masked."""
    return gated_convolution(
        x, self.pointwise_conv1, self.depthwise_conv, self.norm, self.activation, self.pointwise_conv2
    )


def fastspeech2_convolution(self, hidden_states, attention_mask=None):
    """transformers' FastSpeech2Conformer, which has Parakeet's module. hidden states (B, T, width) -> same shape."""
    return FastConformerConvolution.forward(self, hidden_states, attention_mask)


def nemo_convolution(self, x, pad_mask=None, cache=None):
    """NeMo's Conformer. x (B, T, width), pad mask (bool (B, T), True at padding) or None -> (B, T, width). Upstream's
    code serves streaming's cache."""
    if cache is not None:
        return type(self).forward(self, x, pad_mask, cache)
    y = gated_convolution(
        x,
        self.pointwise_conv1,
        self.depthwise_conv,
        self.batch_norm,
        self.activation,
        self.pointwise_conv2,
        pad_mask,
    )
    if not self.training:
        return y
    return y.transpose(1, 2).contiguous().transpose(1, 2)  # the layer's dropout draws in the order of memory


def speechbrain_convolution(self, x, mask=None, dynchunktrain_config=None):
    """SpeechBrain's Conformer, whose norm is LayerNorm. x (B, T, width), mask (bool (B, T, 1), True where the result is
    0) or None -> (B, T, width). Chunks and causal convolutions take upstream's code."""
    first, gate = self.bottleneck
    if (
        dynchunktrain_config is not None
        or any(map(plumbing.is_watched, (self.bottleneck, gate, self.after_conv)))
        or not plumbing.is_depthwise_conv(self.conv)
    ):
        return type(self).forward(self, x, mask, dynchunktrain_config)
    norm, activation, last, dropout = self.after_conv
    h = pointwise(first, self.layer_norm(x)).transpose(0, 1)
    z = ops.gated_depthwise_conv(h, self.conv.weight, self.conv.bias, activation="identity").transpose(0, 1)
    y = plumbing.dropout(dropout, plumbing.linear(last, activation(norm(z))))
    return y if mask is None else y.masked_fill(mask, 0.0)


def wav2vec2_convolution(self, hidden_states):
    """Serves transformers' Wav2Vec2Conformer: hidden states (B, T, width) -> same shape. Padding is not masked."""
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
