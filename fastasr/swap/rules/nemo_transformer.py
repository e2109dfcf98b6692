# SPDX-License-Identifier: Apache-2.0
"""Rules for NeMo's TransformerEncoder (nemo/collections/asr/modules/transformer_encoder.py), and for its decoders'
layers and attention (nemo/collections/asr/modules/transformer), as Canary's."""

from typing import Any

import torch

from fastasr.swap.forwards import nemo as models
from fastasr.swap.forwards.hidden_state_decoders import nemo_layer
from fastasr.swap.rule import Known, Upstream, check_children, check_parts, check_sequence, unread_child
from fastasr.swap.rules.conformer import attention_rule, decoder_layer_rule, decoder_rule, feed_forward_rule

_NEMO = Known("nemo_toolkit 3.0")


def _attention_structure(module: Upstream) -> str | None:
    if not getattr(module, "_uses_rel_pos", False):  # as of NeMo's Conformer with absolute positions
        return "has no relative positions"
    shapes = dict.fromkeys(("pos_bias_u", "pos_bias_v"), (module.n_heads, module.head_dim))
    norms = ("q_norm", "k_norm") if module.qk_norm else ()
    return check_parts(module, ("w_qkv", "out_proj", "linear_pos", *norms), shapes)


def _feed_forward_structure(module: Upstream) -> str | None:
    layers = torch.nn.Linear, torch.nn.GELU, torch.nn.Dropout, torch.nn.Linear, torch.nn.Dropout
    reason = check_parts(module, ("net",))
    return reason or check_sequence(module, "net", [(kind, torch.nn.Module) for kind in layers])


ATTENTION = attention_rule(
    name="nemo.transformer_attention",
    class_name="MultiHeadAttention",
    forward=models.nemo_transformer_attention,
    structure=_attention_structure,
    known={"8f34364df7ac27cbb0f16b93": _NEMO},
    note="on a CPU it trains, which upstream's FlexAttention cannot",
)

FEED_FORWARD = feed_forward_rule(
    name="nemo.transformer_feed_forward",
    class_name="FeedForward",
    forward=models.nemo_transformer_feed_forward,
    structure=_feed_forward_structure,
    known={"86f338468c3c8d09995b8f5c": _NEMO},
)

_DECODER_ATTENTION = {"d0b5e227522be4c057eafb14"}
_PARTS = "query_net", "key_net", "value_net", "out_projection", "attn_dropout", "layer_dropout"


def _decoder_structure(module: Upstream) -> str | None:
    if not module.return_xatt_scores:
        return "is a decoder's attention to its own tokens"
    return check_parts(module, _PARTS)


DECODER = decoder_rule(
    name="nemo.decoder_attention",
    class_name="MultiHeadAttention",
    structure=_decoder_structure,
    known=dict.fromkeys(_DECODER_ATTENTION, _NEMO),
)

_LAYER: dict[str, Any] = {
    **dict.fromkeys(("first_sub_layer", "second_sub_layer"), "MultiHeadAttention"),
    "third_sub_layer": "PositionWiseFF",
    **dict.fromkeys(("layer_norm_1", "layer_norm_2", "layer_norm_3"), torch.nn.LayerNorm),
}
_DECODER_FEED_FORWARD = {"7ad99cbaec7eaef4085f9288"}


def _layer_structure(module: Upstream) -> str | None:
    reason = check_parts(module, _LAYER) or check_children(module, _LAYER)
    for name in ("first_sub_layer", "second_sub_layer"):
        reason = reason or unread_child(module, name, _LAYER[name], _DECODER_ATTENTION)
    return reason or unread_child(module, "third_sub_layer", "PositionWiseFF", _DECODER_FEED_FORWARD)


DECODER_LAYER = decoder_layer_rule(
    name="nemo.decoder_layer",
    class_name="TransformerDecoderBlock",
    forward=nemo_layer,
    structure=_layer_structure,
    known={"7a90e6002bd8beb35d7d6af4": _NEMO},
)

RULES = (ATTENTION, FEED_FORWARD, DECODER, DECODER_LAYER)
