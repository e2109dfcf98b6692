# SPDX-License-Identifier: Apache-2.0
"""Rules for the attention of transformers' decoders to an encoder's frames, which beams share in ``generate``. For
Moonshine's the rule of its encoder does so, which has the same class."""

from fastasr.swap.forwards.transformers_beams import cross_attention
from fastasr.swap.rule import Known, Rule, Upstream, check_parts
from fastasr.swap.rules.torch import CONVOLUTIONS
from fastasr.swap.rules.transformers_parakeet import CAPTURING
from fastasr.swap.rules.transformers_whisper import ATTENTION

_READ = Known("transformers 5.24")


def _structure(module: Upstream) -> str | None:
    if module.is_causal:
        return "is a decoder's attention to its own tokens"
    if not getattr(module, "is_decoder", True):
        return "is part of an encoder"
    last = "out_proj" if hasattr(module, "out_proj") else "o_proj"
    return check_parts(module, ("q_proj", "k_proj", "v_proj", last))


_WHISPER = Rule(
    name="transformers.whisper_cross_attention",
    class_name=ATTENTION.class_name,
    forward=cross_attention,
    structure=_structure,
    known=ATTENTION.known,
    hooks=CAPTURING,
    note="upstream's code, in generate once for all beams of a recording",
)
# Class -> the fingerprint of its forward
_OTHERS = {
    "Speech2TextAttention": "a05d3cdaad7ca31caa1dc921",
    "MoonshineStreamingAttention": "3afab8c0ec7839766a1deb5a",
    "SeamlessM4TAttention": "3c1b27ae0015785f275d804c",
    "SeamlessM4Tv2Attention": "af7f648ec1112b7ed0ecb4c0",
    "CanaryCrossAttention": "9e8101643967773d0d122e37",
    "CohereAsrCrossAttention": "9370c62c0aaf1ae79f9bd29d",
}
RULES = (
    _WHISPER,
    *(_WHISPER.like(f"transformers.{name}_cross", name, {code: _READ}) for name, code in _OTHERS.items()),
    *CONVOLUTIONS,
)
