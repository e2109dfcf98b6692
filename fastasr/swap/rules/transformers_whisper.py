# SPDX-License-Identifier: Apache-2.0
"""Rules for the encoders of transformers' Whisper, Qwen2-Audio, Voxtral, Audio Flamingo 3, MOSS-Transcribe-Diarize and
Speech2Text, which have one code."""

from fastasr.swap.forwards import whisper as models
from fastasr.swap.forwards.common import other_scale
from fastasr.swap.rule import Known, Upstream, check_parts, check_rates, holds
from fastasr.swap.rules import transformers_conformer as conformer
from fastasr.swap.rules.conformer import FROM_5_18, attention_rule, feed_forward_rule
from fastasr.swap.rules.torch import CONVOLUTIONS
from fastasr.swap.rules.transformers_parakeet import ACTIVATIONS, CAPTURING

_PARTS = "self_attn", "self_attn_layer_norm", "activation_fn", "fc1", "fc2", "final_layer_norm"
_BEFORE, _SINCE, _FROM_5_20 = (
    Known(f"transformers {versions}") for versions in ("5.18 to 5.23", "5.24", "5.20 to 5.24")
)


def _attention_structure(module: Upstream) -> str | None:
    if module.is_decoder or module.is_causal:
        return "is part of a decoder"
    return other_scale(module) or check_parts(module, ("q_proj", "k_proj", "v_proj", "out_proj"))


def _layer_structure(module: Upstream) -> str | None:
    reason = holds(*_PARTS, activation_fn=ACTIVATIONS)(module)
    return reason or check_rates(module, ("dropout", "activation_dropout"))


ATTENTION = attention_rule(
    name="transformers.whisper_attention",
    class_name="WhisperAttention",
    forward=models.whisper_attention,
    structure=_attention_structure,
    known={"f136504b8797bded18db77af": _BEFORE, "c0583f1c1e75ae708d71a9a3": _SINCE},
    shared=lambda result: result[0],
    hooks=CAPTURING,
    note=conformer.NOTE,
)

_LAYER = feed_forward_rule(
    name="transformers.whisper_layer",
    class_name="WhisperEncoderLayer",
    forward=models.whisper_layer,
    structure=_layer_structure,
    known={"673deb7eed2b0a52691e3765": FROM_5_18},
    hooks=CAPTURING,
)

# Class -> the fingerprints of its forward, the code of which is Whisper's
_ATTENTIONS = {
    "Qwen2AudioAttention": {"5eaed39753cecae7203db090": FROM_5_18},
    "VoxtralAttention": {"3ee284177e5dc98fd398dadc": FROM_5_18},
    "AudioFlamingo3Attention": {"91ca2006ef7ead19670161c4": _BEFORE, "ccb9a5e325219fb2c9abba45": _SINCE},
    "MossTranscribeDiarizeAudioAttention": {"5a894d1a69bd99b36d87143e": _FROM_5_20},
    "Speech2TextAttention": {"a05d3cdaad7ca31caa1dc921": _SINCE},
}
_LAYERS = {
    "Qwen2AudioEncoderLayer": {"d028dfee4ccfc1be4df94deb": FROM_5_18},
    "VoxtralEncoderLayer": {"65bfc49212d674e6fd33a484": FROM_5_18},
    "AudioFlamingo3EncoderLayer": {"f5e1a95603b2a2e3768c02b3": FROM_5_18},
    "MossTranscribeDiarizeAudioLayer": {"a787d32699a55ec51cbc1552": _FROM_5_20},
    "Speech2TextEncoderLayer": {"6737c9f70144dc995e00a2bd": _SINCE},
}

RULES = (
    ATTENTION,
    _LAYER,
    *(ATTENTION.like(f"transformers.{name}", name, known) for name, known in _ATTENTIONS.items()),
    *(_LAYER.like(f"transformers.{name}", name, known) for name, known in _LAYERS.items()),
    *CONVOLUTIONS,
)
