# SPDX-License-Identifier: Apache-2.0
"""BatchNorm in eval mode as part of the depthwise convolution before it: one kernel on CUDA. Not public.

scale = norm_weight / √(variance + eps)      weight' = weight · scale      bias' = norm_bias + (bias − mean) · scale
"""

from typing import Any

import torch
from torch import Tensor

from fastasr.kernels import Unlaunchable
from fastasr.ops._dispatch import KernelFamily, direct, triton_launchers

FAMILY = KernelFamily("folded_norm", (), (triton_launchers("_folded_norm"),))


def folded(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Returns the taps (C, 1, K) and the bias (C,) of ``norm(conv(u))`` in float32 or better. In 16 bits they would err
    alike in every frame, and the norm's gradients would be rounded."""
    weight, bias = conv.weight, conv.bias
    mean, variance = norm.running_mean, norm.running_var
    tensors = weight, bias, mean, variance, norm.weight, norm.bias
    given = [t for t in tensors if t is not None]
    wide = torch.promote_types(weight.dtype, torch.float32)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if direct(*given) and not differentiated and all(map(Tensor.is_contiguous, given)):
        kernels = FAMILY.kernels(*given)
        if kernels is not None:
            launchers: Any = kernels.forward
            try:
                return launchers.folded(*tensors, norm.eps)
            except Unlaunchable as error:
                FAMILY.give_up(error, *given)
    scale = norm.weight.to(wide) * torch.rsqrt(variance.to(wide) + norm.eps)
    shift = -mean.to(wide) if bias is None else bias.to(wide) - mean
    return weight * scale[:, None, None], torch.addcmul(norm.bias.to(wide), shift, scale)
