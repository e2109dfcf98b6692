# SPDX-License-Identifier: Apache-2.0
"""Rules for FireRedASR's Conformer and its decoder's attention (fireredasr/models/module)."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from fastasr.swap.forwards import fireredasr as models
from fastasr.swap.forwards import layers
from fastasr.swap.forwards.hidden_state_decoders import firered_layer
from fastasr.swap.rule import (
    Known,
    Upstream,
    check_children,
    check_parts,
    check_sequence,
    holds,
    own_forward,
    unread_child,
    unread_code,
    upstream_class,
)
from fastasr.swap.rules.conformer import (
    attention_rule,
    decoder_layer_rule,
    decoder_rule,
    feed_forward_rule,
    layer_rule,
    norm_convolution_rule,
)

_FIRERED = Known("fireredasr 0.0.2")
_SWISH = {"89208fb66a55805df70fc892"}
_WEIGHTS = {"199227fbb871a18aee42ca29"}
_DECODER_ATTENTION = {"68d531145b9e1fa44dc53e00"}
_SOFTMAX = {"8fe4348975cddc4a62707bfa"}
_MLP = {"12840fd70b288741e8b2514c"}
_DECODER_LAYER: dict[str, Any] = {
    **dict.fromkeys(("self_attn", "cross_attn"), "DecoderMultiHeadAttention"),
    **dict.fromkeys(("self_attn_norm", "cross_attn_norm", "mlp_norm"), nn.LayerNorm),
    "mlp": "PositionwiseFeedForward",
}
_LINEARS = ("w_qs", "w_ks", "w_vs", "fc", "linear_pos")
_NORMS = ("layer_norm_q", "layer_norm_k", "layer_norm_v")


def _attention_structure(module: Upstream) -> str | None:
    shapes = dict.fromkeys(("pos_bias_u", "pos_bias_v"), (module.n_head, module.d_k))
    reason = check_parts(module, (*_LINEARS, *_NORMS, "attention", "dropout"), shapes)
    if reason is None and module.scale != 1.0 / (module.d_k**0.5):
        return f"scale is {module.scale}, expected that of {module.d_k} channels per head"
    return reason or unread_code("attention", module.attention, _functions_of_weights, _WEIGHTS)


def _functions_of_weights(attention: Upstream) -> list[Callable]:
    return [upstream_class(attention).forward_attention]


def _convolution_structure(module: Upstream) -> str | None:
    layers = ("pointwise_conv1", "depthwise_conv", "batch_norm", "swish", "pointwise_conv2")
    reason = check_parts(module, ("pre_layer_norm", *layers, "dropout"))
    if reason is None and module.glu is not F.glu:
        return "glu is not torch's function"
    return reason or unread_child(module, "swish", "Swish", _SWISH)


def _feed_forward_structure(module: Upstream) -> str | None:
    reason = check_parts(module, ("net",))
    layers = (nn.LayerNorm, nn.Linear, nn.Module, nn.Dropout, nn.Linear, nn.Dropout)
    reason = reason or check_sequence(module, "net", layers)
    return reason or unread_child(module.net, "2", "Swish", _SWISH)


def _decoder_layer_structure(module: Upstream) -> str | None:
    reason = check_parts(module, _DECODER_LAYER) or check_children(module, _DECODER_LAYER)
    for name in ("self_attn", "cross_attn"):
        reason = reason or unread_child(module, name, _DECODER_LAYER[name], _DECODER_ATTENTION)
        reason = reason or unread_code("attention", getattr(module, name).attention, own_forward, _SOFTMAX)
    return reason or unread_child(module, "mlp", "PositionwiseFeedForward", _MLP)


RULES = (
    attention_rule(
        name="fireredasr.rel_position_attention",
        class_name="RelPosMultiHeadAttention",
        forward=models.firered_attention,
        structure=_attention_structure,
        known={"c12654357fe14a98bcc91c85": _FIRERED},
        shared=lambda result: result[0],
        note="the weights are not returned",
    ),
    norm_convolution_rule(
        name="fireredasr.convolution",
        class_name="ConformerConvolution",
        forward=models.firered_convolution,
        structure=_convolution_structure,
        known={"f34df7d79e9f56ec7b42530c": _FIRERED},
    ),
    feed_forward_rule(
        name="fireredasr.feed_forward",
        class_name="ConformerFeedForward",
        forward=models.firered_feed_forward,
        structure=_feed_forward_structure,
        known={"8233a08c2c862ad3445d28a8": _FIRERED},
    ),
    decoder_rule(
        name="fireredasr.decoder_attention",
        class_name="DecoderMultiHeadAttention",
        structure=holds("w_qs", "w_ks", "w_vs", "attention", "fc", "dropout"),
        known=dict.fromkeys(_DECODER_ATTENTION, _FIRERED),
    ),
    decoder_layer_rule(
        name="fireredasr.decoder_layer",
        class_name="DecoderLayer",
        forward=firered_layer,
        structure=_decoder_layer_structure,
        known={"22573f965ff856d71df246b8": _FIRERED},
    ),
    layer_rule(
        "fireredasr.block",
        "RelPosEmbConformerBlock",
        layers.firered_layer,
        {"90651f6edfb3a71326735594": _FIRERED},
    ),
)
