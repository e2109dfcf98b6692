# SPDX-License-Identifier: Apache-2.0
"""Rules for the memory and the feed-forward of transformers' Fun-ASR-Nano."""

from fastasr.swap.forwards import funasr as models
from fastasr.swap.rule import Rule, Upstream, check_parts, holds
from fastasr.swap.rules.conformer import FROM_5_18, feed_forward_rule
from fastasr.swap.rules.transformers_parakeet import ACTIVATIONS


def _memory_structure(module: Upstream) -> str | None:
    if module.conv.kernel_size[0] % 2 == 0:
        return f"conv has {module.conv.kernel_size[0]} taps, expected an odd number"
    return check_parts(module, ("conv", "pad"))


MEMORY = Rule(
    name="transformers.fun_asr_memory",
    class_name="FunAsrNanoFSMN",
    forward=models.fun_asr_memory,
    kernels=("depthwise_conv_residual",),
    structure=_memory_structure,
    known={"b58cbc314547e0eb11669b54": FROM_5_18},
)
FEED_FORWARD = feed_forward_rule(
    name="transformers.fun_asr_feed_forward",
    class_name="FunAsrNanoMLP",
    forward=models.fun_asr_feed_forward,
    structure=holds("activation_fn", "fc1", "fc2", activation_fn=ACTIVATIONS),
    known={"e0a0768230314a0ea5b13f42": FROM_5_18},
)

RULES = (MEMORY, FEED_FORWARD)
