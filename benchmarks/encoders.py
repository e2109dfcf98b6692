# SPDX-License-Identifier: Apache-2.0
"""Speech encoders of other packages by name: a published configuration's width, a chosen number of its layers, random
weights, and a batch of inputs. ``fastasr swap NAME`` and the benchmark "encoders" take them from here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastasr._nearest import nearest_or_all
from fastasr.benchmarks import upstream

# The shortest recording of a batch has this share of the frames of the longest.
SHORTEST = 0.8


@dataclass(frozen=True)
class Encoder:
    """An encoder, which ``make(layers)`` returns. ``arguments(x, valid)`` names the arguments of a call: features x
    (batch, frames, ``channels``), ``rate`` frames per second, and bools, False where a recording has ended."""

    about: str
    layers: int  # of the published model
    rate: float
    channels: int
    make: Callable[[int], nn.Module]
    arguments: Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]

    def model(self, layers: int) -> nn.Module:
        """Returns the encoder in evaluation mode. Raises ``upstream.MissingUpstream``."""
        torch.manual_seed(0)
        return self.make(layers).eval()

    def inputs(self, batch: int, seconds: float) -> dict[str, Any]:
        """Returns the arguments of a call on recordings, of which the longest has these seconds."""
        frames = max(1, round(self.rate * seconds))
        lengths = torch.linspace(frames, SHORTEST * frames, batch).long()
        x = torch.randn(batch, frames, self.channels, generator=torch.Generator().manual_seed(1))
        return self.arguments(x, torch.arange(frames) < lengths[:, None])


def find(name: str) -> Encoder:
    """Returns the encoder of this name. Raises ValueError, with the nearest names."""
    if name not in ENCODERS:
        raise ValueError(f"no encoder is called {name!r}{nearest_or_all(name, list(ENCODERS))}")
    return ENCODERS[name]


def _transformers(
    class_name: str, config_name: str, number: str = "num_hidden_layers", attention: str = "sdpa", **sizes
) -> Callable[[int], nn.Module]:
    """Returns a maker of an encoder of transformers; ``number`` is the configuration's name for the number of layers,
    and an encoder that has no public name is ``folder.Class``."""

    def make(layers: int) -> nn.Module:
        package = upstream.module("transformers")
        folder, _, name = class_name.rpartition(".")
        home = upstream.module(f"transformers.models.{folder}.modeling_{folder}") if folder else package
        try:
            made, config = getattr(home, name), getattr(package, config_name)
        except AttributeError as missing:
            raise upstream.MissingUpstream(
                f"transformers {package.__version__} has no such encoder: {missing}"
            ) from None
        settings = config(**{number: layers}, **sizes)
        settings._attn_implementation = attention
        return made(settings)

    return make


def _named(features: str, mask: str | None = "attention_mask", dtype: torch.dtype = torch.long):
    def arguments(x: torch.Tensor, valid: torch.Tensor) -> dict[str, Any]:
        return {features: x} if mask is None else {features: x, mask: valid.to(dtype)}

    return arguments


def _waveform(x: torch.Tensor, valid: torch.Tensor) -> dict[str, Any]:
    return {"input_values": x.squeeze(-1).masked_fill(~valid, 0.0), "attention_mask": valid.long()}


def _windows(x: torch.Tensor, valid: torch.Tensor) -> dict[str, Any]:
    """Whisper's argument: windows of 30 s, which the recordings begin and zeros fill."""
    features = x.masked_fill(~valid.unsqueeze(-1), 0.0).transpose(1, 2)
    return {"input_features": nn.functional.pad(features, (0, 3000 - x.shape[1]))}


def _channels_first(mask: str | None = None, every: int = 1) -> Callable:
    """Returns the arguments of transformers' encoders of Whisper's features. ``mask``: of every ``every``-th frame."""

    def arguments(x: torch.Tensor, valid: torch.Tensor) -> dict[str, Any]:
        given = {"input_features": x.transpose(1, 2).contiguous()}
        return given if mask is None else given | {mask: valid[:, ::every].long()}

    return arguments


def _in_a_row(x: torch.Tensor, valid: torch.Tensor) -> dict[str, Any]:
    """The arguments of Qwen Omni's audio towers."""
    return {"input_features": x[valid].t().contiguous(), "feature_lens": valid.sum(1)}


def _in_whole_seconds(x: torch.Tensor, valid: torch.Tensor) -> dict[str, Any]:
    """The arguments of Qwen3-ASR's encoder."""
    more = -x.shape[1] % 100
    x, valid = nn.functional.pad(x, (0, 0, 0, more)), nn.functional.pad(valid, (0, more))
    return _channels_first("input_features_mask")(x, valid)


def _lengths(x: torch.Tensor, valid: torch.Tensor) -> dict[str, Any]:
    """The arguments of NeMo and GigaAM."""
    return {"audio_signal": x.transpose(1, 2).contiguous(), "length": valid.sum(1)}


