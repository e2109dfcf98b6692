# SPDX-License-Identifier: Apache-2.0
"""Rules for ESPnet's E-Branchformer encoder (espnet2/asr/encoder/e_branchformer_encoder.py).

ESPnet's Conformer, Branchformer and Transformer use the same classes for attention, feed-forward and cgMLP, so these
rules recognise them there as well.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from fastasr.graphs.module import OnRow
from fastasr.models import e_branchformer as models
from fastasr.models.e_branchformer import row
from fastasr.swap.forwards import espnet, front_ends
from fastasr.swap.forwards.hidden_state_decoders import espnet_encoder_layer, espnet_layer
from fastasr.swap.forwards.searches import search
from fastasr.swap.rule import (
    Known,
    Ragged,
    Rule,
    Upstream,
    check_children,
    check_ints,
    check_parts,
    holds,
    own_forward,
    unread_child,
    unread_code,
    upstream_forward,
)
from fastasr.swap.rules.conformer import convolution_rule, decoder_layer_rule, feed_forward_rule

_ESPNET = Known("espnet 202511")

_SWISH = "Swish", {"89208fb66a55805df70fc892"}  # x sigmoid(x)
_LAYER_NORM = "LayerNorm", {"5405c51d4c0d397a26eb042d"}  # torch's, over the dimension ``dim``

_PLAIN_ATTENTION = {"fab753438155fad4412bd29b"}
_FEED_FORWARD = {"a832391b864ae7c1dd5108ee"}
_ENCODER = {"f5a95ea11fcf2729daf156e3"}
_POSITIONS = {"0d5ecf9134ceab875981e16c"}
_FRONTS = {  # the end of the name of ESPnet's Conv2dSubsampling
    "": "564c87ccbce83f48a7bfb606",
    "1": "30094f6a8bd4c0724db53f4f",
    "2": "8b79634dd32bbed41ab72b02",
    "6": "1b9d9f7300d8ae9f7a1d950e",
    "8": "a0cc4ae754f53da9151c9551",  # it may put embeddings in front of the frames: upstream's code runs
}

_CONVOLUTIONS = ("pointwise_conv1", "depthwise_conv", "norm", "activation", "pointwise_conv2")
_DECODER_LAYER: dict[str, Any] = {
    "self_attn": "MultiHeadedAttention",
    "src_attn": "MultiHeadedAttention",
    "feed_forward": "PositionwiseFeedForward",
    **dict.fromkeys(("norm1", "norm2", "norm3"), "LayerNorm"),
    "dropout": nn.Dropout,
}
_ENCODER_LAYER = {name: kind for name, kind in _DECODER_LAYER.items() if name not in ("src_attn", "norm3")}
_ATTENTION = ("linear_q", "linear_k", "linear_v", "linear_out", "dropout", "q_norm", "k_norm")


def _plain_attention_structure(module: Upstream) -> str | None:
    return check_ints(module, ("h", "d_k")) or check_parts(module, _ATTENTION)


def _attention_structure(module: Upstream) -> str | None:
    reason = check_ints(module, ("h", "d_k"))
    biases = dict.fromkeys(("pos_bias_u", "pos_bias_v"), (module.h, module.d_k))
    reason = reason or check_parts(module, (*_ATTENTION, "linear_pos"), biases)
    if reason is None and not isinstance(module.zero_triu, bool):
        return f"zero_triu is {module.zero_triu!r}, expected a bool"
    return reason


def _gate_structure(module: Upstream) -> str | None:
    linear = () if module.linear is None else ("linear",)
    reason = check_parts(module, ("norm", "conv", "act", "dropout", *linear))
    reason = reason or unread_child(module, "norm", *_LAYER_NORM)
    return reason or unread_child(module, "act", *_SWISH)


def _layer_structure(module: Upstream) -> str | None:
    blocks = {"feed_forward": "norm_ff", "feed_forward_macaron": "norm_ff_macaron"}
    there = [name for pair in blocks.items() if getattr(module, pair[0]) is not None for name in pair]
    always = ("attn", "cgmlp", "norm_mha", "norm_mlp", "norm_final", "dropout")
    reason = check_parts(module, (*always, *there, "depthwise_conv_fusion", "merge_proj"))
    if reason is None and not isinstance(module.ff_scale, float):
        reason = f"ff_scale is {module.ff_scale!r}, expected a float"
    return reason


def _decoder_layer_structure(module: Upstream) -> str | None:
    reason = check_parts(module, _DECODER_LAYER) or check_children(module, _DECODER_LAYER)
    if reason is None and module.concat_after:
        return "concatenates the input and the result of its attentions"
    for name in ("self_attn", "src_attn"):
        reason = reason or unread_child(module, name, _DECODER_LAYER[name], _PLAIN_ATTENTION)
        if reason is None and not _projects_alone(getattr(module, name)):
            return f"{name} normalises queries or keys"
    return reason or unread_child(module, "feed_forward", "PositionwiseFeedForward", _FEED_FORWARD)


def _encoder_layer_structure(module: Upstream) -> str | None:
    reason = check_parts(module, _ENCODER_LAYER) or check_children(module, _ENCODER_LAYER)
    if reason is None and module.concat_after:
        return "concatenates the input and the result of its attention"
    reason = reason or unread_child(module, "self_attn", "MultiHeadedAttention", _PLAIN_ATTENTION)
    if reason is None and not _projects_alone(module.self_attn):
        return "self_attn normalises queries or keys"
    return reason or unread_child(module, "feed_forward", "PositionwiseFeedForward", _FEED_FORWARD)


def _projects_alone(attention: Upstream) -> bool:
    return all(type(norm) is nn.Identity for norm in (attention.q_norm, attention.k_norm))


ATTENTION = Rule(
    name="espnet.rel_position_attention",
    class_name="RelPositionMultiHeadedAttention",
    forward=models.RelPositionMultiHeadedAttention.forward,
    kernels=("linear", "rel_attention"),
    structure=_attention_structure,
    known={"ea6c9473802a263c615bac55": _ESPNET},
    caches={"attn": None},
    note="the weights are not kept in attn; in training the kernel draws their dropout itself, see upstream_draws",
)

PLAIN_ATTENTION = replace(
    ATTENTION,
    name="espnet.attention",
    class_name="MultiHeadedAttention",
    forward=espnet.espnet_attention,
    structure=_plain_attention_structure,
    known=dict.fromkeys(_PLAIN_ATTENTION, _ESPNET),
)

GATE = Rule(
    name="espnet.convolutional_spatial_gating_unit",
    class_name="ConvolutionalSpatialGatingUnit",
    forward=models.ConvolutionalSpatialGatingUnit.forward,
    kernels=("conv_spatial_gate",),
    structure=_gate_structure,
    known={"9d8eaa82bb4cdd60dd0e94c9": _ESPNET},
)

GATING_MLP = Rule(
    name="espnet.convolutional_gating_mlp",
    class_name="ConvolutionalGatingMLP",
    forward=models.FeedForwardConvGated.forward,
    kernels=("linear_activation", "linear"),
    structure=holds("channel_proj1", "csgu", "channel_proj2"),
    known={"8b8ff5185f9ecabcf556351c": _ESPNET},
)

CONVOLUTION = convolution_rule(
    name="espnet.conformer_convolution",
    class_name="ConvolutionModule",
    forward=espnet.espnet_convolution,
    structure=holds(*_CONVOLUTIONS, activation=_SWISH),
    known={"2f808e0e85acb8c584f3c13a": _ESPNET},
)

FEED_FORWARD = feed_forward_rule(
    name="espnet.positionwise_feed_forward",
    class_name="PositionwiseFeedForward",
    forward=models.PositionwiseFeedForward.forward,
    structure=holds("w_1", "w_2", "dropout", "activation", activation=_SWISH),
    known=dict.fromkeys(_FEED_FORWARD, _ESPNET),
)

DECODER_LAYER = decoder_layer_rule(
    name="espnet.decoder_layer",
    class_name="DecoderLayer",
    forward=espnet_layer,
    structure=_decoder_layer_structure,
    known={"bf9ee7d1a7d96dd1f1b87cd0": _ESPNET},
)

ENCODER_LAYER = decoder_layer_rule(
    name="espnet.encoder_layer",
    class_name="EncoderLayer",
    forward=espnet_encoder_layer,
    structure=_encoder_layer_structure,
    known={"d0ab0a0ac8365af84cfc8107": _ESPNET},
    note="a language model's, in a swapped search on a CPU one token in two native calls, else upstream's code",
)

SEARCH = Rule(
    name="espnet.beam_search",
    class_name="BeamSearch",
    forward=search,
    structure=lambda module: None,
    known={"e1683361868b36613c7b34f6": _ESPNET},
    shallow=True,
    note="upstream's search, while which language models keep keys and values",
)

LAYER = Rule(
    name="espnet.e_branchformer_layer",
    class_name="EBranchformerEncoderLayer",
    forward=models.EBranchformerLayer.forward,
    kernels=("add_norm", "add_two_norms", "depthwise_conv_residual", "linear"),
    structure=_layer_structure,
    known={"bb5379a9603330ac13ff54f3": _ESPNET},
)


def _without_padding(self: Upstream, *args: Any, **kwargs: Any) -> Any:
    found = row.without_padding(self, *args, **kwargs)
    return upstream_forward(self, *args, **kwargs) if found is None else found


def _why_no_row(encoder: Upstream) -> str | None:
    """Returns why ESPnet's encoder, or ours, cannot run on a row, or None."""
    if isinstance(encoder, models.EBranchformerEncoder):
        return row.why_not(encoder) if encoder.ragged else "it runs on padding: set its attribute ragged"
    reason = row.why_not(encoder) or unread_code("EBranchformerEncoder", encoder, own_forward, _ENCODER)
    front = encoder.embed
    if reason is None and hasattr(front, "conv"):
        reason = unread_code("embed", front, own_forward, _FRONTS.values())
    return reason or unread_code("positions", row.positions_of(encoder), own_forward, _POSITIONS)


RAGGED = Ragged(_without_padding, _why_no_row)
ON_ROW = OnRow(row.encoded, row.packed, _why_no_row)

SUBSAMPLINGS = tuple(
    Rule(
        name=f"espnet.conv2d{end}_subsampling",
        class_name=f"Conv2dSubsampling{end}",
        forward=front_ends.espnet_subsampling(f"conv2d{end}"),
        kernels=("linear",),
        structure=holds("conv", "out"),
        known={value: _ESPNET},
        note="on a CPU its convolutions are matrix products",
    )
    for end, value in _FRONTS.items()
    if end != "8"
)

RULES = (
    *SUBSAMPLINGS,
    LAYER,
    ATTENTION,
    PLAIN_ATTENTION,
    GATING_MLP,
    GATE,
    CONVOLUTION,
    FEED_FORWARD,
    DECODER_LAYER,
    ENCODER_LAYER,
    SEARCH,
    SEARCH.like("espnet.batch_beam_search", "BatchBeamSearch", {"a3f228dface0c7598ef9b270": _ESPNET}),
)
