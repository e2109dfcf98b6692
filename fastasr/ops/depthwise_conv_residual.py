# SPDX-License-Identifier: Apache-2.0
r"""A depthwise convolution over time added to its input: the merge of E-Branchformer (Kim et al., 2022).

For x (B, T, C), K taps, K odd, P = K // 2, and x = 0 outside the sequence:

    y[t] = x[t] + bias + Σ_k weight[k] x[t + k − P]

Upstream: ``EBranchformerEncoderLayer.forward`` of ``espnet2.asr.encoder.e_branchformer_encoder`` and ``Merge`` of
``returnn.frontend.encoder.e_branchformer``, between the concatenation and the projection.

With gradient g: dx[t] = g[t] + Σ_k weight[k] g[t − k + P], dweight[k] = Σ g[t] x[t + k − P], dbias = Σ g.
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._depthwise_conv import depthwise_conv
from fastasr.ops._op import op


@op(
    "cpu triton",
    strides={"x": "channels"},
    backward="grad x weight",
    summary="depthwise convolution over time plus its input: the merge of E-Branchformer's branches",
)
def depthwise_conv_residual(
    x: Annotated[Tensor, "B T C, C >= 1"],
    weight: Annotated[Tensor, "C 1 K | C K, K odd", "wide"],
    bias: Annotated[Tensor, "C", "wide"] | None = None,
) -> Annotated[Tensor, "B T C", "x"]:
    """x plus its depthwise convolution over time, of the same length.

    Args:
        x: (B, T, C); float32, bfloat16, float16 or float64. Contiguous channels are read where they lie, whatever the
            other strides.
        weight: (C, 1, K), that of a ``torch.nn.Conv1d`` with C groups, or (C, K), K odd: the taps, padded with zeros to
            the same length.
        bias: (C,) or None.
    Returns:
        y (B, T, C), contiguous, in x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    past = weight.shape[-1] // 2
    padded = F.pad(x.transpose(1, 2), (past, past))
    z = depthwise_conv(padded, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
    return x + z.transpose(1, 2)
