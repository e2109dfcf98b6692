# SPDX-License-Identifier: Apache-2.0
"""Tiny encoders of transformers whose layers are a Transformer's: Whisper, wav2vec 2.0 and WavLM with their
convolutions on the waveform, audio towers, and their copies. ``tests/families.py`` says what a maker returns."""

import importlib
import itertools

import pytest
import torch
from steps import maker, numbers

WIDTH, HIDDEN, HEADS = 16, 32, 2


class Encoders(torch.nn.Module):
    """Several encoders that take the same input. Their outputs lie one behind the other."""

    def __init__(self, encoders):
        super().__init__()
        self.encoders = torch.nn.ModuleList(encoders)

    def forward(self, x, **masks):
        # The encoders of wav2vec 2.0 set padding to 0 in their input.
        return torch.cat([encoder(x.clone(), **masks).last_hidden_state for encoder in self.encoders], 1)


def batch(lengths, width):
    """Returns frames of recordings (B, T, width), and which of them exist, bool (B, T)."""
    x = torch.randn(len(lengths), max(lengths), width, generator=numbers(1))
    return x, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def transformers_encoder(folder, class_name, config_name, sizes, implementation="sdpa", **options):
    transformers = pytest.importorskip("transformers")
    package, _, name = folder.rpartition(".")
    module = pytest.importorskip(f"transformers.models.{package or name}.modeling_{name}")
    config = getattr(transformers, config_name)(**sizes | options)
    config._attn_implementation = implementation
    return getattr(module, class_name)(config)


# Names of the sizes: Whisper's and those of its copies that have other ones
_OF_WHISPER = "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"
_RATES = "dropout", "activation_dropout"
_OF_COPIES = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
WHISPERS = {
    "whisper": ("WhisperEncoder", "WhisperConfig", _OF_WHISPER),
    "qwen2_audio": ("Qwen2AudioEncoder", "Qwen2AudioEncoderConfig", _OF_WHISPER),
    "voxtral": ("VoxtralEncoder", "VoxtralEncoderConfig", _OF_COPIES),
    "moss_transcribe_diarize": (
        "MossTranscribeDiarizeAudioModel",
        "MossTranscribeDiarizeAudioConfig",
        _OF_COPIES,
    ),
    "audioflamingo3": ("AudioFlamingo3Encoder", "AudioFlamingo3EncoderConfig", _OF_COPIES),
}


@maker
def whisper(*folders, layers=1, frames=24, lengths=None, **options):
    """Encoders of Whisper and its copies. ``lengths``: those of the recordings, which Audio Flamingo 3 alone takes."""
    rates = dict.fromkeys(_RATES, 0.1)
    more = {"num_mel_bins": 5, "max_source_positions": frames // 2} | rates | options
    encoders = []
    for folder in folders:
        class_name, config_name, names = WHISPERS[folder]
        sizes = dict(zip(names, (WIDTH, layers, HEADS, HIDDEN), strict=True))
        encoders.append(transformers_encoder(folder, class_name, config_name, sizes, **more))
    batch = 2 if lengths is None else len(lengths)
    x = torch.randn(batch, 5, frames, generator=numbers(1))
    given = {}
    if lengths is not None:
        given["input_features_mask"] = torch.arange(frames) < torch.tensor(lengths)[:, None]
    if len(encoders) == 1:
        return encoders[0], lambda model: [model(x, **given).last_hidden_state]
    return Encoders(encoders), lambda model: [model(x, **given)]


@maker
def speech2text(lengths=(43, 30, 9), masked=True, **options):
    """Speech2Text's encoder, which has no other attention than "eager" and halves the frames twice."""
    sizes = dict(zip(_OF_WHISPER, (WIDTH, 2, HEADS, HIDDEN), strict=True))
    sizes |= {"input_feat_per_channel": 8, "conv_channels": 12} | dict.fromkeys(_RATES, 0.1)
    names = "speech_to_text", "Speech2TextEncoder", "Speech2TextConfig"
    model = transformers_encoder(
        *names, sizes, **{"implementation": "eager", "encoder_layerdrop": 0.0} | options
    )
    x, mask = batch(lengths, 8)
    given = {"attention_mask": mask.long()} if masked else {}
    return model, lambda model: [model(x, **given).last_hidden_state]


@maker
def speecht5(lengths=(21, 13, 5), masked=True, **options):
    """SpeechT5's encoder behind its front end. Recordings of more than 8 frames have clamped positions."""
    sizes = {"hidden_size": WIDTH, "encoder_layers": 2, "encoder_attention_heads": HEADS}
    sizes |= {"encoder_ffn_dim": HIDDEN, "encoder_max_relative_position": 8, "encoder_layerdrop": 0.0}
    sizes |= {"num_conv_pos_embedding_groups": 2, "attention_dropout": 0.0}
    names = "speecht5", "SpeechT5Encoder", "SpeechT5Config"
    model = transformers_encoder(*names, sizes, **{"implementation": "eager"} | options)
    x, mask = batch(lengths, WIDTH)
    given = {"attention_mask": mask} if masked else {}
    return model, lambda model: [model(x, **given).last_hidden_state]


_WAV2VEC2 = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "attention_dropout": 0.0,
}
WAV2VEC2S = ("Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat", "SEW", "Data2VecAudio")


