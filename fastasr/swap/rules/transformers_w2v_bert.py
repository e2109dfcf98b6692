# SPDX-License-Identifier: Apache-2.0
"""Rules for the attention and the causal convolution of transformers' SeamlessM4T v2 and w2v-BERT 2.0."""

from fastasr.swap.forwards import layers
from fastasr.swap.forwards import transformers_conformer as models
from fastasr.swap.rule import Rule, Upstream, check_parts
from fastasr.swap.rules import transformers_conformer as conformer
from fastasr.swap.rules.conformer import FROM_5_18, attention_rule, layer_rule, norm_convolution_rule
from fastasr.swap.rules.torch import CONVOLUTIONS
from fastasr.swap.rules.transformers_parakeet import CAPTURING

_LINEARS = ("linear_q", "linear_k", "linear_v", "linear_out", "dropout")


def _attention_structure(module: Upstream) -> str | None:
    kind = module.position_embeddings_type
    if kind == "relative":
        return conformer.attention_structure(module)
    if kind != "relative_key":
        return f"position_embeddings_type is {kind!r}, expected 'relative_key' or 'relative'"
    reason = check_parts(module, (*_LINEARS, "distance_embedding"))
    if reason is not None:
        return reason
    rows = module.left_max_position_embeddings + module.right_max_position_embeddings + 1
    found = tuple(module.distance_embedding.weight.shape)
    return None if found == (rows, module.head_size) else f"distance_embedding has shape {found}"


def _convolution_structure(module: Upstream) -> str | None:
    taps, sides = module.depthwise_conv.kernel_size[0], module.depthwise_conv.padding
    if sides != (0,):
        return f"depthwise_conv has padding {sides}, expected (0,): upstream pads by {taps - 1} before it"
    return conformer.seamless_convolution_structure(module, norm="depthwise_layer_norm")


def _attention(class_name: str, name: str, fingerprint: str) -> Rule:
    return attention_rule(
        name=f"transformers.{name}_attention",
        class_name=class_name,
        forward=models.relative_key_attention,
        structure=_attention_structure,
        known={fingerprint: FROM_5_18},
        shared=lambda result: result[0],
        hooks=CAPTURING,
        note=conformer.NOTE,
    )


def _convolution(class_name: str, name: str, fingerprint: str) -> Rule:
    return norm_convolution_rule(
        name=f"transformers.{name}_convolution",
        class_name=class_name,
        forward=models.causal_seamless_convolution,
        structure=_convolution_structure,
        known={fingerprint: FROM_5_18},
    )


def _layer(class_name: str, name: str, fingerprint: str) -> Rule:
    return layer_rule(
        f"transformers.{name}_layer", class_name, layers.seamless_layer, {fingerprint: FROM_5_18}
    )


RULES = (
    _attention("SeamlessM4Tv2ConformerSelfAttention", "seamless_m4t_v2", "f1573bf01792a60cb7538627"),
    _convolution("SeamlessM4Tv2ConformerConvolutionModule", "seamless_m4t_v2", "e8e7abc116bc02fe45bde113"),
    _layer("SeamlessM4Tv2ConformerEncoderLayer", "seamless_m4t_v2", "23016f467e9b8308b0732b96"),
    _attention("Wav2Vec2BertSelfAttention", "w2v_bert", "d993fea23540870359746507"),
    _convolution("Wav2Vec2BertConvolutionModule", "w2v_bert", "a0de805076e3b7d288831de8"),
    _layer("Wav2Vec2BertEncoderLayer", "w2v_bert", "94e4a952bc163022c5f57f66"),
    *CONVOLUTIONS,
)
