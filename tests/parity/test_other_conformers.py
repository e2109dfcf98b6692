# SPDX-License-Identifier: Apache-2.0
"""Encoders of transformers, torchaudio, NeMo, FireRedASR and GigaAM whose modules have the formulas of others: values,
gradients and draws are upstream's in float64, with masks and under checkpointing."""

import copy
import functools

import families
import pytest
import torch
from steps import close, moved, outcome, same, seeded, swapped
from tiny_conformers import GEMMA_BOUNDS, W2V_BERT, torchaudio_padded
from torch.utils.checkpoint import checkpoint

import fastasr

_POSITIONS = "PositionalConvEmbedding"
_WAVEFORMS = "NoLayerNormConvLayer", "LayerNormConvLayer", "GroupNormConvLayer", _POSITIONS
_OF_TORCHAUDIO = {"ConvLayerBlock", "ConvolutionalPositionalEmbedding", "FeedForward"}


def classes(start, *ends):
    return {start + end for end in ends}


# Family -> the classes that a rule of the framework replaces
REPLACED = {
    "nemo transformer": {"MultiHeadAttention", "FeedForward"},
    "nemo transformer, causal": {"MultiHeadAttention", "FeedForward"},
    "torchaudio conformer": {"MultiheadAttention", "_ConvolutionModule", "_FeedForwardModule"},
    "speechbrain transformer": {"MultiheadAttention", "PositionalwiseFeedForward"},
    "fireredasr": {"RelPosMultiHeadAttention", *classes("Conformer", "Convolution", "FeedForward")},
    **{
        family: {attention, *classes("Conformer", "Convolution", "FeedForward"), "StridingSubsampling"}
        for family, attention in (
            ("gigaam", "RelPositionMultiHeadAttention"),
            ("gigaam, rotary", "RotaryPositionMultiHeadAttention"),
        )
    },
    "owsm": {
        *classes("Convolutional", "GatingMLP", "SpatialGatingUnit"),
        "EBranchformerEncoderLayer",
        "MultiHeadedAttention",
        "PositionwiseFeedForward",
    },
    "espnet transformer": {"EncoderLayer", "MultiHeadedAttention", "PositionwiseFeedForward"},
    "phi-4": classes("Phi4MultimodalAudio", "NemoConvSubsampling", "Attention", "ConvModule", "MLP", "Model"),
    "fun-asr-nano": classes("FunAsrNano", "Attention", "FSMN", "MLP"),
    "funasr": {"MultiHeadedAttentionSANM", "PositionwiseFeedForward"},
    "lasr": {"Conv1d", *classes("LasrEncoder", "Attention", "FeedForward", "ConvolutionModule")},
    "granite speech": classes("GraniteSpeechConformer", "Attention", "ConvModule", "FeedForward"),
    "granite speech plus": classes("GraniteSpeechPlusConformer", "Attention", "ConvModule", "FeedForward"),
    "granite speech 5": classes("GraniteSpeech5Encoder", "Attention", "ConvolutionModule", "FeedForward"),
    "seamless m4t": classes("SeamlessM4TConformer", "FeedForward", "SelfAttention", "ConvolutionModule"),
    "seamless m4t v2": classes("SeamlessM4Tv2Conformer", "FeedForward", "SelfAttention", "ConvolutionModule"),
    "w2v-bert": classes("Wav2Vec2Bert", "FeedForward", "SelfAttention", "ConvolutionModule"),
    "wavlm": classes("WavLM", "Attention", "FeedForward", "Encoder", _POSITIONS),
    "wavlm large": classes("WavLM", "Attention", "FeedForward", "EncoderStableLayerNorm", _POSITIONS),
    "whisper": {"Conv1d", *classes("Whisper", "Attention", "EncoderLayer")},
    "whisper's copies": {
        "Conv1d",
        *classes("Qwen2Audio", "Attention", "EncoderLayer"),
        *classes("Voxtral", "Attention", "EncoderLayer"),
        *classes("MossTranscribeDiarizeAudio", "Attention", "Layer"),
    },
    "audio flamingo 3": {"Conv1d", *classes("AudioFlamingo3", "Attention", "EncoderLayer")},
    "speech2text": {"Conv1d", *classes("Speech2Text", "Attention", "EncoderLayer")},
    "speecht5": classes("SpeechT5", "Attention", "FeedForward"),
    "openai whisper": {"ResidualAttentionBlock"},
    "wav2vec2": classes("Wav2Vec2", "Attention", "FeedForward", _POSITIONS),
    "wav2vec2 large": classes("Wav2Vec2", "Attention", "FeedForward", _POSITIONS),
    "wav2vec2's copies": {
        *(f"{name}{part}" for name in families.WAV2VEC2S[1:] for part in ("Attention", "FeedForward")),
        *(f"{name}{_POSITIONS}" for name in families.WAV2VEC2S[1:-1]),
        "Data2VecAudioPositionalConvLayer",
    },
    "omniasr": classes("OmniASR", "Attention", "FeedForward", "LayerNormConvLayer", _POSITIONS),
    "waveforms": classes("Wav2Vec2", *_WAVEFORMS),
    "waveforms' copies": {"Data2VecAudioConvLayer"}.union(
        *(classes(name, *_WAVEFORMS) for name in families.WAVEFORMS[1:] if name != "Data2VecAudio")
    ),
    "torchaudio wav2vec2": {*_OF_TORCHAUDIO, "SelfAttention"},
    "torchaudio wav2vec2 large": {*_OF_TORCHAUDIO, "SelfAttention"},
    "torchaudio wavlm": {*_OF_TORCHAUDIO, "WavLMSelfAttention", "Transformer"},
    "qwen3-asr": {"Conv2d", *classes("Qwen3ASRAudio", "Attention", "EncoderLayer")},
    "qwen2.5-omni": {"Conv1d", *classes("Qwen2_5OmniAudio", "Attention", "EncoderLayer")},
    "qwen3-omni": {"Conv2d", *classes("Qwen3OmniMoeAudio", "Attention", "EncoderLayer")},
    "glm-asr": {"Conv1d", *classes("GlmAsr", "Attention", "MLP")},
    "moonshine": {"Conv1d", *classes("Moonshine", "Attention", "EncoderMLP")},
    "moonshine streaming": classes("MoonshineStreaming", "EncoderAttention", "EncoderMLP", "CausalConv1d"),
    "voxtral realtime": classes("VoxtralRealtime", "Attention", "MLP", "EncoderLayer", "CausalConv1d"),
    "nemotron transcribe": classes("Nemotron3_5Transcribe", "Attention", "MLP"),
    "nemotron diarization": classes("Nemotron3Diarization", "Attention", "MLP"),
    "mimi": {"Conv1d", *classes("Mimi", "Attention", "MLP")},
    "gemma 4": {
        "Gemma4ClippableLinear",
        *classes("Gemma4Audio", "Attention", "FeedForward", "LightConv1d", "Layer"),
        "Gemma4AudioSubSampleConvProjectionLayer",
    },
    "gemma 3n": {
        "Gemma3nAudioAttention",
        *classes("Gemma3nAudioConformer", "FeedForward", "LightConv1d", "Block"),
        "Gemma3nAudioSSCPConvBlock",
    },
}
CHUNKS = {"speech_encoder_chunk_size": 8}
# The same models otherwise: family -> name -> how it is made
# Classes that stay upstream's in a variant
LEFT = {"espnet transformer: norms behind": {"EncoderLayer"}}  # concat_after
OTHERWISE = {
    "seamless m4t v2": {
        "chunks": families.seamless_v2(**CHUNKS, speech_encoder_left_chunk_num=1),
        "chunks, all before": families.seamless_v2(**CHUNKS, speech_encoder_left_chunk_num=-1),
        "chunks, none before": families.seamless_v2(
            **CHUNKS, speech_encoder_left_chunk_num=0, lengths=(29, 25)
        ),
        "chunks of padding": families.seamless_v2(**CHUNKS, speech_encoder_left_chunk_num=0),
        "chunks, no mask": families.seamless_v2(
            **CHUNKS, speech_encoder_left_chunk_num=1, masked=False, lengths=(21, 21)
        ),
    },
    "w2v-bert": {
        "a long recording": families.w2v_bert(lengths=(90, 74)),
        "no frames but one": families.w2v_bert(lengths=(1, 1)),
        "a recording without frames": families.w2v_bert(lengths=(9, 0)),
        "no context": families.w2v_bert(left_max_position_embeddings=0, right_max_position_embeddings=0),
        "relative": families.w2v_bert(position_embeddings_type="relative"),
        "no mask": families.w2v_bert(masked=False),
        "dropout": families.w2v_bert(attention_dropout=0.1, conformer_conv_dropout=0.1),
    },
}
OTHERWISE["wavlm"] = {
    "a long recording": families.wavlm(lengths=(90, 74)),
    "a frame": families.wavlm(lengths=(1,)),
    "no mask": families.wavlm(masked=False),
    "dropout": families.wavlm(attention_dropout=0.1),
    "layers left out": families.wavlm(layerdrop=0.5),
}
OTHERWISE["whisper"] = {
    "a frame": families.whisper("whisper", frames=2),
    "a long recording": families.whisper("whisper", frames=180),
    "dropout": families.whisper("whisper", layers=2, attention_dropout=0.1),
    "layers left out": families.whisper("whisper", layers=3, encoder_layerdrop=0.5),
    "other activations": families.whisper("whisper", activation_function="gelu_new"),
}
OTHERWISE["speech2text"] = {
    "a frame": families.speech2text((1,)),
    "no mask": families.speech2text(masked=False),
    "a recording without frames": families.speech2text((24, 0)),
    "dropout": families.speech2text(attention_dropout=0.1),
    "layers left out": families.speech2text(encoder_layers=3, encoder_layerdrop=0.5),
    "other activations": families.speech2text(activation_function="gelu_new"),
}
OTHERWISE["speecht5"] = {
    "a frame": families.speecht5((1,)),
    "no mask": families.speecht5(masked=False),
    "a recording without frames": families.speecht5((9, 0)),
    "a long recording": families.speecht5((90, 74)),
    "dropout": families.speecht5(attention_dropout=0.1),
    "layers left out": families.speecht5(encoder_layers=4, encoder_layerdrop=0.5),
    "other activations": families.speecht5(hidden_act="gelu_new"),
}
OTHERWISE["openai whisper"] = {
    "a frame": families.openai_whisper(frames=2),
    "a long recording": families.openai_whisper(frames=180),
}
OTHERWISE["audio flamingo 3"] = {
    "a recording without frames": families.whisper("audioflamingo3", lengths=(24, 0))
}
OTHERWISE["waveforms"] = {
    "a recording": families.waveforms("Wav2Vec2", batch=1),
    "a frame": families.waveforms("Wav2Vec2", samples=18),
    "biases": families.waveforms("Wav2Vec2", conv_bias=True),
    "taps of odd number": families.waveforms("Wav2Vec2", num_conv_pos_embeddings=5),
    "other activations": families.waveforms("Wav2Vec2", feat_extract_activation="gelu_new"),
}
OTHERWISE["waveforms' copies"] = {
    "a norm before positions": families.waveforms(*families.WAVEFORMS[1:], conv_pos_batch_norm=True)
}
OTHERWISE["wav2vec2"] = {
    "a long recording": families.wav2vec2("Wav2Vec2", lengths=(90, 74)),
    "a frame": families.wav2vec2("Wav2Vec2", lengths=(1,)),
    "a recording without frames": families.wav2vec2("Wav2Vec2", lengths=(9, 0)),
    "no mask": families.wav2vec2("Wav2Vec2", masked=False),
    "dropout": families.wav2vec2("Wav2Vec2", layers=2, attention_dropout=0.1),
    "layers left out": families.wav2vec2("Wav2Vec2", layers=3, layerdrop=0.5),
    "other activations": families.wav2vec2("Wav2Vec2", hidden_act="gelu_new"),
}
OTHERWISE["torchaudio wav2vec2"] = {
    "a long recording": families.torchaudio_wav2vec2(lengths=(1200, 900)),
    "a frame": families.torchaudio_wav2vec2(lengths=(18,)),
    "a recording without frames": families.torchaudio_wav2vec2(lengths=(90, 3, 0)),
    "no lengths": families.torchaudio_wav2vec2(masked=False),
    "dropout": families.torchaudio_wav2vec2(encoder_attention_dropout=0.1),
    "layers left out": families.torchaudio_wav2vec2(encoder_num_layers=4, encoder_layer_drop=0.5),
    "taps of odd number": families.torchaudio_wav2vec2(encoder_pos_conv_kernel=5),
    "a norm of channels, no bias": families.torchaudio_wav2vec2(extractor_mode="layer_norm"),
}
OTHERWISE["torchaudio wavlm"] = {
    "a long recording": families.torchaudio_wav2vec2("wavlm_model", (1200,), masked=False),
    "a frame": families.torchaudio_wav2vec2("wavlm_model", (18,), masked=False),
    "dropout": families.torchaudio_wav2vec2("wavlm_model", masked=False, encoder_attention_dropout=0.1),
    "layers left out": families.torchaudio_wav2vec2(
        "wavlm_model", masked=False, encoder_num_layers=4, encoder_layer_drop=0.5
    ),
}
CAPPED = {"attention_logit_cap": 0.5}
OTHERWISE["qwen3-asr"] = {
    "a recording": families.qwen_audio("Qwen3ASR", lengths=(300,)),
    "a frame": families.qwen_audio("Qwen3ASR", lengths=(100, 1)),
    "other activations": families.qwen_audio("Qwen3ASR", activation_function="relu"),
}
OTHERWISE["qwen2.5-omni"] = {"a chunk": families.qwen_audio("Qwen2_5OmniAudio", lengths=(200,))}
OTHERWISE["glm-asr"] = {
    "a frame": families.glmasr(frames=1),
    "dropout": families.glmasr(attention_dropout=0.1),
    "other activations": families.glmasr(hidden_act="gelu_new"),
}
OTHERWISE["moonshine"] = {
    "no mask": families.moonshine(masked=False),
    "a recording": families.moonshine((9000,)),
    "a recording without frames": families.moonshine((9000, 0)),
    "dropout": families.moonshine(attention_dropout=0.1),
    "wider heads for torch": families.moonshine(pad_head_dim_to_multiple_of=6),
    "all of a head turns": families.moonshine(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
}
OTHERWISE["moonshine streaming"] = {
    "no mask": families.moonshine_streaming(masked=False),
    "short recordings": families.moonshine_streaming((5600, 1920)),
    "similar lengths": families.moonshine_streaming((16000, 15400)),
    "a recording without frames": families.moonshine_streaming((8000, 0)),
    "dropout": families.moonshine_streaming(attention_dropout=0.1),
}
OTHERWISE["voxtral realtime"] = {
    "less than a window": families.voxtral_realtime(frames=16),
    "a frame": families.voxtral_realtime(frames=2),
    "lengths": families.voxtral_realtime(lengths=(30, 11)),
    "padding before": families.voxtral_realtime(lengths=(30, 11), left=True),
    "dropout": families.voxtral_realtime(attention_dropout=0.1),
}
OTHERWISE["nemotron transcribe"] = {
    "a frame": families.nemotron_encoder(lengths=(3,)),
    "no mask": families.nemotron_encoder(masked=False),
    "a recording without frames": families.nemotron_encoder(lengths=(40, 0)),
    "dropout": families.nemotron_encoder(attention_dropout=0.1),
    "all of a head turns": families.nemotron_encoder(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
}
OTHERWISE["mimi"] = {
    "less than a window": families.mimi(samples=48),
    "a frame": families.mimi(samples=5),
    "dropout": families.mimi(attention_dropout=0.1),
    "wider heads": families.mimi(head_dim=12, attention_bias=True),
}
OTHERWISE["gemma 4"] = {
    "infinite bounds": families.gemma4(bounds={}),
    "bounds that cross": families.gemma4(bounds=GEMMA_BOUNDS | {"output_min": 0.2}),
    "no bounds": families.gemma4(use_clipped_linears=False),
    "a clipping that acts": families.gemma4(gradient_clipping=0.9),
    "other activations": families.gemma4(hidden_act="gelu_new"),
    "a frame": families.gemma4((1,)),
    "11 frames": families.gemma4((11, 11)),
    "12 frames": families.gemma4((12, 3)),
    "13 frames": families.gemma4((13, 2), **CAPPED),
    "a recording of a frame": families.gemma4((30, 1)),
    "a cap that acts": families.gemma4((50, 37), **CAPPED),
}
OTHERWISE["gemma 3n"] = {
    "a clipping that acts": families.gemma3n(gradient_clipping=0.9),
    "a frame": families.gemma3n((1,)),
    "12 frames": families.gemma3n((12, 3)),
    "13 frames": families.gemma3n((13, 2), conf_attention_logit_cap=0.5),
    "a recording without frames": families.gemma3n((30, 0)),
    "a cap that acts": families.gemma3n((50, 37), conf_attention_logit_cap=0.5),
}
OTHERWISE["fireredasr"] = {
    "a recording": families.firered((61,)),
    "one frame": families.firered((7, 7)),
    "no frames": families.firered((40, 0)),
    "no dropout": families.firered(dropout=0.0),
}
OTHERWISE["gigaam"] = {"a recording": families.gigaam("rel_pos", (61,))}  # without masks of pairs
OTHERWISE["gigaam, rotary"] = {"a recording": families.gigaam("rotary", (61,))}
OTHERWISE["torchaudio conformer"] = {
    "two frames": lambda: torchaudio_padded((2,)),  # for the batch norm
    "a recording without frames": lambda: torchaudio_padded((9, 0)),
    "convolution first": lambda: torchaudio_padded(convolution_first=True),
    "no dropout": lambda: torchaudio_padded(dropout=0.0),
}
OTHERWISE["speechbrain transformer"] = {
    "a frame": families.speechbrain_transformer((1,)),
    "no mask": families.speechbrain_transformer(masked=False),
    "norms behind": families.speechbrain_transformer(normalize_before=False),
    "no dropout": families.speechbrain_transformer(dropout=0.0),
}
OTHERWISE["owsm"] = {
    "norms": lambda: families.e_branchformer(**families.PLAIN_ATTENTION, qk_norm=True),
    "dropout": lambda: families.e_branchformer(**families.PLAIN_ATTENTION, attention_dropout_rate=0.2),
}
OTHERWISE["espnet transformer"] = {
    "a frame": families.espnet_transformer((1,)),
    "a recording without frames": families.espnet_transformer((9, 0)),
    "dropout": families.espnet_transformer(attention_dropout_rate=0.2),
    "norms behind": families.espnet_transformer(normalize_before=False, concat_after=True),
    "layers left out": families.espnet_transformer(layer_drop_rate=0.5),
}
OTHERWISE["phi-4"] = {
    "an odd length": families.phi4_audio(frames=61, lengths=(61, 40)),
    "no mask": families.phi4_audio(masked=False),
    "501 frames": families.phi4_audio(frames=4001, lengths=(4001,)),
    "1,000 frames": families.phi4_audio(frames=8000, lengths=(3100,)),
    "501 frames, no mask": families.phi4_audio(frames=4008, lengths=(4008,), masked=False),
    "a symmetric bias": families.phi4_audio(bias_symmetric=True, bias_max_distance=20),
    "a near bias, one tap": families.phi4_audio(bias_max_distance=4, kernel_size=1),
    "dropout": families.phi4_audio(num_blocks=2, dropout_rate=0.1),
}
OTHERWISE["fun-asr-nano"] = {
    "dropout": lambda: families.fun_asr_nano(hidden_dropout=0.2, attention_dropout=0.1)
}
OTHERWISE["funasr"] = {
    "a recording": families.funasr((40,)),
    "a frame": families.funasr((1,)),
    "a shift": families.funasr(sanm_shfit=2),
    "even taps": families.funasr(kernel_size=4),
    "no dropout": families.funasr(dropout_rate=0.0),
}
OTHERWISE["granite speech"] = {
    "less than a block": families.granite_speech(frames=7),
    "a block": families.granite_speech(frames=20),
    "a frame more": families.granite_speech(frames=21, conv_kernel_size=8),
    "dropout": families.granite_speech(dropout=0.1, context_size=24),
}
OTHERWISE["granite speech plus"] = {"kept layers": families.granite_speech("Plus", cat_hidden_layers=[0, 1])}
OTHERWISE["granite speech 5"] = {
    "odd lengths": lambda: families.granite_speech5((51, 51, 23)),
    "no frames": lambda: families.granite_speech5((40, 0)),
    "a recording": lambda: families.granite_speech5((43,)),
    "dropout": lambda: families.granite_speech5(attention_dropout=0.1),
}
OTHERWISE["nemo transformer"] = {
    "one frame": families.nemo_transformer(lengths=(4, 4)),
    "norms": families.nemo_transformer(qk_norm=True, pre_block_norm=False, xscaling=True),
    "stacked": families.nemo_transformer(subsampling="stacking_norm", drop_rate=0.2),
}
ALL = [*REPLACED, *(f"{family}: {name}" for family, made in OTHERWISE.items() for name in made)]
TOLERANCE = 1e-10
# Upstream computes attention, its softmax or norms of these in float32 whatever the dtype: 4 cannot run in float64.
SINGLE = ("gemma 4", "gemma 3n", "voxtral realtime", "openai whisper")
CASTS = ("openai whisper",)  # its parameters stay float32, and its layers cast them to the dtype of the input


def pair(name):
    """Returns upstream's model, the swapped one and a call of them, in float64."""
    family, _, variant = name.partition(": ")
    with pytest.MonkeyPatch.context() as patch:
        if family in SINGLE:  # near ties of float32, which turn gradients, are the same in every run
            patch.setenv("SEED", "1")
        if variant:
            seeded(name)
            model, call = OTHERWISE[family][variant]()
            model = moved(model, 0.05).eval()
        else:
            model, call = families.make(name)
        theirs = moved(model, 0.1)
    ours = copy.deepcopy(theirs)
    report = fastasr.accelerate(ours)
    expected = REPLACED[family] - LEFT.get(name, set())
    assert {row.class_name for row in report.replaced} - {"Linear"} == expected
    return theirs, ours, call


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ALL)
def test_a_step(name, training):
    theirs, ours, call = pair(name)
    dtype, tolerance = (torch.float32, 2e-5) if name.startswith(SINGLE) else (torch.float64, TOLERANCE)
    call = inputs_in(dtype, call)
    with fastasr.upstream_draws():
        results = [outcome(model.to(dtype), call, training) for model in (ours, theirs)]
    same(*results, tolerance, share=1.0)


def inputs_in(dtype, call):
    """Returns the call with its floating inputs in this dtype."""

    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def inputs(_, args, kwargs):
        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}

    def casting(model):
        hook = model.register_forward_pre_hook(inputs, with_kwargs=True)
        try:
            return call(model)
        finally:
            hook.remove()

    return casting


