# SPDX-License-Identifier: Apache-2.0
"""Rules for the audio encoder of transformers' Phi-4-multimodal, and for the encoder itself, which gives its layers the
bias of the positions."""

from fastasr.swap.forwards import phi4 as models
from fastasr.swap.rule import Graphed, Rule, Upstream, check_child_names, check_parts, holds, unread_child
from fastasr.swap.rules import recorded
from fastasr.swap.rules.conformer import FROM_5_18, attention_rule, convolution_rule, feed_forward_rule
from fastasr.swap.rules.transformers_parakeet import ACTIVATIONS

_CODE = {
    "Phi4MultimodalAudioConformerEncoderLayer": {"ca7006f6633794673e370e5c"},
    "Phi4MultimodalAudioDepthWiseSeparableConv1d": {"e8f1a6058ea89d942b026dfb"},
    "Phi4MultimodalAudioGluPointWiseConv": {"716762a9bff6b91d1b37dd8f"},
    "Phi4MultimodalAudioRelativeAttentionBias": {"364970c502963da69b78b298"},
    "SiLUActivation": ACTIVATIONS[1],
}
_PARTS = ("embed", "encoder_embedding", "encoders", "relative_attention_bias_layer")


def _unread(module: Upstream, **classes: str) -> str | None:
    reasons = (unread_child(module, name, cls, _CODE[cls]) for name, cls in classes.items())
    return next(filter(None, reasons), None)


def _subsampling_structure(module: Upstream) -> str | None:
    expected = 2 + 3 * (module.sampling_num - 1)
    if len(module.conv) != expected:
        return f"submodule conv has {len(module.conv)} layers, expected {expected}"
    return check_parts(module, ("act_fn", "conv", "out"))


def _convolution_structure(module: Upstream) -> str | None:
    names = ("layer_norm", "glu", "dw_sep_conv_1d", "act", "ext_pw_conv_1d", "dropout")
    glu, separable = module.glu, module.dw_sep_conv_1d
    shape = (1, glu.output_dim, 1)
    return (
        check_parts(module, names)
        or check_parts(glu, ("ext_pw_conv_1d", "glu_act"), {"b1": shape, "b2": shape})
        or check_child_names(separable, ("dw_conv", "pw_conv"))
        or _unread(module, act="SiLUActivation", glu="Phi4MultimodalAudioGluPointWiseConv")
        or _unread(module, dw_sep_conv_1d="Phi4MultimodalAudioDepthWiseSeparableConv1d")
        or _unread(glu, glu_act="SiLUActivation")
    )


def _encoder_structure(module: Upstream) -> str | None:
    reason = check_parts(module, _PARTS)
    if reason is None and module.config.chunk_size > 0:
        reason = f"chunk_size is {module.config.chunk_size}, expected -1: queries see other keys than their neighbours"
    layer = "Phi4MultimodalAudioConformerEncoderLayer"
    reasons = (unread_child(module.encoders, name, layer, _CODE[layer]) for name in module.encoders._modules)
    bias = "Phi4MultimodalAudioRelativeAttentionBias"
    return (
        reason
        or unread_child(module, "relative_attention_bias_layer", bias, _CODE[bias])
        or next(filter(None, reasons), None)
    )


RULES = (
    Rule(
        name="transformers.phi4_subsampling",
        class_name="Phi4MultimodalAudioNemoConvSubsampling",
        forward=models.phi4_subsampling,
        kernels=("conv_subsampling", "linear_activation", "linear"),
        structure=_subsampling_structure,
        known={"c3d771b28703db5e8fbda107": FROM_5_18},
    ),
    attention_rule(
        name="transformers.phi4_attention",
        class_name="Phi4MultimodalAudioAttention",
        forward=models.phi4_attention,
        structure=holds("q_proj", "k_proj", "v_proj", "o_proj"),
        known={"b2152b4f7df28a5d05aaec32": FROM_5_18},
        note="padding is not hidden: upstream adds its mask to the scores as 0 and 1; "
        "in training the kernel draws the dropout of its weights itself, see upstream_draws",
    ),
    convolution_rule(
        name="transformers.phi4_convolution",
        class_name="Phi4MultimodalAudioConvModule",
        forward=models.phi4_convolution,
        kernels=("linear", "gated_depthwise_conv", "linear_activation"),
        structure=_convolution_structure,
        known={"5f7ad552406dde7839c5c6e4": FROM_5_18},
    ),
    feed_forward_rule(
        name="transformers.phi4_feed_forward",
        class_name="Phi4MultimodalAudioMLP",
        forward=models.phi4_feed_forward,
        structure=holds("layer_norm", "act_fn", "gate_up_proj", "down_proj", "dropout", act_fn=ACTIVATIONS),
        known={"1f6200083efe67a043268247": FROM_5_18},
    ),
    Rule(
        name="transformers.phi4_encoder",
        class_name="Phi4MultimodalAudioModel",
        forward=models.phi4_encoder,
        structure=_encoder_structure,
        known={"540c4ad419aea3d5b22ce712": FROM_5_18},
        companion=True,
        padded="its attention does not hide padding, but adds 1 to scores",
        graphs=Graphed(parts=recorded.layers),
    ),
)
