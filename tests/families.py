# SPDX-License-Identifier: Apache-2.0
"""A tiny model of every framework, and a call of it: what tests of all rules run over.

``FAMILIES[name]()`` returns (model, run): the model in eval mode with parameters away from their first values, and a
function (model) -> list of tensors that runs it in the mode that it is in. It raises pytest's Skipped if the framework
is not installed. Together the models have a module for every rule.

The makers of packages with several models are in files of their own (``tiny_*.py``), the others here. A maker is such a
function itself, or takes options and returns one.
"""

import importlib.util
import os
import sys
import types

import nemo_encoder
import pytest
import torch
from steps import maker, moved, numbers, seeded
from tiny_conformers import (
    MODELS,
    TAPS,
    conformer,
    gemma3n,
    gemma4,
    granite_speech,
    granite_speech5,
    nemo_local,
    nemo_striding,
    phi4_audio,
    seamless,
    seamless_v2,
    w2v_bert,
    with_position_biases,
)
from tiny_decoders import decoder_layers, projecting_layers
from tiny_espnet import PLAIN_ATTENTION, e_branchformer, espnet_front_ends, espnet_transformer, mega
from tiny_parakeet import STILL, lasr, nemotron, parakeet, parakeet_transducer
from tiny_searches import espnet_searches, speechbrain_searches
from tiny_torchaudio import LARGE, emformer, emformer_rnnt, torchaudio_wav2vec2
from tiny_transformers import (
    HEADS,
    HIDDEN,
    WAV2VEC2S,
    WAVEFORMS,
    WIDTH,
    fun_asr_nano,
    glmasr,
    mimi,
    moonshine,
    moonshine_streaming,
    nemotron_encoder,
    omniasr,
    qwen_audio,
    speech2text,
    speecht5,
    voxtral_realtime,
    wav2vec2,
    waveforms,
    wavlm,
    whisper,
)
from tiny_zipformer import causal_zipformer, zipformer, zipformer_recogniser, zipvoice


@maker
def speechbrain_transformer(lengths=(21, 13, 5), masked=True, **options):
    module = pytest.importorskip("speechbrain.lobes.models.transformer.Transformer")
    sizes = {"normalize_before": True, "dropout": 0.1}
    model = module.TransformerEncoder(3, HEADS, HIDDEN, d_model=WIDTH, **sizes | options)
    x = torch.randn(len(lengths), max(lengths), WIDTH, generator=numbers(1))
    hidden = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None] if masked else None
    return model, lambda model: [model(x, src_key_padding_mask=hidden)[0]]


def speechbrain_decoder():
    module = pytest.importorskip("speechbrain.lobes.models.transformer.Transformer")
    model = module.TransformerDecoder(2, HEADS, HIDDEN, d_model=WIDTH, dropout=0.1, normalize_before=True)
    x, states = (torch.randn(3, n, WIDTH, generator=numbers(n)) for n in (5, 9))
    return model, lambda model: [model(x, states, tgt_mask=module.get_lookahead_mask(x))[0]]


@maker
def nemo_transformer(lengths=(80, 51, 0), **options):
    sizes = {"d_model": 32, "n_heads": HEADS, "n_layers": 2, "ff_expansion": 1.5}
    model = nemo_encoder.load_transformer().TransformerEncoder(feat_in=WIDTH, **sizes, **options)
    x = torch.randn(len(lengths), WIDTH, max(lengths), generator=numbers(1))
    return model, lambda model: [model(x, torch.tensor(lengths))[0]]


@maker
def firered(lengths=(83, 51, 30), dropout=0.1):
    module = pytest.importorskip("fireredasr.models.module.conformer_encoder")
    sizes = {"idim": 20, "n_layers": 2, "n_head": HEADS, "d_model": WIDTH, "kernel_size": TAPS}
    rates = dict.fromkeys(("residual_dropout", "dropout_rate"), dropout)
    x = torch.randn(len(lengths), max(lengths), 20, generator=numbers(1))
    model = module.ConformerEncoder(**sizes, **rates, pe_maxlen=64)
    return model, lambda model: [model(x, torch.tensor(lengths))[0]]


def without_init(name):
    """Returns a module of a package whose own ``__init__`` would import what it downloads checkpoints and reads
    recordings with."""
    package = name.partition(".")[0]
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"{package} is not installed")
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations)
    return importlib.import_module(name)


