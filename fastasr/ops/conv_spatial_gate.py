# SPDX-License-Identifier: Apache-2.0
r"""The convolutional spatial gating unit of cgMLP (Sakuma et al., 2022), as Branchformer and E-Branchformer use it.

For x = (r, g) of shape (B, T, 2C), per frame n = (g − mean g) / √(var g + eps) and u = n ⊙ norm_weight + norm_bias, 0
at padding and outside the sequence; per channel, with K taps and P = K // 2:

    z[t] = bias + Σ_k weight[k] u[t + k − P]        y = r ⊙ act(z)

Upstream: ``ConvolutionalSpatialGatingUnit`` in ``espnet2.asr.layers.cgmlp`` (between its split and its dropout, without
``linear_after_conv``), ``FeedForwardConvGated`` in ``returnn.frontend.encoder.e_branchformer``.

With q = dy ⊙ r ⊙ act'(z): dr = dy ⊙ act(z), du[t] = Σ_k weight[k] q[t − k + P] (0 at padding), dweight[k] = Σ q[t]
u[t + k − P], dbias = Σ q; with d = du ⊙ norm_weight: dg = (d − mean d − n mean(d n)) / √(var g + eps), dnorm_weight =
Σ du ⊙ n, dnorm_bias = Σ du. Only x is saved: backward computes the rows' statistics, u and z again.
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _activation
from fastasr.ops._depthwise_conv import depthwise_conv
from fastasr.ops._op import op


@op("cpu triton", strides={"x": "channels"})
def conv_spatial_gate(
    x: Annotated[Tensor, "B T 2*C, C >= 1"],
    norm_weight: Annotated[Tensor, "C", "wide"],
    norm_bias: Annotated[Tensor, "C", "wide"],
    weight: Annotated[Tensor, "C 1 K | C K, K odd", "wide"],
    bias: Annotated[Tensor, "C", "wide"] | None = None,
    eps: Annotated[float, ">= 0"] = 1e-5,
    *,
    padding_mask: Annotated[Tensor, "B T", bool] | None = None,
    activation: _activation.Activation = "identity",
) -> Annotated[Tensor, "B T C", "x"]:
    """The gating unit of E-Branchformer's cgMLP: r · act(depthwise convolution over time of LayerNorm(g)), x = (r, g).

    Args:
        x: (B, T, 2C), the factor and the gate; float32, bfloat16, float16 or float64. Its channels are read where they
            lie if they are contiguous, whatever the other strides.
        norm_weight, norm_bias: (C,), of the LayerNorm.
        weight: (C, 1, K) or (C, K), K odd: the taps, padded with zeros to the same length.
        bias: (C,), of the convolution.
        eps: added to the variance.
        padding_mask: (B, T), bool; True: the frame is padding, and its normalised gate counts as 0.
        activation: of the gate: "identity", "silu", "relu", "tanh" or "gelu".
    Returns:
        y (B, T, C), contiguous, in x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    r, g = x.chunk(2, dim=-1)
    channels, taps = weight.shape[0], weight.shape[-1]
    u = F.layer_norm(g, (channels,), norm_weight.to(g.dtype), norm_bias.to(g.dtype), eps)
    if padding_mask is not None:
        u = u.masked_fill(padding_mask.unsqueeze(-1), 0.0)
    u = F.pad(u.transpose(1, 2), (taps // 2, taps // 2))
    z = depthwise_conv(u, weight.to(u.dtype), bias if bias is None else bias.to(u.dtype))
    return r * _activation.FUNCTIONS[activation](z.transpose(1, 2))
