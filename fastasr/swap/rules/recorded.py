# SPDX-License-Identifier: Apache-2.0
"""Encoders whose calls can be recorded while only the forwards of their parts are swapped: fastasr's own, and
upstream's, whose code stays."""

from torch import nn

from fastasr.swap.rule import Upstream, recorded


def _layers(encoder: Upstream) -> list[nn.Module]:
    names = "layers", "encoders", "conformer_layers"
    return next((list(getattr(encoder, name)) for name in names if hasattr(encoder, name)), [])


def _why_not(encoder: Upstream) -> str | None:
    ragged = getattr(encoder, "ragged", False)
    return "it runs without padding, in another shape at every call" if ragged else None


# Class -> the frameworks that have one of this name
CLASSES = {
    "ConformerEncoder": "NeMo's, SpeechBrain's and ESPnet's",
    "Conformer": "torchaudio's",
    "EBranchformerEncoder": "ESPnet's, and fastasr's own",
    "FastConformerEncoder": "fastasr's own",
    "FastSpeech2ConformerEncoder": "transformers'",
}

RULES = tuple(recorded(f"recorded.{name}", name, why_not=_why_not, parts=_layers) for name in CLASSES)
