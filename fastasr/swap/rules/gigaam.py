# SPDX-License-Identifier: Apache-2.0
"""Rules for GigaAM's Conformer (gigaam/encoder.py), whose modules have NeMo's formulas."""

from fastasr.swap.forwards import front_ends, layers
from fastasr.swap.forwards import nemo as models
from fastasr.swap.rule import Known, Rule, Upstream, check_parts, holds
from fastasr.swap.rules.conformer import attention_rule, convolution_rule, feed_forward_rule, layer_rule

_GIGAAM = Known("gigaam 0.1.0")
_LINEARS = ("linear_q", "linear_k", "linear_v", "linear_out", "linear_pos")
_CONVOLUTIONS = ("pointwise_conv1", "depthwise_conv", "batch_norm", "activation", "pointwise_conv2")


def _attention_structure(module: Upstream) -> str | None:
    shapes = dict.fromkeys(("pos_bias_u", "pos_bias_v"), (module.h, module.d_k))
    return check_parts(module, _LINEARS, shapes)


def _rotary_structure(module: Upstream) -> str | None:
    return "flash_attn is on" if module.flash_attn else check_parts(module, _LINEARS[:-1])


RULES = (
    attention_rule(
        name="gigaam.rel_position_attention",
        class_name="RelPositionMultiHeadAttention",
        forward=models.gigaam_attention,
        structure=_attention_structure,
        known={"7bd2cd9da5881a3520137ec8": _GIGAAM},
    ),
    attention_rule(
        name="gigaam.rotary_attention",
        class_name="RotaryPositionMultiHeadAttention",
        forward=models.gigaam_rotary_attention,
        structure=_rotary_structure,
        known={"7775f2878ae9b8b705845f9f": _GIGAAM},
    ),
    convolution_rule(
        name="gigaam.convolution",
        class_name="ConformerConvolution",
        forward=models.gigaam_convolution,
        structure=holds(*_CONVOLUTIONS),
        known={"09ab8b26d28a124936029083": _GIGAAM},
    ),
    feed_forward_rule(
        name="gigaam.feed_forward",
        class_name="ConformerFeedForward",
        forward=models.gigaam_feed_forward,
        structure=holds("linear1", "activation", "linear2"),
        known={"0feedc15a25203509e8aa7a7": _GIGAAM},
        note="",  # it has no dropout
    ),
    Rule(
        name="gigaam.striding_subsampling",
        class_name="StridingSubsampling",
        forward=front_ends.gigaam_subsampling,
        kernels=("linear",),
        structure=holds("conv", "out"),
        known={"0fe7ec94cb0eff73dd9615a2": _GIGAAM},
        note="on a CPU its convolutions are matrix products",
    ),
    layer_rule("gigaam.layer", "ConformerLayer", layers.gigaam_layer, {"5ca9e8f5aaca6eefe131c1f8": _GIGAAM}),
)
