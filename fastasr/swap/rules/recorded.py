# SPDX-License-Identifier: Apache-2.0
"""Encoders whose calls can be recorded while only the forwards of their parts are swapped: fastasr's own, and
upstream's, whose code stays."""

from torch import nn

from fastasr.swap.rule import Upstream, recorded

_LAYERS = "layers", "encoders", "conformer_layers", "layer_stack", "conformer"


def layers(encoder: Upstream) -> list[nn.Module]:
    return next((list(getattr(encoder, name)) for name in _LAYERS if hasattr(encoder, name)), [])


def _why_not(encoder: Upstream) -> str | None:
    ragged = getattr(encoder, "ragged", False)
    return "it runs without padding, in another shape at every call" if ragged else None


PADDED = "fastasr has no code that leaves padding out of this encoder"

# Class -> the frameworks that have one of this name, and why it runs on padding ("": the class or its layers know)
CLASSES = {
    "ConformerEncoder": ("NeMo's, SpeechBrain's, ESPnet's, FireRedASR's and GigaAM's", PADDED),
    "Conformer": ("torchaudio's", PADDED),
    "EBranchformerEncoder": ("ESPnet's, and fastasr's own", PADDED),
    "FastConformerEncoder": ("fastasr's own", ""),
    "FastSpeech2ConformerEncoder": ("transformers'", PADDED),
    "FunAsrNanoEncoder": ("transformers'", PADDED),
    "Gemma3nAudioEncoder": ("transformers'", PADDED),
    "Gemma4AudioModel": ("transformers'", PADDED),
    "GraniteSpeech5Encoder": ("transformers'", PADDED),
    "GraniteSpeechCTCEncoder": ("transformers'", "it takes no lengths, so its frames see padding"),
    "GraniteSpeechPlusCTCEncoder": ("transformers'", "it takes no lengths, so its frames see padding"),
    "LasrEncoder": ("transformers'", PADDED),
    "SeamlessM4TConformerEncoder": ("transformers'", ""),
    "SeamlessM4Tv2ConformerEncoder": ("transformers'", ""),
    "TTSZipformer": ("ZipVoice's", PADDED),
    "TTSZipformerTwoStream": ("ZipVoice's", PADDED),
    "TransformerEncoder": ("NeMo's", PADDED),
    "Wav2Vec2BertEncoder": ("transformers'", ""),
    "Wav2Vec2ConformerEncoder": ("transformers'", PADDED),
}

RULES = tuple(
    recorded(f"recorded.{name}", name, padded, why_not=_why_not, parts=layers)
    for name, (_, padded) in CLASSES.items()
)
