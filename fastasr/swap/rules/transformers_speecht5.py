# SPDX-License-Identifier: Apache-2.0
"""Rules for the encoder of transformers' SpeechT5, whose feed-forward its decoder has too."""

from fastasr.swap.forwards import speecht5 as models
from fastasr.swap.rule import Known, Upstream, check_parts
from fastasr.swap.rules import transformers_conformer as conformer
from fastasr.swap.rules.conformer import attention_rule

_READ = Known("transformers 5.24")


def _attention_structure(module: Upstream) -> str | None:
    if module.is_decoder:
        return "is part of a decoder"
    return check_parts(module, ("q_proj", "k_proj", "v_proj", "out_proj"))


RULES = (
    attention_rule(
        name="transformers.speecht5_attention",
        class_name="SpeechT5Attention",
        forward=models.speecht5_attention,
        structure=_attention_structure,
        known={"3b41805d87dec0effd9de3b4": _READ},
        shared=lambda result: result[0],
        note="in inference; the weights are not returned",
    ),
    conformer.WAV2VEC2_FEED_FORWARD.like(
        "transformers.speecht5_feed_forward", "SpeechT5FeedForward", {"1f91594d4f983c355e38c82b": _READ}
    ),
)