@pytest.mark.parametrize("name", REPLACED)
def test_under_checkpointing(name):
    theirs, ours, call = pair(name)
    for module in ours.modules():
        if hasattr(module, "gradient_checkpointing"):  # as the whole model's gradient_checkpointing_enable
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    with fastasr.upstream_draws():
        results = [outcome(model, call, True) for model in (ours, theirs)]
    same(*results, 1e-4, share=1.0)


def test_phi4_under_reentrant_checkpointing():
    """Its layers share a bias, whose gradient comes back from each of them."""
    seeded(0)
    theirs, call = families.phi4_audio(num_blocks=3)()
    ours = swapped(moved(theirs, 0.05))
    for layer in ours.encoders:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=True)
    same(*(outcome(model, call, True) for model in (ours, theirs)), 1e-4, share=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", REPLACED)
def test_in_short_dtypes(name, dtype):
    """The swapped model is as near to the widest dtype as upstream."""
    theirs, ours, call = pair(name)
    wide = torch.float32 if name in SINGLE else torch.float64
    exact = copy.deepcopy(theirs).to(wide).eval()
    with torch.no_grad():
        truth = inputs_in(wide, call)(exact)[0].double()
        found, expected = (
            inputs_in(dtype, call)((model if name in CASTS else model.to(dtype)).eval())[0].double()
            for model in (ours, theirs)
        )
    assert (found - truth).abs().mean() <= 1.5 * (expected - truth).abs().mean()


def test_the_bounds_of_gemma4_act():
    model, call = families.make("gemma 4")
    inside = dict.fromkeys(GEMMA_BOUNDS, 0)

    def count(layer, args, y):
        (x,) = args
        for name, t in (("input", x), ("output", y)):
            inside[f"{name}_min"] += (t <= getattr(layer, f"{name}_min")).sum().item()
            inside[f"{name}_max"] += (t >= getattr(layer, f"{name}_max")).sum().item()

    for module in model.modules():
        if type(module).__name__ == "Gemma4ClippableLinear":
            module.register_forward_hook(count)
    with torch.no_grad():
        call(model)
    assert min(inside.values()) > 100, inside


def call_of_gemma4_attention(*lengths):
    """Returns an attention module and the arguments of its call for recordings of these lengths."""
    _, ours, _ = pair("gemma 4")
    module, calls = ours.eval().layers[0].self_attn, []
    hook = module.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    with torch.no_grad():
        families.gemma4(lengths)()[1](ours)
    hook.remove()
    return module, *calls[0]


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_to_a_mask_of_gemma4_is_noticed(inference):
    with torch.inference_mode(inference), torch.no_grad():
        module, args, given = call_of_gemma4_attention(30, 25)
        (name,) = (name for name, t in given.items() if "mask" in name)
        _, _, shorter = call_of_gemma4_attention(30, 10)
        before = module(*args, **given)[0]
        given[name].numpy()[...] = shorter[name].numpy()
        found, expected = module(*args, **given)[0], module(*args, **given | {name: shorter[name]})[0]
    assert not torch.equal(before, expected)
    assert torch.equal(found, expected)


def test_gemma_near_the_largest_half():
    """Norms read infinities as the largest number of float16, as upstream clamps them."""
    theirs, ours, call = pair("gemma 4")
    for model in (theirs, ours):
        model.half().eval()
        for layer in model.layers:
            for part in (layer.feed_forward1, layer.feed_forward2):
                part.ffw_layer_2.linear.weight.data.mul_(1e6).clamp_(-6e4, 6e4)
                (
                    part.ffw_layer_2.output_max.fill_(float("inf")),
                    part.ffw_layer_2.output_min.fill_(-float("inf")),
                )
    overflowed = []
    hook = theirs.layers[0].feed_forward1.ffw_layer_2.register_forward_hook(
        lambda _, args, y: overflowed.append(y.isinf().any().item())
    )
    with torch.no_grad():
        found, expected = (inputs_in(torch.float16, call)(model)[0] for model in (ours, theirs))
    hook.remove()
    assert overflowed == [True]
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())


