# SPDX-License-Identifier: Apache-2.0
"""The norms over the last dimension that several ops have, and the limits of what they read."""

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("layer", "rms")  # Kernels receive the place.


def effective_limit(limit: float, x: Tensor) -> float:
    """Returns the limit of a norm's input, at most the largest number of x's dtype, as Gemma bounds it; 0: none."""
    return min(limit, torch.finfo(x.dtype).max) if limit else limit


def limited(x: Tensor, limit: float) -> Tensor:
    limit = effective_limit(limit, x)
    return x.clamp(-limit, limit) if limit else x


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """Returns LayerNorm or RMSNorm over the last dimension."""
    weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    z = F.rms_norm(x, x.shape[-1:], weight, eps)
    return z if bias is None else z + bias
