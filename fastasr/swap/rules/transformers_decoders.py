# SPDX-License-Identifier: Apache-2.0
"""Rules for the layers of transformers' decoders, of which native calls compute a token, and for their attention to an
encoder's frames, which beams share in ``generate``. Moonshine's attention has the class, and so the rule, of its
encoder's."""

from fastasr.swap.forwards.decoder_layer import decoder_layer, names_of
from fastasr.swap.forwards.decoder_step import STEPS
from fastasr.swap.forwards.transformers_beams import cross_attention
from fastasr.swap.rule import Known, Rule, Upstream, check_parts, upstream_class
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

# Parts that do nothing in inference
_SEAMLESS = "activation_fn", "attn_dropout", "ffn_dropout"


def _layer_structure(module: Upstream) -> str | None:
    idle = _SEAMLESS if upstream_class(module).__name__.startswith("Seamless") else ()
    return check_parts(module, {*idle, *names_of(module).children()})


_LAYER = Rule(
    name="transformers.whisper_decoder_layer",
    class_name="WhisperDecoderLayer",
    forward=decoder_layer,
    structure=_layer_structure,
    known={"c7de05bf8b0a5adfca6b586d": _READ},
    hooks=CAPTURING,
    shallow=True,
    release=STEPS.release,
    note="on a CPU one token after the prompt in two native calls, else upstream's code",
)
_LAYERS = {
    "Speech2TextDecoderLayer": "7da92d453de82e964da7c5c4",
    "SeamlessM4TDecoderLayer": "7d31de4992fafa184017a042",
    "SeamlessM4Tv2DecoderLayer": "896a62e7b0fb65366ae101c0",
    "CanaryDecoderLayer": "848f92648dd2e8e737ccfc89",
    "CohereAsrDecoderLayer": "add578d353bab35c4faccc88",
    "MoonshineDecoderLayer": "0c564c832d38e33b15297f40",
    "MoonshineStreamingDecoderLayer": "9d98ba2483493a358204e4f0",
}
RULES = (
    _WHISPER,
    _LAYER,
    *(_WHISPER.like(f"transformers.{name}_cross", name, {code: _READ}) for name, code in _OTHERS.items()),
    *(_LAYER.like(f"transformers.{name}", name, {code: _READ}) for name, code in _LAYERS.items()),
    *CONVOLUTIONS,
)
