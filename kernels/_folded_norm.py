# SPDX-License-Identifier: Apache-2.0
"""The taps and the bias of a depthwise convolution that does what the convolution and BatchNorm in eval mode do.

scale = norm_weight / sqrt(variance + eps)      weight' = weight scale      bias' = norm_bias + (bias - mean) scale
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import cdiv, launch
from fastasr.kernels._layer_norm import inverse_root

TILE = {"BLOCK_C": 32, "BLOCK_K": 16, "num_warps": 4}


@triton.jit
def folded_kernel(
    W, B, MEAN, VARIANCE, NORM_W, NORM_B, OUT_W, OUT_B, eps, channels, taps,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    variance = tl.load(VARIANCE + c, mask=in_c, other=1.0).to(tl.float32)
    scale = tl.load(NORM_W + c, mask=in_c, other=0.0).to(tl.float32) * inverse_root(variance, eps)
    shift = -tl.load(MEAN + c, mask=in_c, other=0.0).to(tl.float32)
    if B is not None:
        shift += tl.load(B + c, mask=in_c, other=0.0).to(tl.float32)
    bias = tl.fma(shift, scale, tl.load(NORM_B + c, mask=in_c, other=0.0).to(tl.float32))
    tl.store(OUT_B + c, bias.to(OUT_B.dtype.element_ty), mask=in_c)
    for first in range(0, taps, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        at = c[:, None] * taps + k[None, :]
        keep = in_c[:, None] & (k < taps)[None, :]
        w = tl.load(W + at, mask=keep, other=0.0).to(tl.float32) * scale[:, None]  # [BLOCK_C, BLOCK_K]
        tl.store(OUT_W + at, w.to(OUT_W.dtype.element_ty), mask=keep)


def folded(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the taps (C, 1, K) and the bias (C,) in float32. All tensors are contiguous."""
    channels, taps = weight.shape[0], weight.shape[-1]
    out = [torch.empty_like(t, dtype=torch.float32) for t in (weight, norm_bias)]
    launch(folded_kernel, (cdiv(channels, TILE["BLOCK_C"]),),
        weight, bias, mean, variance, norm_weight, norm_bias, *out, eps, channels, taps, **TILE,
    )  # fmt: skip
    return out[0], out[1]
