# SPDX-License-Identifier: Apache-2.0
"""The rule for the attention with memory of FunASR's encoders: Paraformer, SenseVoice, Fun-ASR-Nano. Their feed-forward
is ESPnet's."""

from fastasr.swap.forwards import funasr as models
from fastasr.swap.rule import Known, holds
from fastasr.swap.rules.conformer import attention_rule

_FUNASR = Known("funasr 1.4.16")


RULES = (
    attention_rule(
        name="funasr.sanm_attention",
        class_name="MultiHeadedAttentionSANM",
        forward=models.sanm_attention,
        kernels=("linear", "rel_attention", "depthwise_conv_residual"),
        structure=holds("linear_out", "linear_q_k_v", "dropout", "fsmn_block", "pad_fn"),
        known={"b26517b78f79bdcaaf70541a": _FUNASR},
        note="in training the kernel draws the dropout of the weights itself, see upstream_draws",
    ),
)
