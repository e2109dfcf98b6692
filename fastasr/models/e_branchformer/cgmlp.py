# SPDX-License-Identifier: Apache-2.0
"""The local branch: an MLP with a convolutional spatial gating unit (Sakuma et al., 2022)."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common import activations, plumbing
from fastasr.models.common.plain import is_plain, is_plain_named
from fastasr.models.common.row import Row


def is_layer_norm(owner: torch.nn.Module, norm: torch.nn.Module) -> TypeGuard[torch.nn.LayerNorm]:
    """Says whether this is torch's or ESPnet's LayerNorm over the last dimension, with weight and bias."""
    return (
        is_plain_named(norm, ("LayerNorm",), owner)
        and isinstance(norm, torch.nn.LayerNorm)
        and getattr(norm, "dim", -1) == -1
        and len(norm.normalized_shape) == 1
        and norm.weight is not None
        and norm.bias is not None
    )


class ConvolutionalSpatialGatingUnit(torch.nn.Module):
    """x (B, T, size) = (r, g) -> dropout(r · act(linear(conv(norm(g))) + gate_add)) (B, T, size / 2).

    The linear layer exists only if ``use_linear_after_conv`` is set.
    """

    def __init__(
        self,
        size: int,
        kernel_size: int,
        dropout_rate: float,
        use_linear_after_conv: bool = False,
        gate_activation: str | torch.nn.Module = "identity",
        *,
        bias: bool = True,
        norm: Callable[[int], torch.nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if size % 2:
            raise ValueError(f"ConvolutionalSpatialGatingUnit: size: expected an even number, got {size}")
        if kernel_size % 2 == 0:
            raise ValueError(
                f"ConvolutionalSpatialGatingUnit: kernel_size: expected an odd number, got {kernel_size}"
            )
        channels = size // 2
        self.norm = torch.nn.LayerNorm(channels, eps=1e-12) if norm is None else norm(channels)
        self.conv = torch.nn.Conv1d(
            channels, channels, kernel_size, padding=(kernel_size - 1) // 2, groups=channels, bias=bias
        )
        self.linear = torch.nn.Linear(channels, channels) if use_linear_after_conv else None
        self.act = activations.instance("ConvolutionalSpatialGatingUnit", "gate_activation", gate_activation)
        self.dropout = torch.nn.Dropout(dropout_rate)

    def espnet_initialization_fn(self) -> None:
        """Initialises as ESPnet does: the gate starts as 1."""
        for module in (self.conv, self.linear):
            if module is not None:
                torch.nn.init.normal_(module.weight, std=1e-6)
                if module.bias is not None:
                    torch.nn.init.ones_(module.bias)

    def forward(self, x: Tensor, gate_add: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """``hidden`` (B, T): True at frames that the convolution reads as 0."""
        norm, conv = self.norm, self.conv
        name = activations.fused_name(self.act)
        if (
            is_layer_norm(self, norm)
            and plumbing.is_depthwise_conv(conv)
            and self.linear is None
            and gate_add is None
            and name
        ):
            parameters = norm.weight, norm.bias, conv.weight, conv.bias
            y = ops.conv_spatial_gate(x, *parameters, norm.eps, padding_mask=hidden, activation=name)
            return plumbing.dropout(self.dropout, y)
        r, g = x.chunk(2, dim=-1)
        g = norm(g) if hidden is None else norm(g).masked_fill(hidden.unsqueeze(-1), 0.0)
        g = conv(g.transpose(1, 2)).transpose(1, 2)
        if self.linear is not None:
            g = plumbing.linear(self.linear, g)
        if gate_add is not None:
            g = g + gate_add
        return plumbing.dropout(self.dropout, r * self.act(g))


class FeedForwardConvGated(torch.nn.Module):
    """x (B, T, out_dim) -> same shape: linear layer, activation, convolutional spatial gating unit, linear layer.

    Args:
        out_dim: the model's width.
        ff_dim: width of the gated half, which is half of ESPnet's ``cgmlp_linear_units``; default 3 out_dim.
        kernel_size: taps of the depthwise convolution, odd.
        dropout: rate of the dropout after the gate.
        activation: name or module of the activation after the first linear layer.
        gate_activation: name or module of the gate's activation.
        with_bias: whether the linear layers and the convolution have a bias.
        norm: makes the gate's norm from its width; default LayerNorm with ESPnet's epsilon of 1e-12.
        use_linear_after_conv: whether a linear layer follows the convolution, as in ESPnet.
    """

    def __init__(
        self,
        out_dim: int,
        *,
        ff_dim: int | None = None,
        kernel_size: int = 31,
        dropout: float = 0.1,
        activation: str | torch.nn.Module = "gelu",
        gate_activation: str | torch.nn.Module = "identity",
        with_bias: bool = True,
        norm: Callable[[int], torch.nn.Module] | None = None,
        use_linear_after_conv: bool = False,
    ) -> None:
        super().__init__()
        ff_dim = 3 * out_dim if ff_dim is None else ff_dim
        self.channel_proj1 = torch.nn.Sequential(
            torch.nn.Linear(out_dim, 2 * ff_dim, bias=with_bias),
            activations.instance("FeedForwardConvGated", "activation", activation),
        )
        self.csgu = ConvolutionalSpatialGatingUnit(
            2 * ff_dim,
            kernel_size,
            dropout,
            use_linear_after_conv,
            gate_activation,
            bias=with_bias,
            norm=norm,
        )
        self.channel_proj2 = torch.nn.Linear(ff_dim, out_dim, bias=with_bias)

    def forward(
        self, x: tuple[Tensor, Tensor] | Tensor, mask: Row | Tensor | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Takes x, or ESPnet's pair of x and the positional encoding, which is returned as a pair too. Of masks it
        reads a ``Row`` alone: in a padded batch the gate sees padding."""
        x, positions = x if isinstance(x, tuple) else (x, None)
        first = self.channel_proj1
        if _is_two_steps(first):
            x = activations.activated(first[0], first[1], x)
        else:
            x = first(x)
        gated = self.csgu(x, hidden=mask.hidden) if isinstance(mask, Row) else self.csgu(x)
        x = plumbing.linear(self.channel_proj2, gated)
        return x if positions is None else (x, positions)


def _is_two_steps(sequential: torch.nn.Sequential) -> bool:
    return is_plain(sequential, torch.nn.Sequential) and len(sequential) == 2