def _flow(x: torch.Tensor, valid: torch.Tensor) -> dict[str, Any]:
    """ZipVoice's arguments: a step of the flow for each recording."""
    return {"x": x, "t": torch.linspace(0.2, 0.8, len(x)), "padding_mask": ~valid}


def _nemo_transformer(layers: int) -> nn.Module:
    module = upstream.module("nemo.collections.asr.modules.transformer_encoder")
    return module.TransformerEncoder(feat_in=80, d_model=512, n_heads=8, n_layers=layers)


def _nemo_conformer(layers: int) -> nn.Module:
    module = upstream.module("nemo.collections.asr.modules.conformer_encoder")
    return module.ConformerEncoder(
        feat_in=80, n_layers=layers, d_model=512, n_heads=8, subsampling="striding"
    )


def _e_branchformer(layers: int) -> nn.Module:
    module = upstream.module("espnet2.asr.encoder.e_branchformer_encoder")
    sizes = {"cgmlp_linear_units": 3072, "linear_units": 1024, "use_ffn": True, "macaron_ffn": True}
    return module.EBranchformerEncoder(
        80, output_size=512, attention_heads=8, num_blocks=layers, input_layer="conv2d", **sizes
    )


def _firered(layers: int) -> nn.Module:
    module = upstream.module("fireredasr.models.module.conformer_encoder")
    return module.ConformerEncoder(idim=80, n_layers=layers, n_head=20, d_model=1280)


def _gigaam(layers: int) -> nn.Module:
    module = upstream.module("gigaam.encoder")
    return module.ConformerEncoder(feat_in=64, n_layers=layers, d_model=768, self_attention_model="rel_pos")


def _zipvoice(layers: int) -> nn.Module:
    """ZipVoice's decoder has five stacks; ``layers`` are in each."""
    module = upstream.module("zipvoice.models.modules.zipformer")
    return module.TTSZipformer(
        in_dim=300,
        out_dim=100,
        downsampling_factor=(1, 2, 4, 2, 1),
        num_encoder_layers=(layers,) * 5,
        cnn_module_kernel=(31, 15, 7, 15, 31),
        encoder_dim=512,
        feedforward_dim=1536,
        num_heads=4,
        query_head_dim=32,
        pos_head_dim=4,
        value_head_dim=12,
        pos_dim=48,
        use_time_embed=True,
        time_embed_dim=192,
    )


