# SPDX-License-Identifier: Apache-2.0
"""Rules for torchaudio's wav2vec 2.0, HuBERT and WavLM (torchaudio/models/wav2vec2/components.py)."""

from collections.abc import Callable

from fastasr.swap.forwards import torchaudio_wav2vec2 as models
from fastasr.swap.forwards import waveforms
from fastasr.swap.rule import Known, Rule, Upstream, check_parts, holds, upstream_class
from fastasr.swap.rules.conformer import attention_rule, feed_forward_rule

_TORCHAUDIO = Known("torchaudio 2.11")
_DRAWS = "in training the kernel draws the dropout of the weights itself, see upstream_draws"
_NORM = "502b2fddb88b60e0ba2037a6"  # its LayerNorm over the channels of (B, C, T)


CONVOLUTION = Rule(
    name="torchaudio.wav2vec2_convolution",
    class_name="ConvLayerBlock",
    forward=models.convolution,
    structure=holds("conv", optional=("layer_norm",), layer_norm=("LayerNorm", {_NORM})),
    kernels=("norm_activation", "batch_norm_activation"),
    known={"47cdcb9fa3f78674e25e5153": _TORCHAUDIO},
)

POSITIONS = Rule(
    name="torchaudio.wav2vec2_positions",
    class_name="ConvolutionalPositionalEmbedding",
    forward=models.positions,
    structure=holds("conv"),
    release=waveforms.release,
    known={"72d35aa01bc7ac8c323b191c": _TORCHAUDIO},
)

ATTENTION = attention_rule(
    name="torchaudio.wav2vec2_attention",
    class_name="SelfAttention",
    forward=models.attention,
    structure=holds("q_proj", "k_proj", "v_proj", "out_proj"),
    known={"88baa0992a10acd7002e3c77": _TORCHAUDIO},
    note=_DRAWS,
)

FEED_FORWARD = feed_forward_rule(
    name="torchaudio.wav2vec2_feed_forward",
    class_name="FeedForward",
    forward=models.feed_forward,
    structure=holds("intermediate_dense", "intermediate_dropout", "output_dense", "output_dropout"),
    known={"ba4c5d238f853b7236c2458d": _TORCHAUDIO},
)


def _wavlm_attention_structure(module: Upstream) -> str | None:
    shape = (1, module.num_heads, 1, 1)
    reason = check_parts(
        module, ("attention", "gru_rel_pos_linear"), {"gru_rel_pos_const": shape}, ("rel_attn_embed",)
    )
    if reason is None and module.attention.in_proj_weight is None:
        reason = "submodule attention has several projections, expected one"
    return reason


def _layers_structure(module: Upstream) -> str | None:
    if any(type(layer.attention).__name__ != "WavLMSelfAttention" for layer in module.layers):
        return "its layers have no bias of positions"
    return holds("pos_conv_embed", "layer_norm", "dropout", "layers")(module)


def _layers_functions(module: Upstream) -> list[Callable]:
    cls = upstream_class(module)
    return [cls.forward, cls.get_intermediate_outputs]


WAVLM_ATTENTION = attention_rule(
    name="torchaudio.wavlm_attention",
    class_name="WavLMSelfAttention",
    forward=models.wavlm_attention,
    structure=_wavlm_attention_structure,
    known={"953b96aade9d8b6a052d31b2": _TORCHAUDIO},
    shared=lambda result: result[0],
    note=_DRAWS,
)

WAVLM_LAYERS = Rule(
    name="torchaudio.wavlm_layers",
    class_name="Transformer",
    forward=models.wavlm_layers,
    methods=(("get_intermediate_outputs", models.wavlm_outputs),),
    structure=_layers_structure,
    functions=_layers_functions,
    known={"98b613a04837e87c1a4a9f51": _TORCHAUDIO},
    companion=True,
)

RULES = (CONVOLUTION, POSITIONS, ATTENTION, FEED_FORWARD, WAVLM_ATTENTION, WAVLM_LAYERS)
