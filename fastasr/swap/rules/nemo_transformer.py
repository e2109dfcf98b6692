# SPDX-License-Identifier: Apache-2.0
"""Rules for NeMo's TransformerEncoder (nemo/collections/asr/modules/transformer_encoder.py), and for the attention of
its decoders (nemo/collections/asr/modules/transformer), as Canary's."""

import torch

from fastasr.swap.forwards import nemo as models
from fastasr.swap.rule import Known, Upstream, check_parts, check_sequence
from fastasr.swap.rules.conformer import attention_rule, decoder_rule, feed_forward_rule

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

_PARTS = "query_net", "key_net", "value_net", "out_projection", "attn_dropout", "layer_dropout"


def _decoder_structure(module: Upstream) -> str | None:
    if not module.return_xatt_scores:
        return "is a decoder's attention to its own tokens"
    return check_parts(module, _PARTS)


DECODER = decoder_rule(
    name="nemo.decoder_attention",
    class_name="MultiHeadAttention",
    structure=_decoder_structure,
    known={"d0b5e227522be4c057eafb14": _NEMO},
)

RULES = (ATTENTION, FEED_FORWARD, DECODER)
