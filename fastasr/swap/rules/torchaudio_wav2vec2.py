# SPDX-License-Identifier: Apache-2.0
"""Rules for torchaudio's wav2vec 2.0 and HuBERT, and for the convolutions and feed-forward of its WavLM
(torchaudio/models/wav2vec2/components.py)."""

from fastasr.swap.forwards import torchaudio_wav2vec2 as models
from fastasr.swap.rule import Known, Rule, Upstream, check_parts, holds, unread_child
from fastasr.swap.rules.conformer import attention_rule, feed_forward_rule

_TORCHAUDIO = Known("torchaudio 2.11")
_NORM = "502b2fddb88b60e0ba2037a6"  # its LayerNorm over the channels of (B, C, T)


def _convolution_structure(module: Upstream) -> str | None:
    reason = check_parts(module, ("conv",), optional=("layer_norm",))
    return reason or unread_child(module, "layer_norm", "LayerNorm", {_NORM})


CONVOLUTION = Rule(
    name="torchaudio.wav2vec2_convolution",
    class_name="ConvLayerBlock",
    forward=models.convolution,
    structure=_convolution_structure,
    kernels=("norm_activation", "batch_norm_activation"),
    known={"47cdcb9fa3f78674e25e5153": _TORCHAUDIO},
)

POSITIONS = Rule(
    name="torchaudio.wav2vec2_positions",
    class_name="ConvolutionalPositionalEmbedding",
    forward=models.positions,
    structure=holds("conv"),
    known={"72d35aa01bc7ac8c323b191c": _TORCHAUDIO},
)

ATTENTION = attention_rule(
    name="torchaudio.wav2vec2_attention",
    class_name="SelfAttention",
    forward=models.attention,
    structure=holds("q_proj", "k_proj", "v_proj", "out_proj"),
    known={"88baa0992a10acd7002e3c77": _TORCHAUDIO},
    note="in training the kernel draws the dropout of the weights itself, see upstream_draws",
)

FEED_FORWARD = feed_forward_rule(
    name="torchaudio.wav2vec2_feed_forward",
    class_name="FeedForward",
    forward=models.feed_forward,
    structure=holds("intermediate_dense", "intermediate_dropout", "output_dense", "output_dropout"),
    known={"ba4c5d238f853b7236c2458d": _TORCHAUDIO},
)

RULES = (CONVOLUTION, POSITIONS, ATTENTION, FEED_FORWARD)