@maker
def wav2vec2(*names, norms=("",), layers=1, lengths=(21, 13, 5), masked=True, **options):
    """Encoders of wav2vec 2.0 and its copies. ``norms``: "StableLayerNorm" for those of large models, with norms before
    each part, or ""."""
    sizes = _WAV2VEC2 | {"num_hidden_layers": layers}
    if "Data2VecAudio" in names:
        sizes |= {"conv_pos_kernel_size": 3}
    encoders = []
    for name, norm in itertools.product(names, norms):
        folder = "data2vec.data2vec_audio" if name == "Data2VecAudio" else _folder(name)
        if not norm or name not in ("SEW", "Data2VecAudio"):
            class_name = f"{name}Encoder{norm}"
            encoders.append(transformers_encoder(folder, class_name, f"{name}Config", sizes, **options))
    x, mask = batch(lengths, WIDTH)
    given = {"attention_mask": mask} if masked else {}
    if len(encoders) == 1:
        return encoders[0], lambda model: [model(x.clone(), **given).last_hidden_state]
    return Encoders(encoders), lambda model: [model(x, **given)]


def _folder(name):
    """Returns the package of transformers' model of this name."""
    folders = {"UniSpeechSat": "unispeech_sat", "Wav2Vec2Conformer": "wav2vec2_conformer", "SEWD": "sew_d"}
    return folders.get(name, name.lower())


@maker
def omniasr(lengths=(80, 61, 44), **options):
    """OmniASR's encoder with its convolutions on the waveform."""
    sizes = _WAV2VEC2 | {
        "num_hidden_layers": 2,
        "conv_dim": (4, 6),
        "conv_kernel": (4, 2),
        "conv_stride": (2, 2),
    }
    names = "omniasr", "OmniASRAudioModel", "OmniASRAudioConfig"
    model = transformers_encoder(*names, sizes, **options)
    x = torch.randn(len(lengths), 1, max(lengths), generator=numbers(1))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return model, lambda model: [model(x, padding_mask=mask).last_hidden_state]


@maker
def wavlm(stable=False, lengths=(21, 13, 5), masked=True, **options):
    """An encoder of WavLM. ``stable``: the large model's, with norms before each part."""
    sizes = _WAV2VEC2 | {"num_hidden_layers": 3, "num_buckets": 8, "max_bucket_distance": 10}
    class_name = "WavLMEncoderStableLayerNorm" if stable else "WavLMEncoder"
    model = transformers_encoder("wavlm", class_name, "WavLMConfig", sizes, "eager", **options)
    x, mask = batch(lengths, WIDTH)
    given = {"attention_mask": mask} if masked else {}
    # Upstream sets padding to 0 in its input.
    return model, lambda model: [model(x.clone(), **given).last_hidden_state]


