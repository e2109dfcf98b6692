# SPDX-License-Identifier: Apache-2.0
r"""The ends of MEGA's blocks (Ma et al., 2022, section 3.3): a residual, gated or not, and LayerNorm.

gated_residual_norm: y = LN(x + σ(update) ⊙ (a − x)), a = act(candidate + hidden) ⊙ M;
residual_norm: y = LN(x + update);
with LN(t) = (t − mean t) / √(var t + eps) ⊙ weight + bias over the channels. M, optional, is the mask of dropout.
Upstream: the last lines of ``MEGA.forward`` in ``espnet2.asr_transducer.decoder.blocks.mega`` and of
``NormalizedPositionwiseFeedForward.forward`` in ``espnet2.asr_transducer.decoder.modules.mega.feed_forward``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _activation, _check


# --------------------------------------------------------------------------- definition
def definition(
    x: Tensor,
    update: Tensor,
    candidate: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """gated_residual_norm in eager PyTorch."""
    proposal = _activation.function(activation)(candidate + hidden)
    if dropout_mask is not None:
        proposal = proposal * dropout_mask
    mixed = x + torch.sigmoid(update) * (proposal - x)
    return F.layer_norm(mixed, mixed.shape[-1:], weight.to(mixed.dtype), bias.to(mixed.dtype), eps)


def definition_residual(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """residual_norm in eager PyTorch."""
    total = x + update
    return F.layer_norm(total, total.shape[-1:], weight.to(total.dtype), bias.to(total.dtype), eps)


# --------------------------------------------------------------------------- public functions
def gated_residual_norm(
    x: Tensor,
    update: Tensor,
    candidate: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x + σ(update) · (act(candidate + hidden) · dropout_mask − x)) over the last dimension.

    Args:
        x, update, candidate, hidden: (..., D), one shape; slices of a wider projection need no copy.
        weight, bias: (D,).
        eps: added to the variance.
        activation: "identity", "silu", "relu", "tanh" or "gelu".
        dropout_mask: x's shape, multiplied on the activated sum.
    Returns:
        A tensor of x's shape in the promoted dtype of the four inputs.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    op = "gated_residual_norm"
    _activation.number(op, activation)
    for name, t in (("x", x), ("update", update), ("candidate", candidate), ("hidden", hidden)):
        _check.floating_tensor(op, name, t)
    return definition(
        x, update, candidate, hidden, weight, bias, eps, activation=activation, dropout_mask=dropout_mask
    )


def residual_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm(x + update) over the last dimension.

    Args:
        x, update: (..., D), one shape.
        weight, bias: (D,).
        eps: added to the variance.
    Returns:
        A tensor of x's shape in the promoted dtype of x and update.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    op = "residual_norm"
    for name, t in (("x", x), ("update", update)):
        _check.floating_tensor(op, name, t)
    return definition_residual(x, update, weight, bias, eps)