@maker
def funasr(lengths=(43, 21, 9), **options):
    """Paraformer's encoder; SenseVoice's has the same classes of layers."""
    module = without_init("funasr.models.sanm.encoder")
    sizes = {"output_size": WIDTH, "attention_heads": HEADS, "linear_units": HIDDEN, "num_blocks": 3}
    model = module.SANMEncoder(20, **sizes | {"input_layer": "pe", "kernel_size": 7} | options)
    x = torch.randn(len(lengths), max(lengths), 20, generator=numbers(1))
    return model, lambda model: [model(x, torch.tensor(lengths))[0]]


@maker
def gigaam(kind, lengths=(83, 51, 30)):
    module = without_init("gigaam.encoder")
    sizes = {"feat_in": 20, "n_layers": 2, "d_model": WIDTH, "n_heads": HEADS, "conv_kernel_size": TAPS}
    model = module.ConformerEncoder(**sizes, self_attention_model=kind, pos_emb_max_len=64)
    x = torch.randn(len(lengths), 20, max(lengths), generator=numbers(1))
    return with_position_biases(model), lambda model: [model(x, torch.tensor(lengths))[0]]


def load_openai_whisper():
    """Returns the package, with stand-ins for what it counts tokens and aligns words with, where that is missing."""
    missing = [n for n in ("tiktoken", "numba") if n not in sys.modules and not importlib.util.find_spec(n)]
    for name in missing:
        module = sys.modules[name] = types.ModuleType(name)
        module.Encoding, module.jit = object, lambda *args, **options: lambda function: function
    try:
        return pytest.importorskip("whisper.model")
    finally:
        for name in missing:  # Other packages look for them.
            del sys.modules[name]