WAVEFORMS = (*WAV2VEC2S, "WavLM", "Wav2Vec2Conformer", "SEWD", "SpeechT5")


class Waveforms(torch.nn.Module):
    """Feature encoders, which read recordings, and convolutions that make positions, which read frames."""

    def __init__(self, features, positions):
        super().__init__()
        self.features, self.positions = torch.nn.ModuleList(features), torch.nn.ModuleList(positions)

    def forward(self, waveform, x):
        read = [encoder(waveform) for encoder in self.features]
        # SEW's take channels first
        return read + [layer(x.mT if "SEW" in type(layer).__name__ else x) for layer in self.positions]


@maker
def waveforms(*names, norms=("group", "layer"), samples=150, batch=2, **options):
    """Convolutions on the waveform, with a norm over time in the first layer or norms over channels in all."""
    transformers = pytest.importorskip("transformers")
    features, positions = [], []
    for name in names:
        folder = "data2vec.data2vec_audio" if name == "Data2VecAudio" else _folder(name)
        package, _, module = folder.rpartition(".")
        home = importlib.import_module(f"transformers.models.{package or module}.modeling_{module}")
        for norm in norms[:1] if name == "Data2VecAudio" else norms:
            sizes = {"conv_dim": (16, 12, 20), "conv_kernel": (4, 3, 2), "conv_stride": (2, 2, 2)}
            config = getattr(transformers, f"{name}Config")(
                feat_extract_norm=norm, **sizes | _WAV2VEC2 | options
            )
            features.append(getattr(home, f"{name}FeatureEncoder")(config))
        if name != "Data2VecAudio":
            positions.append(getattr(home, f"{name}PositionalConvEmbedding")(config))
    waveform = torch.randn(batch, samples, generator=numbers(1))
    x = torch.randn(batch, 21, WIDTH, generator=numbers(2))
    return Waveforms(features, positions), lambda model: model(waveform.clone(), x)


@maker
def qwen_audio(name, lengths=(400, 230, 100), **options):
    """The audio tower of Qwen3-ASR or Qwen Omni, whose layers get a row of windows."""
    sizes = {"d_model": WIDTH, "encoder_layers": 2, "encoder_attention_heads": HEADS, "output_dim": 8}
    sizes |= {"encoder_ffn_dim": HIDDEN, "num_mel_bins": 16}
    if name != "Qwen2_5OmniAudio":
        sizes |= {"downsample_hidden_size": 4, "n_window_infer": 200}
    x, of = torch.randn(len(lengths), 16, max(lengths), generator=numbers(1)), torch.tensor(lengths)
    if name == "Qwen3ASR":
        mask = (torch.arange(max(lengths)) < of[:, None]).long()
        given = {"input_features": x, "input_features_mask": mask}
    else:
        row = torch.cat([recording[:, :n] for recording, n in zip(x, lengths, strict=True)], 1)
        given = {"input_features": row, "feature_lens": of}
    model = transformers_encoder(QWEN[name], f"{name}Encoder", f"{name}EncoderConfig", sizes, **options)
    return model, lambda model: [model(**given).last_hidden_state]


QWEN = {"Qwen3ASR": "qwen3_asr", "Qwen2_5OmniAudio": "qwen2_5_omni", "Qwen3OmniMoeAudio": "qwen3_omni_moe"}
_PLAIN_LAYERS = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
}


@maker
def glmasr(frames=81, **options):
    """GLM-ASR's encoder, which takes no lengths."""
    names = "glmasr", "GlmAsrEncoder", "GlmAsrEncoderConfig"
    model = transformers_encoder(*names, _PLAIN_LAYERS | {"num_mel_bins": 8}, **options)
    x = torch.randn(2, 8, frames, generator=numbers(1))
    return model, lambda model: [model(x).last_hidden_state]


