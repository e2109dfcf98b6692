# SPDX-License-Identifier: Apache-2.0
r"""A depthwise convolution over time added to its input: the merge of E-Branchformer (Kim et al., 2022), the memory of
SANM (Gao et al., "SAN-M", 2020).

For x (B, T, C), K taps, P = K // 2 + delay of them on past frames, and x = 0 at padding and outside the sequence:

    y[t] = x[t] + bias + Σ_k weight[k] x[t + k − P]

Upstream: ``EBranchformerEncoderLayer.forward`` of ``espnet2.asr.encoder.e_branchformer_encoder`` and ``Merge`` of
``returnn.frontend.encoder.e_branchformer``, between the concatenation and the projection; ``forward_fsmn`` of
``funasr.models.sanm.attention``.

With gradient g: dx[t] = g[t] + Σ_k weight[k] g[t − k + P] (0 at padding), dweight[k] = Σ g[t] x[t + k − P], dbias = Σ
g.
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._depthwise_conv import check_delay, depthwise_conv
from fastasr.ops._op import Arguments, Op, op


def _check(op: Op, a: Arguments) -> None:
    check_delay(op, a.weight.shape[-1], a.delay)


@op("cpu triton", strides={"x": "channels"}, backward="grad x weight padding_mask delay", check=_check)
def depthwise_conv_residual(
    x: Annotated[Tensor, "B T C, C >= 1"],
    weight: Annotated[Tensor, "C 1 K | C K, K >= 1", "wide"],
    bias: Annotated[Tensor, "C", "wide"] | None = None,
    *,
    padding_mask: Annotated[Tensor, "B T", bool] | None = None,
    delay: int = 0,
) -> Annotated[Tensor, "B T C", "x"]:
    """x plus its depthwise convolution over time: the merge of E-Branchformer's branches, SANM's memory.

    Args:
        x: (B, T, C); float32, bfloat16, float16 or float64. Contiguous channels are read where they lie, whatever the
            other strides.
        weight: (C, 1, K), that of a ``torch.nn.Conv1d`` with C groups, or (C, K): the taps, padded with zeros to the
            same length.
        bias: (C,) or None.
        padding_mask: (B, T), bool; True where a frame is padding, which counts as 0.
        delay: the convolution sees K // 2 + delay frames of the past; (K − 1) // 2 makes it causal.
    Returns:
        y (B, T, C), contiguous, in x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match; a tap would not reach the frame itself because of delay.
    """
    if padding_mask is not None:
        x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
    taps = weight.shape[-1]
    past = taps // 2 + delay
    padded = F.pad(x.transpose(1, 2), (past, taps - 1 - past))
    z = depthwise_conv(padded, weight.to(x.dtype), bias if bias is None else bias.to(x.dtype))
    return x + z.transpose(1, 2)
