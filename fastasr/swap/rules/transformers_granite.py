# SPDX-License-Identifier: Apache-2.0
"""Rules for the Conformers of transformers' Granite Speech 3.3 to 4.1, their Plus, and Granite Speech 5."""

from fastasr.swap.forwards import granite as models
from fastasr.swap.rule import Rule, Upstream, holds, unread_child
from fastasr.swap.rules import transformers_parakeet as parakeet
from fastasr.swap.rules.conformer import FROM_5_18, attention_rule, convolution_rule, feed_forward_rule

# Name -> the fingerprints of its attention, convolution, feed-forward, and of the depthwise convolution inside
_PRINTS = {
    "GraniteSpeech": (
        "cc5254a8daf7e2227605a532", "4fbd1b2fa55a454a5e1dc9ae", "4181122e78e9da916cb00223",
        "ef4498393be4d0c24be384ba",
    ),
    "GraniteSpeechPlus": (
        "d2fb3932829ee5f179f40b20", "e7fe10869056714760dcebc7", "9d053e7f3ed90417fb560cff",
        "0dce4a00203ca1a26f5fa2d7",
    ),
}  # fmt: skip


def _convolution_structure(module: Upstream) -> str | None:
    children = ("norm", "up_conv", "glu", "depth_conv", "silu", "batch_norm", "down_conv", "dropout")
    reason = holds(*children)(module)
    for name, prints in _PRINTS.items():
        reason = reason or unread_child(module, "depth_conv", f"{name}ConformerDepthWiseConv1d", {prints[-1]})
    if reason is None and module.glu.dim != 1:
        return f"submodule glu is {module.glu}, expected GLU(dim=1)"
    return reason


def _attention5_structure(module: Upstream) -> str | None:
    if module.num_key_value_groups != 1:
        return f"num_key_value_groups is {module.num_key_value_groups}, expected 1"
    return holds("q_proj", "k_proj", "v_proj", "o_proj", "rel_pos_emb")(module)


def _rules(name: str, attention: str, convolution: str, feed_forward: str, _: object) -> tuple[Rule, ...]:
    return (
        attention_rule(
            name=f"transformers.{name}_attention",
            class_name=f"{name}ConformerAttention",
            forward=models.granite_speech_attention,
            structure=holds("pre_norm", "to_q", "to_kv", "to_out", "rel_pos_emb", "dropout"),
            known={attention: FROM_5_18},
            hooks=parakeet.CAPTURING,
        ),
        convolution_rule(
            name=f"transformers.{name}_convolution",
            class_name=f"{name}ConformerConvModule",
            forward=models.granite_speech_convolution,
            structure=_convolution_structure,
            known={convolution: FROM_5_18},
        ),
        feed_forward_rule(
            name=f"transformers.{name}_feed_forward",
            class_name=f"{name}ConformerFeedForward",
            forward=models.granite_speech_feed_forward,
            structure=holds("pre_norm", "up_proj", "silu", "dropout", "down_proj"),
            known={feed_forward: FROM_5_18},
        ),
    )


ATTENTION5 = attention_rule(
    name="transformers.granite_speech5_attention",
    class_name="GraniteSpeech5EncoderAttention",
    forward=models.granite_speech5_attention,
    structure=_attention5_structure,
    known={"738ec6ae78e0667af6c0f0f0": FROM_5_18},
    shared=lambda result: result[0],
    note="in training the kernel draws the weights' dropout itself, see upstream_draws",
)
CONVOLUTION5 = convolution_rule(
    name="transformers.granite_speech5_convolution",
    class_name="GraniteSpeech5EncoderConvolutionModule",
    forward=models.granite_speech5_convolution,
    structure=holds("pointwise_lin1", "depthwise_conv", "norm", "pointwise_lin2"),
    known={"dc7857452d902eb170a9092f": FROM_5_18},
)
FEED_FORWARD5 = parakeet.FEED_FORWARD.like(
    "transformers.granite_speech5_feed_forward",
    "GraniteSpeech5EncoderFeedForward",
    {"0b2fd325bffc6a1fb93811be": FROM_5_18},
)

RULES = (
    *(rule for name, prints in _PRINTS.items() for rule in _rules(name, *prints)),
    ATTENTION5,
    CONVOLUTION5,
    FEED_FORWARD5,
)
