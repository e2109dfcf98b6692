# SPDX-License-Identifier: Apache-2.0
"""Rules for transformers' other Conformers: Wav2Vec2Conformer and FastSpeech2Conformer, and for modules of
SeamlessM4T and w2v-BERT that have Wav2Vec2Conformer's code."""

import torch

from fastasr.swap.forwards import layers
from fastasr.swap.forwards import transformers_conformer as models
from fastasr.swap.rule import Known, Upstream, check_parts, holds, unread_child
from fastasr.swap.rules.conformer import (
    FROM_5_18,
    attention_rule,
    convolution_rule,
    feed_forward_rule,
    layer_rule,
)
from fastasr.swap.rules.torch import CONVOLUTIONS
from fastasr.swap.rules.transformers_parakeet import ACTIVATIONS, CAPTURING, convolution_structure

_TRANSFORMERS = Known("transformers 5.6 to 5.24")


NOTE = "the weights are not returned; in training the kernel draws their dropout itself, see upstream_draws"
_DENSE = (
    "intermediate_dense",
    "intermediate_act_fn",
    "intermediate_dropout",
    "output_dense",
    "output_dropout",
)
_LINEARS = ("linear_q", "linear_k", "linear_v", "linear_out", "linear_pos")


def attention_structure(module: Upstream) -> str | None:
    heads, width = module.num_heads, module.linear_q.out_features // module.num_heads
    shapes = dict.fromkeys(("pos_bias_u", "pos_bias_v"), (heads, width))
    return check_parts(module, (*_LINEARS, "dropout"), shapes)


def _wav2vec2_attention_structure(module: Upstream) -> str | None:
    if module.position_embeddings_type != "relative":
        return f"position_embeddings_type is {module.position_embeddings_type!r}, expected 'relative'"
    return attention_structure(module)


def _wav2vec2_convolution_structure(module: Upstream, norm: str = "batch_norm") -> str | None:
    children = ("pointwise_conv1", "glu", "depthwise_conv", norm, "activation", "pointwise_conv2")
    reason = check_parts(module, ("layer_norm", *children, "dropout"))
    reason = reason or unread_child(module, "activation", *ACTIVATIONS)
    if reason is None and (type(module.glu) is not torch.nn.GLU or module.glu.dim != 1):
        return f"submodule glu is {module.glu}, expected GLU(dim=1)"
    return reason


WAV2VEC2_ATTENTION = attention_rule(
    name="transformers.wav2vec2_conformer_attention",
    class_name="Wav2Vec2ConformerSelfAttention",
    forward=models.wav2vec2_attention,
    structure=_wav2vec2_attention_structure,
    known={"3be48be58561286160964bba": Known("transformers 5.17 to 5.24")},
    shared=lambda result: result[0],
    hooks=CAPTURING,
    note=NOTE,
)

FASTSPEECH2_ATTENTION = attention_rule(
    name="transformers.fastspeech2_conformer_attention",
    class_name="FastSpeech2ConformerAttention",
    forward=models.fastspeech2_attention,
    structure=attention_structure,
    known={"7c37bb05d8926df2afba4abb": _TRANSFORMERS},
    shared=lambda result: result[0],
    note=NOTE,
)

WAV2VEC2_CONVOLUTION = convolution_rule(
    name="transformers.wav2vec2_conformer_convolution",
    class_name="Wav2Vec2ConformerConvolutionModule",
    forward=models.wav2vec2_convolution,
    structure=_wav2vec2_convolution_structure,
    known={"f2583fecc7a86abd21a40c2c": _TRANSFORMERS},
)

WAV2VEC2_FEED_FORWARD = feed_forward_rule(
    name="transformers.wav2vec2_conformer_feed_forward",
    class_name="Wav2Vec2ConformerFeedForward",
    forward=models.wav2vec2_feed_forward,
    structure=holds(*_DENSE, intermediate_act_fn=ACTIVATIONS),
    known={"a7e579c30f41d605b3484748": _TRANSFORMERS},
)

FASTSPEECH2_CONVOLUTION = convolution_rule(
    name="transformers.fastspeech2_conformer_convolution",
    class_name="FastSpeech2ConformerConvolutionModule",
    forward=models.fastspeech2_convolution,
    structure=convolution_structure,
    known={"678665bfb3c75f52d4520768": _TRANSFORMERS},
)


def seamless_convolution_structure(module: Upstream, norm: str = "batch_norm") -> str | None:
    if getattr(module.pointwise_conv1, "bias", None) is not None:
        return "pointwise_conv1 has a bias, which padding would add to its neighbours"
    return _wav2vec2_convolution_structure(module, norm)


SEAMLESS_ATTENTION = WAV2VEC2_ATTENTION.like(
    "transformers.seamless_m4t_attention",
    "SeamlessM4TConformerSelfAttention",
    {"30f4f4dfea92885aac1cbe3f": FROM_5_18},
)

SEAMLESS_CONVOLUTION = convolution_rule(
    name="transformers.seamless_m4t_convolution",
    class_name="SeamlessM4TConformerConvolutionModule",
    forward=models.seamless_convolution,
    structure=seamless_convolution_structure,
    known={"d01c2bcc9da4dfcbfefc8604": FROM_5_18},
)

SEAMLESS_LAYER = layer_rule(
    "transformers.seamless_m4t_layer",
    "SeamlessM4TConformerEncoderLayer",
    layers.seamless_layer,
    {"32a2d50d48a0b71aeeb02221": FROM_5_18},
)

# Class -> the fingerprint of its forward, the code of which is Wav2Vec2Conformer's
_FEED_FORWARDS = {
    "SeamlessM4TConformerFeedForward": "aece9ef0e35e6cf4962d6c7e",
    "SeamlessM4Tv2ConformerFeedForward": "1a8813902efe5097bc59dacd",
    "Wav2Vec2BertFeedForward": "7c259bd1671ef63e28af4104",
}
FEED_FORWARDS = tuple(
    WAV2VEC2_FEED_FORWARD.like(f"transformers.{name}", name, {value: FROM_5_18})
    for name, value in _FEED_FORWARDS.items()
)

RULES = (
    WAV2VEC2_ATTENTION,
    WAV2VEC2_CONVOLUTION,
    WAV2VEC2_FEED_FORWARD,
    FASTSPEECH2_ATTENTION,
    FASTSPEECH2_CONVOLUTION,
    SEAMLESS_ATTENTION,
    SEAMLESS_CONVOLUTION,
    SEAMLESS_LAYER,
    *FEED_FORWARDS,
    *CONVOLUTIONS,  # SeamlessM4T's adapter
)