IMPLEMENTATIONS = {
    "eager": (
        "phi-4",
        "w2v-bert",
        "w2v-bert: no mask",
        "w2v-bert: relative",
        "seamless m4t v2",
        "granite speech 5",
        "audio flamingo 3",
        "whisper",
        "speech2text",
        "speech2text: no mask",
        "wav2vec2",
        "wav2vec2: no mask",
        "qwen3-asr",
        "lasr",
        "fun-asr-nano",
        "glm-asr",
        "moonshine",
        "moonshine streaming: similar lengths",
        "voxtral realtime",
        "voxtral realtime: less than a window",
        "nemotron transcribe",
        "nemotron diarization",
        "mimi",
        "mimi: less than a window",
    ),
    # with a tensor as the mask upstream's crashes on a CPU
    "flex_attention": (
        "w2v-bert",
        "wav2vec2",
        "glm-asr",
        "moonshine",
        "voxtral realtime",
        "nemotron transcribe",
        "mimi",
    ),
}


@pytest.mark.parametrize(
    ("implementation", "name"), [(kind, name) for kind, names in IMPLEMENTATIONS.items() for name in names]
)
def test_implementations(implementation, name):
    """Whatever the implementation, also where upstream's adds the mask's True to the scores as 1."""
    theirs, ours, call = pair(name)
    theirs.config._attn_implementation = ours.config._attn_implementation = implementation
    # Upstream compiles flex_attention, with a C++ compiler for 14 s; torch serves it without.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(call(ours)[0], call(theirs)[0], rtol=1e-4, atol=1e-4)
    left = fastasr.why(ours).to_dict()
    assert any("self_attn" in key for key in left) == (name == "seamless m4t v2"), left


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_a_whole_model_returns(implementation):
    """w2v-BERT with its adapter, whose attention has no positions, and every output that can be asked for."""
    transformers = pytest.importorskip("transformers")
    seeded("whole")
    config = transformers.Wav2Vec2BertConfig(
        **W2V_BERT | {"layerdrop": 0.5}, hidden_size=families.WIDTH, add_adapter=True,
        feature_projection_input_dim=10, attn_implementation=implementation, mask_time_prob=0.0,
    )  # fmt: skip
    theirs = moved(transformers.Wav2Vec2BertModel(config), 0.1).double()
    ours = copy.deepcopy(theirs)
    report = fastasr.accelerate(ours)
    skipped = [row.reason for row in report.skipped if row.class_name == "Wav2Vec2BertSelfAttention"]
    assert skipped == ["position_embeddings_type is None, expected 'relative_key' or 'relative'"]
    inputs = {
        "input_features": torch.randn(2, 20, 10, dtype=torch.float64),
        "attention_mask": torch.arange(20) < torch.tensor([[20], [11]]),
    }
    for training, asked in ((False, True), (True, False)):
        found, expected = [], []
        for model, outputs in ((ours, found), (theirs, expected)):
            seeded("call")
            with fastasr.upstream_draws(), torch.set_grad_enabled(training):
                model.train(training)
                y = model(**inputs, output_attentions=asked, output_hidden_states=asked)
            outputs += [y.last_hidden_state, *(y.hidden_states or ()), *(y.attentions or ())]
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            if a is None or b is None:
                assert a is b
            else:
                close(a, b, TOLERANCE)


