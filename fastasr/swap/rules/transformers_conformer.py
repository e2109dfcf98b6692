# SPDX-License-Identifier: Apache-2.0
"""Rules for transformers' other Conformers: Wav2Vec2Conformer and FastSpeech2Conformer."""

import torch

from fastasr.models import conformer as models
from fastasr.swap.rule import Known, Rule, check_child_names, check_parameters, unread_child

_TRANSFORMERS = Known("transformers 5.23")
_SILU = {"bbb3a89cc2c8993670072487"}


def _wav2vec2_convolution_structure(module):
    children = ("pointwise_conv1", "glu", "depthwise_conv", "batch_norm", "activation", "pointwise_conv2")
    reason = check_parameters(module, {}) or check_child_names(module, ("layer_norm", *children, "dropout"))
    reason = reason or unread_child(module, "activation", "SiLUActivation", _SILU)
    if reason is None and (type(module.glu) is not torch.nn.GLU or module.glu.dim != 1):
        return f"submodule glu is {module.glu}, expected GLU(dim=1)"
    return reason


def _fastspeech2_convolution_structure(module):
    children = ("pointwise_conv1", "depthwise_conv", "norm", "activation", "pointwise_conv2")
    reason = check_parameters(module, {}) or check_child_names(module, children)
    return reason or unread_child(module, "activation", "SiLUActivation", _SILU)


def _feed_forward_structure(module):
    children = (
        "intermediate_dense",
        "intermediate_act_fn",
        "intermediate_dropout",
        "output_dense",
        "output_dropout",
    )
    reason = check_parameters(module, {}) or check_child_names(module, children)
    return reason or unread_child(module, "intermediate_act_fn", "SiLUActivation", _SILU)


WAV2VEC2_CONVOLUTION = Rule(
    name="transformers.wav2vec2_conformer_convolution",
    class_name="Wav2Vec2ConformerConvolutionModule",
    forward=models.wav2vec2_convolution,
    kernels=("linear", "gated_depthwise_conv"),
    structure=_wav2vec2_convolution_structure,
    known={"f2583fecc7a86abd21a40c2c": _TRANSFORMERS},
)

WAV2VEC2_FEED_FORWARD = Rule(
    name="transformers.wav2vec2_conformer_feed_forward",
    class_name="Wav2Vec2ConformerFeedForward",
    forward=models.wav2vec2_feed_forward,
    kernels=("linear_activation", "linear"),
    structure=_feed_forward_structure,
    known={"a7e579c30f41d605b3484748": _TRANSFORMERS},
)

FASTSPEECH2_CONVOLUTION = Rule(
    name="transformers.fastspeech2_conformer_convolution",
    class_name="FastSpeech2ConformerConvolutionModule",
    forward=models.fastspeech2_convolution,
    kernels=("linear", "gated_depthwise_conv"),
    structure=_fastspeech2_convolution_structure,
    known={"678665bfb3c75f52d4520768": _TRANSFORMERS},
)

RULES = (WAV2VEC2_CONVOLUTION, WAV2VEC2_FEED_FORWARD, FASTSPEECH2_CONVOLUTION)
