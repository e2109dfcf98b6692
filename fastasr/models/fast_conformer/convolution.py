# SPDX-License-Identifier: Apache-2.0
r"""The convolution module: gate, padding mask, depthwise convolution over time, BatchNorm, SiLU, between two products.

    (a, s) = W_in n     u = a σ(s), 0 at frames that no query sees     z[t] = b + Σ_k w[k] u[t + k − (K − 1)/2]
    y = W_out SiLU(BN(z)) + b_out

In eval mode BatchNorm is in the taps: w' = w γ / √(var + eps), b' = β + (b − mean) γ / √(var + eps). In training its
statistics are over all B · T frames, padding included, as upstream.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr.models.common import activations, plumbing
from fastasr.models.common.plain import is_plain, weight_and_bias
from fastasr.models.common.ragged import Packing
from fastasr.models.common.row import Row
from fastasr.models.fast_conformer.masks import is_readable, seen
from fastasr.ops import _folded_norm


class FastConformerConvolution(torch.nn.Module):
    """hidden states (B, T, width), attention mask (bool (B, 1, T, T), True: seen; or bool (B, T), True: valid) or None
    -> (B, T, width). With a ``Packing`` or a ``Row`` as the mask, hidden states are (1, N, width)."""

    def __init__(self, width: int, taps: int = 9, bias: bool = True) -> None:
        super().__init__()
        self.pointwise_conv1 = torch.nn.Conv1d(width, 2 * width, 1, bias=bias)
        self.depthwise_conv = torch.nn.Conv1d(
            width, width, taps, padding=(taps - 1) // 2, groups=width, bias=bias
        )
        self.norm = torch.nn.BatchNorm1d(width)
        self.activation = torch.nn.SiLU()
        self.pointwise_conv2 = torch.nn.Conv1d(width, width, 1, bias=bias)

    def forward(self, hidden_states: Tensor, attention_mask: Packing | Row | Tensor | None = None) -> Tensor:
        batch, frames = hidden_states.shape[:2]
        hidden = packing = None  # (B, T), True at frames that no query sees
        if isinstance(attention_mask, (Packing, Row)):
            packing = attention_mask
        elif attention_mask is not None and is_readable(attention_mask, batch, frames):
            hidden = seen(attention_mask).hidden_keys
        elif attention_mask is not None:
            sees = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0.0
            hidden = (~sees).all(2).expand(batch, 1, frames)[:, 0]
        return gated_convolution(
            hidden_states,
            self.pointwise_conv1,
            self.depthwise_conv,
            self.norm,
            self.activation,
            self.pointwise_conv2,
            hidden,
            packing,
        )


def gated_convolution(
    x: Tensor,
    first: torch.nn.Module,
    conv: torch.nn.Module,
    norm: torch.nn.Module,
    activation: torch.nn.Module,
    last: torch.nn.Module,
    hidden: Tensor | None = None,
    packing: Packing | Row | None = None,
) -> Tensor:
    """Returns ``last(activation(norm(conv(glu(first(x))))))`` of x (B, T, width), whose convolutions are channels first
    and whose gated frames are 0 where ``hidden`` (B, T), or None, is True. With a ``packing`` x is (1, N, width). A Row
    has plain convolutions and norms alone."""
    return after_gate(pointwise(first, x), conv, norm, activation, last, hidden, packing=packing)


def after_gate(
    h: Tensor,
    conv: torch.nn.Module,
    norm: torch.nn.Module,
    activation: torch.nn.Module,
    last: torch.nn.Module,
    hidden: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Does the same from h = first(x) (B, T, 2 width) on. ``options`` are those of ``convolved``."""
    return pointwise(last, convolved(h, conv, norm, activation, hidden, **options))


def convolved(
    h: Tensor,
    conv: Any,
    norm: torch.nn.Module,
    activation: torch.nn.Module,
    hidden: Tensor | None = None,
    cache: Tensor | None = None,
    by_frame: bool = False,
    packing: Packing | Row | None = None,
    around: tuple[int, int] = (0, 0),
    stride: int = 1,
) -> Tensor:
    """Returns ``activation(norm(conv(glu(h))))``. ``cache`` (B, width, P) holds the P gated frames that the convolution
    sees before h; without it they are 0. ``by_frame``: the norm is a LayerNorm over the channels. ``around``: frames of
    0 on either side, which the convolution itself does not add. ``stride``: that of the convolution."""
    row, packing = (packing, None) if isinstance(packing, Row) else (None, packing)
    hidden = hidden if row is None else row.hidden
    delay: Any = plumbing.conv_delay(conv, around=around, stride=stride)
    if delay is not None and (by_frame or is_batch_norm(norm)):
        folded = not by_frame and not norm.training
        weight, bias = weight_and_bias(conv)
        if folded:
            weight, bias = _folded_norm.folded(conv, norm)
        fused = folded and activations.fused_name(activation) == "silu"
        h = h.transpose(0, 1)
        options: Any = {"delay": delay, "activation": "silu" if fused else "identity"}
        starts = None if packing is None else packing.starts
        z = ops.gated_depthwise_conv(
            h, weight, bias, padding_mask=hidden, cache=cache, starts=starts, **options
        )
        z = (z if stride == 1 else z[::stride]).transpose(0, 1)  # A slice costs the backward pass a copy.
        if by_frame:
            return activations.norm_activated(norm, activation, z)
        if folded:
            return z if fused else activation(z)
        name = activations.fused_name(activation)
        z = activations.batch_norm_activated(norm, name or "identity", z, row and row.hidden)
        return activation(z) if name is None else z
    if packing is not None:
        slots = packing.with_gaps(conv.weight.shape[-1] // 2 + abs(delay))
        h = packing.spread(h[0], slots).unsqueeze(0)
    z = conv(F.pad(gated(h, hidden), around))
    if packing is not None:
        z = packing.gathered(z[0].T, slots).T.unsqueeze(0)
    if by_frame:
        return activations.norm_activated(norm, activation, z.transpose(1, 2))
    return activation(norm(z).transpose(1, 2))


def gated(h: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Returns (B, width, T), the gated frames of h (B, T, 2 width), 0 where ``hidden`` (B, T), or None, is True."""
    u = F.glu(h, -1)
    return (u if hidden is None else u.masked_fill(hidden.unsqueeze(-1), 0.0)).transpose(1, 2)


def is_batch_norm(norm: torch.nn.Module) -> TypeGuard[torch.nn.BatchNorm1d]:
    """Says whether this is torch's BatchNorm with running statistics, weight and bias, without hooks."""
    if not (is_plain(norm, torch.nn.BatchNorm1d) and norm.track_running_stats):
        return False
    # Code that takes the statistics or the parameters away later leaves the flags.
    weight, bias = weight_and_bias(norm)
    get = norm._buffers.get
    return (
        weight is not None
        and bias is not None
        and get("running_mean") is not None
        and get("running_var") is not None
        and get("num_batches_tracked") is not None
    )


def pointwise(conv: torch.nn.Module, x: Tensor) -> Tensor:
    """Returns the convolution of one tap of x (B, T, C), as a product."""
    if plumbing.is_pointwise_conv1d(conv):
        # Autograd would write the gradient of weight[..., 0] into zeros.
        weight, bias = weight_and_bias(conv)
        return ops.linear(x, weight.flatten(1), bias)
    return conv(x.transpose(1, 2)).transpose(1, 2)