# Name -> what it is; layers, frames per second and channels; the maker; the arguments
_ENCODERS: dict[str, tuple[str, tuple[int, float, int], Callable, Callable]] = {
    "granite-speech-4": (
        "IBM Granite Speech 3.3 to 4.1", (16, 50, 160),
        _transformers("granite_speech.GraniteSpeechCTCEncoder", "GraniteSpeechEncoderConfig", "num_layers"),
        _named("hidden_states", None),
    ),
    "granite-speech-5": (
        "IBM Granite Speech 5.0", (16, 50, 320),
        _transformers("GraniteSpeech5Encoder", "GraniteSpeech5EncoderConfig"),
        _named("input_features", dtype=torch.bool),
    ),
    "w2v-bert-2": (
        "w2v-BERT 2.0, also the semantic encoder of X-Codec 2 and NeuCodec", (24, 50, 160),
        _transformers("Wav2Vec2BertModel", "Wav2Vec2BertConfig", layerdrop=0.0),
        _named("input_features"),
    ),
    "seamless-m4t-v1": (
        "SeamlessM4T's speech encoder", (24, 50, 160),
        _transformers(
            "seamless_m4t.SeamlessM4TSpeechEncoder", "SeamlessM4TConfig", "speech_encoder_layers",
            speech_encoder_layerdrop=0.0,
        ),
        _named("input_features"),
    ),
    "seamless-m4t-v2": (
        "SeamlessM4T v2's speech encoder", (24, 50, 160),
        _transformers(
            "seamless_m4t_v2.SeamlessM4Tv2SpeechEncoder", "SeamlessM4Tv2Config", "speech_encoder_layers",
            speech_encoder_layerdrop=0.0,
        ),
        _named("input_features"),
    ),
    "lasr": (
        "LASR, MedASR's encoder", (17, 100, 128),
        _transformers("LasrEncoder", "LasrEncoderConfig", layerdrop=0.0),
        _named("input_features", dtype=torch.bool),
    ),
    "phi-4": (
        "Phi-4-multimodal's audio encoder", (24, 100, 80),
        _transformers(
            "phi4_multimodal.Phi4MultimodalAudioModel", "Phi4MultimodalAudioConfig", "num_blocks"
        ),
        _named("hidden_states", "mask", torch.bool),
    ),
    "gemma-3n": (
        "Gemma 3n's audio tower", (12, 100, 128),
        _transformers(
            "gemma3n.Gemma3nAudioEncoder", "Gemma3nAudioConfig", "conf_num_hidden_layers", "eager"
        ),
        lambda x, valid: {"audio_mel": x, "audio_mel_mask": ~valid},
    ),
    "gemma-4": (
        "Gemma 4's audio tower", (12, 100, 128),
        _transformers("Gemma4AudioModel", "Gemma4AudioConfig", attention="eager"),
        _named("input_features", dtype=torch.bool),
    ),
    "wavlm-large": (
        "WavLM large, behind its convolutions on the waveform", (24, 50, 1024),
        _transformers(
            "wavlm.WavLMEncoderStableLayerNorm", "WavLMConfig", attention="eager", hidden_size=1024,
            num_attention_heads=16, intermediate_size=4096, do_stable_layer_norm=True, layerdrop=0.0,
        ),
        _named("hidden_states", dtype=torch.bool),
    ),
    "hubert-large": (
        "HuBERT large with its convolutions on the waveform", (24, 16000, 1),
        _transformers(
            "HubertModel", "HubertConfig", hidden_size=1024, num_attention_heads=16, intermediate_size=4096,
            do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True, layerdrop=0.0,
            apply_spec_augment=False,
        ),
        _waveform,
    ),
    "wav2vec2-base": (
        "wav2vec 2.0 base with its convolutions on the waveform, which has no mask", (12, 16000, 1),
        _transformers("Wav2Vec2Model", "Wav2Vec2Config", layerdrop=0.0, apply_spec_augment=False),
        lambda x, valid: {"input_values": _waveform(x, valid)["input_values"]},
    ),
    "whisper-large-v3": (
        "Whisper large v3's encoder, which computes 30 s for every recording", (32, 100, 128),
        _transformers(
            "whisper.WhisperEncoder", "WhisperConfig", "encoder_layers", d_model=1280,
            encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128,
        ),
        _windows,
    ),
    "qwen3-asr": (
        "Qwen3-ASR's encoder", (24, 100, 128),
        _transformers("Qwen3ASREncoder", "Qwen3ASREncoderConfig", "encoder_layers"),
        _in_whole_seconds,
    ),
    "qwen2.5-omni": (
        "Qwen2.5-Omni's audio encoder", (32, 100, 128),
        _transformers(
            "qwen2_5_omni.Qwen2_5OmniAudioEncoder", "Qwen2_5OmniAudioEncoderConfig", "encoder_layers"
        ),
        _in_a_row,
    ),
    "qwen3-omni": (
        "Qwen3-Omni's audio encoder", (32, 100, 128),
        _transformers(
            "qwen3_omni_moe.Qwen3OmniMoeAudioEncoder", "Qwen3OmniMoeAudioEncoderConfig", "encoder_layers"
        ),
        _in_a_row,
    ),
    "glm-asr": (
        "GLM-ASR-Nano's encoder", (32, 100, 128),
        _transformers("GlmAsrEncoder", "GlmAsrEncoderConfig"),
        _channels_first(),
    ),
    "moonshine": (
        "Moonshine tiny's encoder", (6, 16000, 1),
        _transformers("moonshine.MoonshineEncoder", "MoonshineConfig", "encoder_num_hidden_layers"),
        _waveform,
    ),
    "voxtral-realtime": (
        "Voxtral Realtime's encoder", (32, 100, 128),
        _transformers("VoxtralRealtimeEncoder", "VoxtralRealtimeEncoderConfig", use_cache=False),
        _channels_first("attention_mask", 2),
    ),
    "moonshine-streaming": (
        "Moonshine Streaming tiny's encoder", (6, 16000, 1),
        _transformers("moonshine_streaming.MoonshineStreamingEncoder", "MoonshineStreamingEncoderConfig"),
        _waveform,
    ),
    "fun-asr-nano": (
        "Fun-ASR-Nano's encoder", (70, 100 / 6, 560),
        _transformers("FunAsrNanoEncoder", "FunAsrNanoEncoderConfig"),
        _named("input_features", "input_features_mask"),
    ),
    "nemo-transformer": ("NeMo's TransformerEncoder", (17, 100, 80), _nemo_transformer, _lengths),
    "nemo-conformer": (
        "NeMo's Conformer with a front end of the kind striding", (18, 100, 80), _nemo_conformer, _lengths,
    ),
    "e-branchformer": (
        "ESPnet's E-Branchformer, as for LibriSpeech", (17, 100, 80), _e_branchformer,
        lambda x, valid: {"xs_pad": x, "ilens": valid.sum(1)},
    ),
    "fireredasr": (
        "FireRedASR-AED-L's encoder", (16, 100, 80), _firered,
        lambda x, valid: {"padded_input": x, "input_lengths": valid.sum(1)},
    ),
    "gigaam": ("GigaAM's encoder with relative positions", (16, 100, 64), _gigaam, _lengths),
    "zipvoice": ("ZipVoice's flow-matching decoder", (16, 93.75, 300), _zipvoice, _flow),
}  # fmt: skip
ENCODERS = {name: Encoder(about, *sizes, *more) for name, (about, sizes, *more) in _ENCODERS.items()}
