# SPDX-License-Identifier: Apache-2.0
"""Encoders whose calls can be recorded while only the forwards of their parts are swapped: fastasr's own, and
upstream's, whose code stays."""

from torch import Tensor, nn

from fastasr.graphs.module import OnRow
from fastasr.models.common.row import Capacity, RowCall
from fastasr.models.fast_conformer import row
from fastasr.models.fast_conformer.encoder import masked
from fastasr.packed_frames import PackedFrames
from fastasr.swap.forwards import nemo_row
from fastasr.swap.rule import Upstream, recorded
from fastasr.swap.rules import espnet_branchformer

_LAYERS = "layers", "encoders", "conformer_layers", "layer_stack", "conformer", "blocks"


def layers(encoder: Upstream) -> list[nn.Module]:
    return next((list(getattr(encoder, name)) for name in _LAYERS if hasattr(encoder, name)), [])


def _why_no_row(encoder: Upstream) -> str | None:
    if not encoder.ragged:
        return "it runs on padding: set its attribute ragged"
    return row.why_not(encoder)


def _packed(
    encoder: Upstream,
    capacity: Capacity,
    input_features: Tensor | PackedFrames,
    attention_mask: Tensor | None = None,
) -> RowCall | str:
    """Returns the call on a row of frames for a call of fastasr's FastConformerEncoder, or why there is none."""

    def finish(hidden: Tensor | PackedFrames) -> tuple[Tensor, Tensor | None]:
        if isinstance(hidden, PackedFrames):
            return hidden
        return hidden, masked(encoder, attention_mask, hidden)

    return row.packed(encoder, capacity, input_features, attention_mask, finish)


_ON_ROWS = {
    "EBranchformerEncoder": espnet_branchformer.ON_ROW,
    "FastConformerEncoder": OnRow(row.encoded, _packed, _why_no_row),
    "ConformerEncoder": OnRow(
        nemo_row.encoded, nemo_row.packed, nemo_row.why_not, nemo_row.is_nemos, nemo_row.without_padding
    ),
}


_RAGGED = {"EBranchformerEncoder": espnet_branchformer.RAGGED}

PADDED = "fastasr has no code that leaves padding out of this encoder"
_TAKES_NO_LENGTHS = "it takes no lengths, so its frames see padding"
IN_A_ROW = "its recordings lie one behind the other already, so its layers see no padding"

# Class -> the frameworks that have one of this name, and why it runs on padding ("": the class or its layers know)
CLASSES = {
    "ConformerEncoder": ("NeMo's, SpeechBrain's, ESPnet's, FireRedASR's and GigaAM's", PADDED),
    "Conformer": ("torchaudio's", PADDED),
    "AudioEncoder": ("openai-whisper's", _TAKES_NO_LENGTHS),
    "AudioFlamingo3Encoder": ("transformers'", PADDED),
    "Data2VecAudioEncoder": ("transformers'", ""),
    "EBranchformerEncoder": ("ESPnet's, and fastasr's own", ""),
    "FastConformerEncoder": ("fastasr's own", ""),
    "FastSpeech2ConformerEncoder": ("transformers'", PADDED),
    "FunAsrNanoEncoder": ("transformers'", PADDED),
    "Gemma3nAudioEncoder": ("transformers'", PADDED),
    "Gemma4AudioModel": ("transformers'", PADDED),
    "GlmAsrEncoder": ("transformers'", _TAKES_NO_LENGTHS),
    "GraniteSpeech5Encoder": ("transformers'", PADDED),
    "GraniteSpeechCTCEncoder": ("transformers'", _TAKES_NO_LENGTHS),
    "GraniteSpeechPlusCTCEncoder": ("transformers'", _TAKES_NO_LENGTHS),
    "LasrEncoder": ("transformers'", PADDED),
    "MimiTransformerModel": ("transformers'", _TAKES_NO_LENGTHS),
    "MossTranscribeDiarizeAudioModel": ("transformers'", _TAKES_NO_LENGTHS),
    "OmniASRAudioModel": ("transformers'", ""),
    "Qwen2AudioEncoder": ("transformers'", PADDED),
    "Nemotron3DiarizationAudioModel": ("transformers'", PADDED),
    "Nemotron3_5TranscribeAsrAudioModel": ("transformers'", PADDED),
    "SEWEncoder": ("transformers'", ""),
    "MoonshineEncoder": ("transformers'", PADDED),
    "MoonshineStreamingEncoder": ("transformers'", PADDED),
    "Qwen2_5OmniAudioEncoder": ("transformers'", IN_A_ROW),
    "Qwen3ASREncoder": ("transformers'", IN_A_ROW),
    "Qwen3OmniMoeAudioEncoder": ("transformers'", IN_A_ROW),
    "Speech2TextEncoder": ("transformers'", PADDED),
    "SeamlessM4TConformerEncoder": ("transformers'", ""),
    "SeamlessM4Tv2ConformerEncoder": ("transformers'", ""),
    "TTSZipformer": ("ZipVoice's", PADDED),
    "TTSZipformerTwoStream": ("ZipVoice's", PADDED),
    "TransformerEncoder": ("NeMo's, ESPnet's and SpeechBrain's", PADDED),
    "VoxtralEncoder": ("transformers'", _TAKES_NO_LENGTHS),
    "Wav2Vec2BertEncoder": ("transformers'", ""),
    "Wav2Vec2ConformerEncoder": ("transformers'", PADDED),
    "WhisperEncoder": ("transformers'", _TAKES_NO_LENGTHS),
    **{
        f"{name}Encoder{norms}": ("transformers'", "")
        for name in ("Hubert", "UniSpeech", "UniSpeechSat", "Wav2Vec2")
        for norms in ("", "StableLayerNorm")
    },
}

RULES = tuple(
    recorded(f"recorded.{name}", name, padded, _RAGGED.get(name), parts=layers, on_row=_ON_ROWS.get(name))
    for name, (_, padded) in CLASSES.items()
)