@maker
def of_waveforms(names, sizes, lengths, masked):
    model = transformers_encoder(*names, sizes)
    x = torch.randn(len(lengths), max(lengths), generator=numbers(1))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long() if masked else None
    return model, lambda model: [model(x, attention_mask=mask).last_hidden_state]


def moonshine(lengths=(13000, 8600, 4000), masked=True, **options):
    """Moonshine's encoder of waveforms."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "vocab_size": 20}
    counts = "num_hidden_layers", "num_attention_heads"
    sizes |= {f"{part}_{count}": 2 for part in ("encoder", "decoder") for count in counts}
    names = "moonshine", "MoonshineEncoder", "MoonshineConfig"
    return of_waveforms(names, sizes | options, lengths, masked)


def moonshine_streaming(lengths=(16000, 9200, 4000), masked=True, **options):
    """Moonshine Streaming's encoder of waveforms, whose layers see windows of other sizes."""
    sizes = _PLAIN_LAYERS | {"num_key_value_heads": HEADS, "sliding_windows": [[6, 3], [5, 0]]}
    names = "moonshine_streaming", "MoonshineStreamingEncoder", "MoonshineStreamingEncoderConfig"
    return of_waveforms(names, sizes | options, lengths, masked)


@maker
def voxtral_realtime(frames=60, lengths=None, left=False, **options):
    """Voxtral Realtime's encoder. ``lengths``: of the recordings behind the front end, or None without a mask;
    ``left``: padding comes before them."""
    sizes = _PLAIN_LAYERS | {"num_mel_bins": 8, "head_dim": 6, "sliding_window": 9}
    names = "voxtral_realtime", "VoxtralRealtimeEncoder", "VoxtralRealtimeEncoderConfig"
    x, mask = torch.randn(2, 8, frames, generator=numbers(1)), None
    if lengths is not None:
        mask = (torch.arange(frames // 2) < torch.tensor(lengths)[:, None]).long()
        mask = mask.flip(1) if left else mask
    model = transformers_encoder(*names, sizes, **options)
    return model, lambda model: [model(x, attention_mask=mask).last_hidden_state]


@maker
def nemotron_encoder(
    kind="Nemotron3_5TranscribeAsr",
    folder="nemotron3_5_transcribe",
    lengths=(80, 51, 20),
    masked=True,
    **options,
):
    """The encoder of Nemotron 3.5 Transcribe or of Nemotron 3 Diarization."""
    names = folder, f"{kind}AudioModel", f"{kind}AudioConfig"
    model = transformers_encoder(*names, _PLAIN_LAYERS | {"num_mel_bins": 8}, **options)
    x, mask = batch(lengths, 8)
    given = {"attention_mask": mask.long()} if masked else {}
    return model, lambda model: [model(x, **given).last_hidden_state]


@maker
def mimi(samples=180, **options):
    """Mimi's encoder of waveforms, which takes no lengths."""
    sizes = _PLAIN_LAYERS | {"num_filters": 4, "upsampling_ratios": [3, 2], "sliding_window": 9}
    sizes |= {"num_key_value_heads": HEADS, "layer_scale_initial_scale": 1.0}
    model = transformers_encoder("mimi", "MimiEncoderModel", "MimiEncoderConfig", sizes, **options)
    x = torch.randn(2, 1, samples, generator=numbers(1))
    return model, lambda model: [model(x).latents]


def fun_asr_nano(**options):
    """Fun-ASR-Nano's encoder, whose attention has a memory."""
    sizes = _PLAIN_LAYERS | {"num_hidden_layers": 3, "num_mel_bins": 5, "num_stacked_frames": 4}
    sizes |= {"fsmn_kernel_size": 7, "num_timestamp_prediction_layers": 1}
    names = "fun_asr_nano", "FunAsrNanoEncoder", "FunAsrNanoEncoderConfig"
    model = transformers_encoder(*names, sizes, None, **options)
    x = torch.randn(2, 21, 20, generator=numbers(1))
    mask = (torch.arange(21) < torch.tensor([21, 13])[:, None]).long()
    return model, lambda model: [model(x, mask).last_hidden_state]