@pytest.mark.parametrize("name", ["nemo transformer", "nemo transformer, causal"])
def test_flex_attention_of_nemo(name, monkeypatch):
    """Values are those of torch's FlexAttention, which has no gradient on a CPU, and of pre-encoded frames."""
    theirs, ours, call = pair(name)
    module = families.nemo_encoder.load_transformer()
    monkeypatch.setattr(module, "flex_attention", module.of_torch)
    x, lengths = torch.randn(2, 9, 32), torch.tensor([9, 5])
    with torch.no_grad():
        torch.testing.assert_close(call(ours)[0], call(theirs)[0], rtol=1e-5, atol=1e-5)
        found, expected = (model(x, lengths, bypass_pre_encode=True)[0] for model in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError):
        call(theirs)
    call(ours)[0].sum().backward()


@pytest.mark.parametrize("kind", ["abs_pos", "no_pos"])
def test_nemo_without_relative_positions(kind):
    seeded(kind)
    model, _ = families.nemo_transformer(self_attention_model=kind)()
    skipped = [
        row.reason for row in fastasr.accelerate(model).skipped if row.class_name == "MultiHeadAttention"
    ]
    assert set(skipped) == {"has no relative positions"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_masks_of_funasr(dtype):
    """SenseVoice's masks are numbers. A mask may have holes and hide a whole recording, which gives the bias alone."""
    theirs, ours, _ = pair("funasr")
    x = torch.randn(3, 17, families.WIDTH, dtype=torch.float64)
    mask = (torch.arange(17) % 5 != 2) & (torch.arange(17) < torch.tensor([[17], [11], [0]]))
    layers = (model.double().encoders[0].self_attn for model in (ours, theirs))
    with torch.no_grad():
        found, expected = (layer(x, mask.unsqueeze(1).to(dtype)) for layer in layers)
    close(found, expected, TOLERANCE)
    assert torch.equal(found[2], ours.encoders[0].self_attn.linear_out.bias.expand(17, -1))


def test_a_batch_of_long_recordings_of_phi4():
    """Upstream computes more than 500 frames of one recording, and of several raises an error: here each row of the
    batch is upstream's single recording."""
    theirs, ours, _ = pair("phi-4")
    theirs, ours = theirs.double(), ours.double()
    x = torch.randn(2, 4100, 20, dtype=torch.float64)
    mask = torch.arange(4100) < torch.tensor([[4100], [2300]])
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="view"):
            theirs(x, mask)
        found = ours(x, mask)
        for row, (one, valid) in enumerate(zip(x.split(1), mask.split(1), strict=True)):
            close(found[row : row + 1], theirs(one, valid), TOLERANCE)


