# SPDX-License-Identifier: Apache-2.0
"""Zipformer, one file per concept. Yao et al., "Zipformer: A faster and better encoder for automatic speech
recognition", ICLR 2024, https://arxiv.org/abs/2310.11230.

The recogniser around the encoder is in ``fastasr.models.transducer``, its wrappers for ONNX in ``fastasr.export``.
Their public names can also be imported from here.
"""

import importlib

from fastasr.models.common.linear import Linear
from fastasr.models.zipformer.activations import ActivationDropoutAndLinear, SwooshL, SwooshR
from fastasr.models.zipformer.attention import RelPositionMultiheadAttentionWeights
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.bypass import BypassModule
from fastasr.models.zipformer.checkpointing import checkpoint
from fastasr.models.zipformer.chunk_causal_convolution import ChunkCausalDepthwiseConv1d
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
from fastasr.models.zipformer.subsampling import Conv2dSubsampling, ConvNeXt
from fastasr.models.zipformer.whitening import Whiten

# These modules import Zipformer's parts, so their names are looked up at first access instead of imported here.
_ELSEWHERE = ("fastasr.models.transducer", "fastasr.export")

__all__ = [
    "ActivationDropoutAndLinear",
    "AsrModel",
    "AttentionDecoderModel",
    "Balancer",
    "BiasNorm",
    "BypassModule",
    "ChunkCausalDepthwiseConv1d",
    "CompactRelPositionalEncoding",
    "Conv2dSubsampling",
    "ConvNeXt",
    "ConvolutionModule",
    "Decoder",
    "DecoderLayer",
    "DownsampledZipformerEncoder",
    "Dropout2",
    "Dropout3",
    "EncoderWrapper",
    "FeedforwardModule",
    "FloatLike",
    "Identity",
    "Joiner",
    "LabelSmoothingLoss",
    "LimitParamValue",
    "Linear",
    "MultiHeadAttention",
    "NonlinAttention",
    "OnnxCtcModel",
    "OnnxCtcWrapper",
    "OnnxDecoderWrapper",
    "OnnxEncoderWrapper",
    "OnnxJoinerWrapper",
    "OnnxStreamingCtcModel",
    "OnnxStreamingCtcWrapper",
    "OnnxStreamingEncoderWrapper",
    "OnnxStreamingTransducerModel",
    "OnnxTransducerModel",
    "PiecewiseLinear",
    "PositionalEncoding",
    "RelPositionMultiheadAttentionWeights",
    "ScaleGrad",
    "ScaledConv2d",
    "ScaledLinear",
    "ScheduledFloat",
    "SelfAttention",
    "SimpleDownsample",
    "SimpleUpsample",
    "StreamingEncoderWrapper",
    "Swish",
    "SwooshL",
    "SwooshR",
    "SymbolTable",
    "TransformerDecoder",
    "Whiten",
    "Zipformer",
    "ZipformerEncoder",
    "ZipformerEncoderLayer",
    "checkpoint",
    "convert_num_channels",
    "is_module_available",
    "limit_param_value",
    "make_pad_mask",
    "num_tokens",
    "pad_sequences",
    "penalize_abs_values_gt",
    "scale_grad",
    "softmax",
    "stack_states",
    "subsequent_mask",
    "token_ids_to_text",
    "unstack_states",
    "with_loss",
]


def __getattr__(name):
    if name in __all__:
        for place in map(importlib.import_module, _ELSEWHERE):
            if name in place.__all__:
                return getattr(place, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
