# SPDX-License-Identifier: Apache-2.0
"""Convolutions on the waveform in wav2vec 2.0 and its relatives, and those whose results are added as positions."""

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common import activations, convolutions
from fastasr.models.common.convolutions import over_time
from fastasr.models.common.plain import is_plain
from fastasr.models.common.plumbing import is_conv1d
from fastasr.swap.rule import Upstream


# --------------------------------------------------------------------------- the waveform: (B, C, T) -> (B, C', T')
def convolution(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves a layer without a norm."""
    y = over_time(self.conv, hidden_states)
    # Others may hold the result of a convolution that has hooks.
    return activations.applied(self.activation, y) if is_conv1d(self.conv) else self.activation(y)


def norm_convolution(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves a layer with a norm over the channels."""
    y = over_time(self.conv, hidden_states).transpose(1, 2)
    return activations.norm_activated(self.layer_norm, self.activation, y).transpose(1, 2)


def group_norm_convolution(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves a layer with a norm of each channel over the recording."""
    return channels_activated(self.layer_norm, self.activation, over_time(self.conv, hidden_states))


def channels_activated(norm: Upstream, activation: torch.nn.Module, x: Tensor) -> Tensor:
    """Returns ``activation(norm(x))`` of x (B, C, T)."""
    name = activations.fused_name(activation)
    by_channel = is_plain(norm, torch.nn.GroupNorm) and norm.num_groups == norm.num_channels == x.shape[1]
    # torch's norm reads channels first, as torch's convolution writes them.
    if name is None or not by_channel or norm.weight is None or x.is_contiguous():
        return activation(norm(x))
    found = [
        ops.batch_norm_activation(one, norm.weight, norm.bias, eps=norm.eps, activation=name)[0]
        for one in x.transpose(1, 2)
    ]
    return (found[0].unsqueeze(0) if len(found) == 1 else torch.stack(found)).transpose(1, 2)


# --------------------------------------------------------------------------- positions
def release(self: Upstream) -> None:
    """Frees the weight that is kept for the convolution of positions."""
    convolutions.release(self.conv)


def sew_positions(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves SEW's: (B, width, T) -> (B, width, T')."""
    return self.activation(self.padding(over_time(self.conv, hidden_states)))


def positions(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves those of wav2vec 2.0: (B, T, width) -> (B, T, width)."""
    x = hidden_states.transpose(1, 2)
    norm = getattr(self, "batch_norm", None)  # one model of HuBERT's has it
    return sew_positions(self, x if norm is None else norm(x)).transpose(1, 2)


def data2vec_positions(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves a layer of data2vec's, with a norm over the channels: (B, width, T) -> (B, width, T)."""
    y = self.padding(over_time(self.conv, hidden_states)).transpose(1, 2)
    return activations.norm_activated(self.layer_norm, self.activation, y).transpose(1, 2)


def omniasr_positions(self: Upstream, hidden_states: Tensor) -> Tensor:
    """Serves OmniASR's, which adds them: (B, T, width) -> (B, T, width)."""
    y = over_time(self.conv, hidden_states.transpose(1, 2))[:, :, :-1]
    return hidden_states + self.activation(y).transpose(1, 2)
