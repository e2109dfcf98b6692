# SPDX-License-Identifier: Apache-2.0
"""Zipformer, one file per concept. Yao et al., "Zipformer: A faster and better encoder for automatic speech
recognition", ICLR 2024, https://arxiv.org/abs/2310.11230.

The recogniser around the encoder is in ``fastasr.asr.recogniser``, its wrappers for ONNX in ``fastasr.asr.export``.
"""

from fastasr.models.common.linear import Linear
from fastasr.models.zipformer.activations import ActivationDropoutAndLinear, SwooshL, SwooshR
from fastasr.models.zipformer.attention import RelPositionMultiheadAttentionWeights
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.bypass import BypassModule
from fastasr.models.zipformer.checkpointing import checkpoint
from fastasr.models.zipformer.chunk_causal_convolution import ChunkCausalDepthwiseConv1d
from fastasr.models.zipformer.convnext import ConvNeXt
from fastasr.models.zipformer.convolution import ConvolutionModule
from fastasr.models.zipformer.dropout import Dropout2, Dropout3
from fastasr.models.zipformer.encoder import Zipformer, convert_num_channels
from fastasr.models.zipformer.feed_forward import FeedforwardModule
from fastasr.models.zipformer.gradient_scale import ScaleGrad, penalize_abs_values_gt, scale_grad, with_loss
from fastasr.models.zipformer.identity import Identity
from fastasr.models.zipformer.initial_scale import ScaledConv2d, ScaledLinear
from fastasr.models.zipformer.installed import is_module_available
from fastasr.models.zipformer.layer import ZipformerEncoderLayer
from fastasr.models.zipformer.nonlin_attention import NonlinAttention
from fastasr.models.zipformer.normalization import BiasNorm
from fastasr.models.zipformer.parameter_limits import LimitParamValue, limit_param_value
from fastasr.models.zipformer.positional_encoding import CompactRelPositionalEncoding
from fastasr.models.zipformer.resampling import SimpleDownsample, SimpleUpsample
from fastasr.models.zipformer.schedules import FloatLike, PiecewiseLinear, ScheduledFloat
from fastasr.models.zipformer.self_attention import SelfAttention
from fastasr.models.zipformer.softmax import softmax
from fastasr.models.zipformer.stack import DownsampledZipformerEncoder, ZipformerEncoder
from fastasr.models.zipformer.stream_states import stack_states, unstack_states
from fastasr.models.zipformer.subsampling import Conv2dSubsampling
from fastasr.models.zipformer.whitening import Whiten

__all__ = [
    "ActivationDropoutAndLinear",
    "Balancer",
    "BiasNorm",
    "BypassModule",
    "ChunkCausalDepthwiseConv1d",
    "CompactRelPositionalEncoding",
    "Conv2dSubsampling",
    "ConvNeXt",
    "ConvolutionModule",
    "DownsampledZipformerEncoder",
    "Dropout2",
    "Dropout3",
    "FeedforwardModule",
    "FloatLike",
    "Identity",
    "LimitParamValue",
    "Linear",
    "NonlinAttention",
    "PiecewiseLinear",
    "RelPositionMultiheadAttentionWeights",
    "ScaleGrad",
    "ScaledConv2d",
    "ScaledLinear",
    "ScheduledFloat",
    "SelfAttention",
    "SimpleDownsample",
    "SimpleUpsample",
    "SwooshL",
    "SwooshR",
    "Whiten",
    "Zipformer",
    "ZipformerEncoder",
    "ZipformerEncoderLayer",
    "checkpoint",
    "convert_num_channels",
    "is_module_available",
    "limit_param_value",
    "penalize_abs_values_gt",
    "scale_grad",
    "softmax",
    "stack_states",
    "unstack_states",
    "with_loss",
]