@maker
def openai_whisper(frames=24, layers=2):
    """The encoder of the package openai-whisper."""
    module = load_openai_whisper()
    model = module.AudioEncoder(5, frames // 2, WIDTH, HEADS, layers)
    x = torch.randn(2, 5, frames, generator=numbers(1))
    return model, lambda model: [model(x)]


def openai_whisper_decoder():
    """The decoder of the same package: its logits."""
    model = load_openai_whisper().TextDecoder(23, 9, WIDTH, HEADS, 2)
    torch.nn.init.normal_(model.positional_embedding)
    tokens, x = torch.tensor([[1, 5, 3], [2, 7, 11]]), torch.randn(2, 6, WIDTH, generator=numbers(1))
    return model, lambda model: [model(tokens, x)]


@maker
def nemo_joint(kind="rnnt", name="pytorch", **options):
    """NeMo's fused joint: its loss."""
    joints, losses = nemo_encoder.load_transducer()
    joint = joints.RNNTJoint(
        {"encoder_hidden": 5, "pred_hidden": 4, "joint_hidden": 8, "activation": "relu", "dropout": 0.1},
        num_classes=6,
        num_extra_outputs=len(options.get("durations", ())),
        fuse_loss_wer=True,
        fused_batch_size=2,
    )
    loss = losses.RNNTLoss(6, "mean_batch", name, dict(options))
    loss._force_float32 = False
    joint.set_loss(loss)
    joint.set_wer(_Wer())
    draw = numbers(1)
    inputs = {
        "encoder_outputs": torch.randn(3, 5, 8, generator=draw),
        "decoder_outputs": torch.randn(3, 4, 5, generator=draw),
        "encoder_lengths": torch.tensor([7, 5, 6]),
        "transcripts": torch.randint(0, 6, (3, 4), generator=draw),
        "transcript_lengths": torch.tensor([3, 1, 2]),
    }
    return joint, lambda model: [model(**inputs, compute_wer=False)[0]]


class _Wer:
    """Stands for NeMo's metric, which these calls do not ask for."""


FAMILIES = {
    **{f"{name} conformer": conformer(name) for name in MODELS},
    "nemo local": nemo_local,
    "nemo striding": nemo_striding,
    "nemo transformer": nemo_transformer(),
    "nemo transformer, causal": nemo_transformer(attn_mode="causal", qk_norm=True, qkv_bias=True),
    "speechbrain transformer": speechbrain_transformer(),
    "speechbrain decoder": speechbrain_decoder,
    "nemo joint": nemo_joint(),
    "fireredasr": firered(),
    "funasr": funasr(),
    "gigaam": gigaam("rel_pos"),
    "gigaam, rotary": gigaam("rotary"),
    "zipformer": zipformer,
    "zipformer, causal": causal_zipformer,
    "zipformer recogniser": zipformer_recogniser,
    "e-branchformer": e_branchformer,
    "owsm": lambda: e_branchformer(**PLAIN_ATTENTION),
    "espnet transformer": espnet_transformer(),
    "espnet front ends": espnet_front_ends,
    "emformer": emformer,
    "emformer stream": lambda: emformer(streams=True),
    "emformer rnn-t": emformer_rnnt,
    "torchaudio wav2vec2": torchaudio_wav2vec2(),
    "torchaudio wav2vec2 large": torchaudio_wav2vec2(**LARGE),
    "torchaudio wavlm": torchaudio_wav2vec2("wavlm_model", masked=False),
    "mega": mega,
    "mega rotary": lambda: mega(rel_pos_bias_type="rotary"),
    "parakeet": parakeet,
    "lasr": lasr,
    "phi-4": phi4_audio(),
    "fun-asr-nano": fun_asr_nano,
    "granite speech": granite_speech(),
    "granite speech plus": granite_speech("Plus"),
    "granite speech 5": granite_speech5,
    "seamless m4t": seamless(max_source_positions=64),
    "seamless m4t v2": seamless_v2(),
    "seamless m4t v2, chunks": seamless_v2(speech_encoder_chunk_size=8, speech_encoder_left_chunk_num=1),
    "w2v-bert": w2v_bert(),
    "wavlm": wavlm(),
    "wavlm large": wavlm(stable=True),
    "whisper": whisper("whisper", layers=2),
    "whisper's copies": whisper("qwen2_audio", "voxtral", "moss_transcribe_diarize"),
    "audio flamingo 3": whisper("audioflamingo3", layers=2, lengths=(24, 17, 6)),
    "speech2text": speech2text(),
    "speecht5": speecht5(),
    "openai whisper": openai_whisper(),
    "openai whisper, decoder": openai_whisper_decoder,
    "wav2vec2": wav2vec2("Wav2Vec2", layers=2),
    "wav2vec2 large": wav2vec2("Wav2Vec2", norms=("StableLayerNorm",), layers=2),
    "wav2vec2's copies": wav2vec2(*WAV2VEC2S[1:], norms=("", "StableLayerNorm")),
    "omniasr": omniasr(),
    "waveforms": waveforms("Wav2Vec2"),
    "waveforms' copies": waveforms(*WAVEFORMS[1:]),
    "gemma 4": gemma4(),
    "gemma 3n": gemma3n(),
    "qwen3-asr": qwen_audio("Qwen3ASR"),
    "qwen2.5-omni": qwen_audio("Qwen2_5OmniAudio", (230, 90, 12)),
    "qwen3-omni": qwen_audio("Qwen3OmniMoeAudio"),
    "glm-asr": glmasr(),
    "moonshine": moonshine(),
    "moonshine streaming": moonshine_streaming(),
    "voxtral realtime": voxtral_realtime(),
    "decoders of transformers": decoder_layers,
    "decoders that project": projecting_layers,
    "espnet searches": espnet_searches,
    "speechbrain searches": speechbrain_searches,
    "nemotron transcribe": nemotron_encoder(),
    "nemotron diarization": nemotron_encoder("Nemotron3Diarization", "nemotron3_diarization"),
    "mimi": mimi(),
    "parakeet tdt": parakeet_transducer("TDT"),
    "parakeet rnn-t": parakeet_transducer("RNNT"),
    "nemotron": nemotron,
    # equal lengths: then packed frames are as upstream's
    "parakeet, ragged": lambda: parakeet((75, 75, 75), **STILL),
    "zipformer, ragged": lambda: zipformer((60, 60)),
}
if CHECKOUT := os.environ.get("FASTASR_ZIPVOICE"):  # the package on PyPI is empty
    sys.path.append(CHECKOUT)
    FAMILIES["zipvoice"] = zipvoice()
SWAP = {
    "parakeet, ragged": {"ragged": True},
    "zipformer, ragged": {"ragged": True},
}  # arguments of accelerate


def make(name):
    """Returns (model, run) of a family, see above. The same in every call of a run."""
    seeded(name)
    model, run = FAMILIES[name]()
    return moved(model, 0.05).eval(), run
