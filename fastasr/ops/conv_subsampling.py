# SPDX-License-Identifier: Apache-2.0
r"""The first two convolutions of FastConformer's front end (Rekesh et al., 2023, "dw_striding"): a 3 × 3 convolution of
one channel, ReLU, and a depthwise 3 × 3 convolution, both with stride 2, channels last.

For x (B, T, F), already padded, and m (B, H), which frames of the first convolution to keep:

    h[b, t, f, c] = m[b, t] ReLU(bias[c] + Σ_{i, j < 3} w[c, i, j] x[b, 2t + i, 2f + j])
    y[b, t, f, c] = depthwise_bias[c] + Σ_{i, j < 3} v[c, i, j] h[b, 2t + i, 2f + j − left, c]      0 beyond h's columns

With gradient g: dv[c, i, j] = Σ g[b, t, f, c] h[b, 2t + i, 2f + j − left, c]; with dz = dh where h > 0 and 0 elsewhere,
dw[c, i, j] = Σ dz[b, t, f, c] x[b, 2t + i, 2f + j], dbias = Σ dz, and dx is the transposed convolution of dz by w. h is
never in memory, which a batch of recordings would fill with gigabytes: the backward pass computes it again from x.
The forward pass moves the bytes of x and y, the backward pass those of x and g.
Upstream: ``ParakeetEncoderSubsamplingConv2D`` in transformers, ``ConvSubsampling`` in NeMo.
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._op import op


@op(
    "cpu triton",
    one_dtype="x weight bias depthwise_weight depthwise_bias",
    backward="grad x weight bias depthwise_weight mask left needs.x",
)
def conv_subsampling(
    x: Annotated[Tensor, "B T F, T >= 7, F >= 3"],
    weight: Annotated[Tensor, "C 1 3 3, C >= 1"],
    bias: Annotated[Tensor, "C"] | None,
    depthwise_weight: Annotated[Tensor, "C 1 3 3"],
    depthwise_bias: Annotated[Tensor, "C"] | None = None,
    mask: Annotated[Tensor, "B (T-1)//2", bool] | None = None,
    *,
    left: Annotated[int, "1 or 2"] = 1,
) -> Annotated[Tensor, "B ((T-1)//2-1)//2 ((F-1)//2+left)//2 C", "x"]:
    """The first two convolutions of FastConformer's front end, without their intermediate map.

    They are a convolution with stride 2, ReLU, mask, and a depthwise convolution with stride 2, both of 3 × 3 taps.

    Args:
        x: (B, T, F), frames of features, padded as the first convolution needs them; float32, bfloat16, float16 or
            float64.
        weight: (C, 1, 3, 3), that of a ``torch.nn.Conv2d(1, C, 3, 2)``; x's dtype, except under autocast, which casts
            as it does for ``torch.nn.functional.conv2d``.
        bias: (C,) or None.
        depthwise_weight: (C, 1, 3, 3), that of a ``torch.nn.Conv2d(C, C, 3, 2, groups=C)``.
        depthwise_bias: (C,) or None.
        mask: (B, H) with H = (T − 1) // 2, bool; False: the frame of the first convolution counts as 0. Padding in time
            of the second convolution is frames of x that the mask excludes.
        left: columns of zeros before those of the first convolution, 1 or 2; behind them there is always one.
    Returns:
        (B, (H − 1) // 2, (W + left) // 2, C) with W = (F − 1) // 2, x's dtype, computed in float32 or better and
        rounded once.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; ``left`` is neither 1 nor 2.
    """
    h = F.conv2d(x.unsqueeze(1), weight, bias, stride=2).relu()
    if mask is not None:
        h = h.masked_fill(~mask[:, None, :, None], 0.0)
    y = F.conv2d(F.pad(h, (left, 1)), depthwise_weight, depthwise_bias, stride=2, groups=weight.shape[0])
    return y.permute(0, 2, 3, 1)