@pytest.mark.parametrize("name", ["granite speech", "granite speech plus", "granite speech 5"])
def test_all_outputs_of_granite_speech(name):
    """Twice, as upstream adds to the output of its middle layer in place, and records the outputs of attention."""
    theirs, ours, call = pair(name)
    asked = {"output_hidden_states": True, "output_attentions": name != "granite speech 5"}
    results = {}
    for model in (theirs, ours):
        hooks = (
            model.register_forward_pre_hook(lambda _, args, given: (args, given | asked), with_kwargs=True),
            model.register_forward_hook(lambda module, _, y: results.setdefault(module, []).append(y)),
        )
        with torch.no_grad():
            call(model), call(model)
        for hook in hooks:
            hook.remove()
    for found, expected in zip(results[ours], results[theirs], strict=True):
        pairs = [*zip(found.hidden_states, expected.hidden_states, strict=True)]
        pairs += zip(found.attentions or (), expected.attentions or (), strict=True)
        assert len(pairs) >= len(ours.layers)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_granite_speech5_with_norms_of_float32():
    """As from_pretrained loads it in 16 bits."""
    theirs, ours, call = pair("granite speech 5")
    exact = copy.deepcopy(theirs).double().eval()
    for model in (theirs, ours):
        model.bfloat16().eval()
        for layer in model.layers:
            layer.conv.norm.float()
    with torch.no_grad():
        truth = inputs_in(torch.float64, call)(exact)[0]
        found, expected = (inputs_in(torch.bfloat16, call)(model)[0] for model in (ours, theirs))
    assert found.dtype == expected.dtype
    assert (found - truth).abs().mean() <= 1.5 * (expected - truth).abs().mean()
