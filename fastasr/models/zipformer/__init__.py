# SPDX-License-Identifier: Apache-2.0
"""Zipformer, one file per concept. Yao et al., "Zipformer: A faster and better encoder for automatic speech
recognition", ICLR 2024, https://arxiv.org/abs/2310.11230."""

from fastasr.models.zipformer.activations import ActivationDropoutAndLinear, SwooshL, SwooshR
from fastasr.models.zipformer.attention import RelPositionMultiheadAttentionWeights
from fastasr.models.zipformer.bypass import BypassModule
from fastasr.models.zipformer.convolution import ConvolutionModule
from fastasr.models.zipformer.linear import Linear
from fastasr.models.zipformer.normalization import BiasNorm
from fastasr.models.zipformer.parameter_limits import limit_param_value
from fastasr.models.zipformer.subsampling import Conv2dSubsampling, ConvNeXt

__all__ = [
    "ActivationDropoutAndLinear",
    "BiasNorm",
    "BypassModule",
    "Conv2dSubsampling",
    "ConvNeXt",
    "ConvolutionModule",
    "Linear",
    "RelPositionMultiheadAttentionWeights",
    "SwooshL",
    "SwooshR",
    "limit_param_value",
]
