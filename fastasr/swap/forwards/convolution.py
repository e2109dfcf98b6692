# SPDX-License-Identifier: Apache-2.0
"""Convolution modules: W_out activation(norm(depthwise(glu(W_in LayerNorm(x))))), with dropout at the end."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left, ops
from fastasr.models.common import activations, plumbing
from fastasr.models.common.plain import is_plain, is_upstreams
from fastasr.models.common.ragged import Packing
from fastasr.models.common.row import Row
from fastasr.models.fast_conformer.convolution import (
    FastConformerConvolution,
    after_gate,
    convolved,
    gated,
    gated_convolution,
    is_batch_norm,
    pointwise,
)
from fastasr.swap.rule import Upstream

_SILU = torch.nn.SiLU()


def espnet_convolution(self: Upstream, x: Tensor) -> Tensor:
    """Serves ESPnet's Conformer: x (B, T, width) -> same shape. Padding is not masked."""
    y = gated_convolution(
        x, self.pointwise_conv1, self.depthwise_conv, self.norm, self.activation, self.pointwise_conv2
    )
    return _as_upstream_lays_it(self, y)


def fastspeech2_convolution(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Serves transformers' FastSpeech2Conformer, with Parakeet's module: hidden states (B, T, width) -> same shape."""
    return _as_upstream_lays_it(self, FastConformerConvolution.forward(self, hidden_states, attention_mask))


def nemo_convolution(
    self: Upstream, x: Tensor, pad_mask: Tensor | None = None, cache: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Serves NeMo's Conformer: x (B, T, width), pad mask (bool (B, T), True at padding) or None, cache (B, width, P) of
    the gated frames before x or None -> (B, T, width), and with a cache the next cache."""
    conv, norm, by_frame = self.depthwise_conv, self.batch_norm, self.norm_type == "layer_norm"
    if cache is not None and (plumbing.conv_delay(conv) is None or not (by_frame or is_batch_norm(norm))):
        _left.note(self, "a cache, and a convolution or norm that is no plain one or has hooks")
        return type(self).forward(self, x, pad_mask, cache)
    h = pointwise(self.pointwise_conv1, x)
    layers, hidden = (conv, norm, self.activation, self.pointwise_conv2), _by(pad_mask)
    y = after_gate(h, *layers, **hidden, cache=cache, by_frame=by_frame)
    y = _as_upstream_lays_it(self, y)
    return y if cache is None else (y, conv.update_cache(gated(h, pad_mask), cache)[1])


def speechbrain_convolution(
    self: Upstream, x: Tensor, mask: Tensor | None = None, dynchunktrain_config: Upstream = None
) -> Tensor:
    """Serves SpeechBrain's Conformer, with LayerNorm as norm: x (B, T, width), mask (bool (B, T, 1), True where the
    result is 0) or None -> (B, T, width). With dynamic chunks (Li et al., "Dynamic chunk convolution for unified
    streaming and non-streaming Conformer ASR", 2023) the taps on later frames see only the same chunk."""
    first, gate = self.bottleneck
    chunk_size = None if dynchunktrain_config is None else dynchunktrain_config.chunk_size
    if (
        not all(is_plain(part, torch.nn.Sequential) for part in (self.bottleneck, self.after_conv))
        or not is_plain(gate, torch.nn.GLU)
        or (delay := plumbing.conv_delay(self.conv, self.causal)) is None
        or (chunk_size is not None and delay)
    ):
        _left.note(self, "a part has hooks, its convolution is no plain one, or is causal within chunks")
        return type(self).forward(self, x, mask, dynchunktrain_config)
    norm, activation, last, dropout = self.after_conv
    h = pointwise(first, self.layer_norm(x)).transpose(0, 1)
    if chunk_size is None:
        form: dict[str, Any] = {"weight": self.conv.weight, "delay": delay}
    else:
        form = _within_chunks(self.conv.weight, chunk_size)
    z = ops.gated_depthwise_conv(h, bias=self.conv.bias, activation="identity", **form).transpose(0, 1)
    y = plumbing.linear(last, activations.norm_activated(norm, activation, z))
    if chunk_size is not None and not plumbing.is_idle(dropout):  # upstream draws for whole chunks
        frames = y.shape[1]
        y = plumbing.dropout(dropout, F.pad(y, (0, 0, 0, -frames % chunk_size)))[:, :frames]
    else:
        y = plumbing.dropout(dropout, y)
    return y if mask is None else y.masked_fill(mask, 0.0)


def _within_chunks(weight: Tensor, chunk_size: int) -> dict[str, Any]:
    """Returns the arguments of ``ops.gated_depthwise_conv`` for taps (C, 1, K) whose last ⌊K / 2⌋ stay in the chunk."""
    past = weight.shape[-1] // 2 + 1
    return {
        "weight": F.pad(weight[..., past:], (past, 0)),
        "causal_weight": weight[..., :past],
        "chunk_scale": weight.new_zeros(2, len(weight), weight.shape[-1]),
        "chunk_size": chunk_size,
    }


def wav2vec2_convolution(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Wav2Vec2Conformer: hidden states (B, T, width) -> same shape. Padding is not masked."""
    if not is_plain(self.glu, torch.nn.GLU):
        _left.note(self, "glu is not a plain GLU")
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


def seamless_convolution(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Serves transformers' SeamlessM4T: hidden states (B, T, width), mask (B, T), 1 at valid frames, or None -> (B, T,
    width). Upstream sets padding to 0 before ``pointwise_conv1``, which has no bias, so that the gated frame is 0."""
    return _seamless(self, hidden_states, attention_mask, "batch_norm")


def causal_seamless_convolution(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Serves SeamlessM4T v2 and w2v-BERT 2.0, whose convolution sees the past alone and whose norm is LayerNorm."""
    around = self.depthwise_conv.kernel_size[0] - 1, 0
    return _seamless(
        self, hidden_states, attention_mask, "depthwise_layer_norm", by_frame=True, around=around
    )


def _seamless(
    self: Upstream, hidden_states: Tensor, attention_mask: Any, norm: Upstream, **options: Any
) -> Tensor:
    first = self.pointwise_conv1
    if not is_plain(self.glu, torch.nn.GLU) or not is_plain(first, torch.nn.Conv1d) or first.bias is not None:
        _left.note(self, "glu or pointwise_conv1 is no plain one, or has a bias")
        return type(self).forward(self, hidden_states, attention_mask)
    h = pointwise(first, self.layer_norm(hidden_states))
    packed = attention_mask is None or isinstance(attention_mask, Packing)
    hidden = _by(attention_mask if packed else ~attention_mask.bool())
    layers = self.depthwise_conv, getattr(self, norm), self.activation, self.pointwise_conv2
    return _dropped(self.dropout, after_gate(h, *layers, **(hidden | options)))


def firered_convolution(self: Upstream, x: Tensor, mask: Any = None) -> Tensor:
    """Serves FireRedASR's Conformer, which adds the residual: x (B, T, width), mask (B, 1, T), 1 at valid frames, or
    None -> (B, T, width). Upstream sets padding to 0 before ``pointwise_conv1``, which has no bias, so that the gated
    frame is 0."""
    packed = mask is None or isinstance(mask, Packing)
    first, hidden = self.pointwise_conv1, None if packed else mask[:, 0].ne(1)
    n = self.pre_layer_norm(x)
    if hidden is not None and not (is_plain(first, torch.nn.Conv1d) and first.bias is None):
        n = n.masked_fill(hidden.unsqueeze(-1), 0.0)
    layers = self.depthwise_conv, self.batch_norm, self.swish, self.pointwise_conv2
    by = _by(mask if packed else hidden)
    y = _dropped(self.dropout, after_gate(pointwise(first, n), *layers, **by, by_frame=True))
    return x + (y if hidden is None else y.masked_fill(hidden.unsqueeze(-1), 0.0))


def gigaam_convolution(self: Upstream, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
    """Serves GigaAM's Conformer: x (B, T, width), pad mask (bool (B, T), True at padding) or None -> (B, T, width)."""
    layers = self.depthwise_conv, self.batch_norm, self.activation, self.pointwise_conv2
    return gated_convolution(x, self.pointwise_conv1, *layers, **_by(pad_mask))


def granite_speech_convolution(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves Granite Speech and its Plus: hidden states (B, T, width) -> same shape. Padding is not masked."""
    if not is_plain(self.glu, torch.nn.GLU):
        _left.note(self, "glu is not a plain GLU")
        return type(self).forward(self, hidden_states)
    conv, around = self.depth_conv, (0, 0)
    if is_upstreams(conv, self):
        conv, around = conv.conv, conv.padding
    h = pointwise(self.up_conv, self.norm(hidden_states))
    y = after_gate(h, conv, self.batch_norm, self.silu, self.down_conv, around=around)
    return _dropped(self.dropout, y)


def granite_speech5_convolution(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Serves Granite Speech 5: hidden states (B, T, width), mask (bool (B, T), True at valid frames) or None -> (B,
    ⌈T / stride⌉, width)."""
    h = plumbing.linear(self.pointwise_lin1, hidden_states)
    hidden = None if attention_mask is None else ~attention_mask
    y = convolved(h, self.depthwise_conv, self.norm, _SILU, hidden, stride=self.depthwise_conv.stride[0])
    return plumbing.linear(self.pointwise_lin2, y)


def phi4_convolution(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves transformers' Phi-4-multimodal: hidden states (B, T, width) -> same shape: W3 SiLU(W2 z) of the causal
    depthwise convolution z of (a + b1) · SiLU(g + b2), (a, g) = W1 LayerNorm(x). Padding is not masked."""
    glu, separable = self.glu, self.dw_sep_conv_1d
    first, depthwise, second = glu.ext_pw_conv_1d, separable.dw_conv, separable.pw_conv
    plain = is_upstreams(glu, self) and is_upstreams(separable, self)
    fused = all(activations.fused_name(a) == "silu" for a in (glu.glu_act, self.act))
    delay = plumbing.conv_delay(depthwise, causal=True)
    if not plain or not fused or delay is None or not all(map(plumbing.is_pointwise_conv1d, (first, second))):
        _left.note(self, "a part has hooks or is no plain one, or an activation is not SiLU")
        return type(self).forward(self, hidden_states)
    shift = torch.cat([glu.b1, glu.b2], 1).flatten()
    bias = shift if first.bias is None else first.bias + shift
    h = ops.linear(self.layer_norm(hidden_states), first.weight.flatten(1), bias).transpose(0, 1)
    z = ops.gated_depthwise_conv(
        h, depthwise.weight, depthwise.bias, delay=delay, activation="identity", gate="silu"
    ).transpose(0, 1)
    z = ops.linear_activation(z, second.weight.flatten(1), second.bias, "silu")
    return _dropped(self.dropout, pointwise(self.ext_pw_conv_1d, z))


def fun_asr_memory(self: Upstream, hidden_states: Tensor, input_features_mask: Tensor) -> Tensor:
    """Serves the memory of transformers' Fun-ASR-Nano (FSMN), without a gate: hidden states (B, T, width), mask (B, T),
    1 at valid frames -> same shape: u plus its depthwise convolution, with u 0 at padding."""
    u = hidden_states * input_features_mask.unsqueeze(-1).to(hidden_states.dtype)
    conv, pad = self.conv, self.pad
    odd = is_plain(pad, torch.nn.ConstantPad1d) and pad.value == 0.0 and pad.padding[0] == pad.padding[1]
    if not odd or plumbing.conv_delay(conv, around=pad.padding) != 0:
        _left.note(self, "conv or pad has hooks, or has an even number of taps")
        return type(self).forward(self, hidden_states, input_features_mask)
    y = _as_upstream_lays_it(self, ops.depthwise_conv_residual(u, conv.weight, conv.bias))
    return F.dropout(y, self.dropout) if self.training and self.dropout else y


def torchaudio_convolution(self: Upstream, input: Tensor) -> Tensor:
    """Serves torchaudio's Conformer: input (B, T, width) -> same shape. Padding is not masked."""
    first, gate, *rest, dropout = self.sequential
    if not is_plain(self.sequential, torch.nn.Sequential) or not is_plain(gate, torch.nn.GLU):
        _left.note(self, "sequential or its glu is not a plain one")
        return type(self).forward(self, input)
    return _dropped(dropout, gated_convolution(self.layer_norm(input), first, *rest))


def _by(mask: Packing | Row | Tensor | None) -> dict[str, Any]:
    """Returns the arguments of ``convolved`` for a mask, True at padding, or a ``Packing`` or ``Row`` in its place."""
    return {"packing" if isinstance(mask, (Packing, Row)) else "hidden": mask}


def _as_upstream_lays_it(module: Upstream, y: Tensor) -> Tensor:
    """Returns y (B, T, width), in training channels first in memory: upstream's next dropout draws in that order."""
    return y.transpose(1, 2).contiguous().transpose(1, 2) if module.training else y


def _dropped(dropout: Upstream, y: Tensor) -> Tensor:
    """Returns the dropout of y (B, T, width). Upstream draws it channels first."""
    if plumbing.is_idle(dropout):
        return y
    return dropout(y.transpose(1, 2).contiguous()).transpose(1, 2)
