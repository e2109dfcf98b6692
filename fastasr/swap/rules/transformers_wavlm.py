# SPDX-License-Identifier: Apache-2.0
"""Rules for the attention and feed-forward of transformers' WavLM, and for its encoders, which hand on the bias of the
positions."""

from fastasr.swap.forwards import wavlm as models
from fastasr.swap.rule import Graphed, Known, Rule, Upstream, check_parameters, check_parts
from fastasr.swap.rules import recorded
from fastasr.swap.rules import transformers_conformer as conformer
from fastasr.swap.rules.conformer import FROM_5_18, attention_rule
from fastasr.swap.rules.transformers_parakeet import CAPTURING

_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "gru_rel_pos_linear")


def _attention_structure(module: Upstream) -> str | None:
    shape = (1, module.num_heads, 1, 1)
    return check_parts(module, _LINEARS, {"gru_rel_pos_const": shape}, ("rel_attn_embed",))


def _encoder(class_name: str, before: str, since: str) -> Rule:
    return Rule(
        name="transformers.wavlm_encoder",
        class_name=class_name,
        forward=models.wavlm_encoder,
        structure=lambda module: check_parameters(module, {}),
        known={before: Known("transformers 5.18 to 5.22"), since: Known("transformers 5.23 and 5.24")},
        companion=True,
        hooks=CAPTURING,
        padded=recorded.PADDED,
        graphs=Graphed(parts=recorded.layers),
    )


RULES = (
    attention_rule(
        name="transformers.wavlm_attention",
        class_name="WavLMAttention",
        forward=models.wavlm_attention,
        structure=_attention_structure,
        known={"290e82d442e78478b7f73df7": FROM_5_18},
        shared=lambda result: result[0],
        hooks=CAPTURING,
        note=conformer.NOTE,
    ),
    conformer.WAV2VEC2_FEED_FORWARD.like(
        "transformers.wavlm_feed_forward", "WavLMFeedForward", {"5f06b8bcab1e5f9fea3a0652": FROM_5_18}
    ),
    _encoder("WavLMEncoder", "4e448eda3b4bcf5b478d38c9", "e348898eda752e7285561ae0"),
    _encoder("WavLMEncoderStableLayerNorm", "1ec3385e8eb3f91aabe95a8c", "2b140dcf24d3ace4e3659f98"),
)
