# SPDX-License-Identifier: Apache-2.0
"""Swoosh activations, alone and fused with dropout and a linear layer.

SwooshL(x) = log(1 + e^(x-4)) - 0.08 x - 0.035
SwooshR(x) = log(1 + e^(x-1)) - 0.08 x - 0.313261687
"""

import sys
from typing import Any, Literal

import torch
from torch import Tensor

from fastasr import ops
from fastasr._recording import recording
from fastasr.models.common.ragged import current
from fastasr.models.zipformer.decisions import is_zero, keep_rates
from fastasr.models.zipformer.initial_scale import ScaledLinear
from fastasr.models.zipformer.schedules import FloatLike
from fastasr.ops import _decided
from fastasr.ops._dropout import draw_mask
from fastasr.ops._wrapped.swoosh_linear import with_mask

Kind = Literal["SwooshL", "SwooshR"]


class SwooshL(torch.nn.Module):
    """SwooshL, elementwise, any shape. No parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.swoosh_l(x)


class SwooshR(torch.nn.Module):
    """SwooshR, elementwise, any shape. No parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.swoosh_r(x)


class ActivationDropoutAndLinear(torch.nn.Module):
    """``linear(dropout(swoosh(x)))``; only ``x`` is kept for the backward pass.

    x (..., in_channels) -> (..., out_channels). In training the dropout mask is drawn once per call from the
    generator of ``x.device``, in x's dtype, with size 1 over ``dropout_shared_dim`` (None: a full mask).

    Raises ValueError for an ``activation`` other than "SwooshL" and "SwooshR".
    """

    bias: Tensor | None
    activation: Kind

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        activation: Kind = "SwooshL",
        dropout_p: FloatLike = 0.0,
        dropout_shared_dim: int | None = -1,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if activation not in ("SwooshL", "SwooshR"):
            raise ValueError(
                f"ActivationDropoutAndLinear: activation must be 'SwooshL' or 'SwooshR', got {activation!r}"
            )
        linear = ScaledLinear(in_channels, out_channels, bias=bias, initial_scale=initial_scale)
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.activation = activation
        self.dropout_p = dropout_p
        self.dropout_shared_dim = dropout_shared_dim

    def forward(self, x: Tensor) -> Tensor:
        # A scheduled rate draws a random number when it is read, and upstream reads it in training only.
        if recording() is not None:
            return _recorded(self, x)
        dropout_p = float(self.dropout_p) if self.training and not _is_without_k2(self) else 0.0
        packing = current()
        if packing is not None and dropout_p > 0.0 and self.dropout_shared_dim == 0:
            mask = draw_mask(x.new_empty(1, packing.count, x.shape[-1]), dropout_p, 0)[0]
            number = packing.recording.unsqueeze(1)
            return with_mask(x, self.weight, self.bias, self.activation, mask, number)
        return ops.swoosh_linear(
            x,
            self.weight,
            self.bias,
            kind=self.activation,
            dropout_p=dropout_p,
            dropout_shared_dim=self.dropout_shared_dim,
            training=self.training,
        )


def _is_without_k2(self: Any) -> bool:
    """Says whether this is ZipVoice's class, which drops nothing if k2 is not loaded."""
    return type(self).__module__.startswith("zipvoice.") and "k2" not in sys.modules


def _recorded(self: Any, x: Tensor) -> Tensor:
    scale: Any
    p, scale = keep_rates(self.dropout_p) if self.training and not _is_without_k2(self) else (0.0, 1.0)
    if is_zero(p):
        return with_mask(x, self.weight, self.bias, self.activation)
    dim, row = self.dropout_shared_dim, current()
    shape = list(x.shape)
    if dim == 0 and row is not None:
        shape[1] = row.count
    if dim is not None:
        shape[dim] = 1
    drawn = torch.rand(*shape, device=x.device, dtype=x.dtype)
    if isinstance(p, Tensor):
        mask = _decided.mask(drawn, p, scale)
    else:
        mask = (drawn > p).to(x.dtype) * scale
    if dim == 0 and row is not None:
        return with_mask(x, self.weight, self.bias, self.activation, mask[0], row.recording.unsqueeze(1))
    return with_mask(
        x, self.weight, self.bias, self.activation, mask, None, -1 if dim is None else dim % x.dim()
    )
