# SPDX-License-Identifier: Apache-2.0
"""A tiny model of every framework, and a call of it: what tests of all rules run over.

``FAMILIES[name]()`` returns (model, run): the model in eval mode with parameters away from their first values, and a
function (model) -> list of tensors that runs it in the mode that it is in. It raises pytest's Skipped if the framework
is not installed. Together the models have a module for every rule.
"""

import copy
import importlib.util
import os
import sys
import types

import nemo_encoder
import pytest
import tiny_emformer_rnnt
import torch
from steps import moved, numbers, seeded
from tiny_parakeet import SIZES, STILL, transducer
from tiny_transformers import (
    HEADS,
    HIDDEN,
    WAV2VEC2S,
    WAVEFORMS,
    WIDTH,
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
    whisper,
)

TAPS = 7


def torchaudio_conformer(dropout=0.1, **options):
    models = pytest.importorskip("torchaudio.models")
    return models.Conformer(WIDTH, HEADS, HIDDEN, 2, TAPS, dropout=dropout, **options)


def wav2vec2_conformer(dropout=0.1, **options):
    transformers = pytest.importorskip("transformers")
    rates = ("activation_dropout", "attention_dropout", "hidden_dropout", "conformer_conv_dropout")
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        conv_depthwise_kernel_size=TAPS,
        hidden_act="swish",
        max_source_positions=64,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.0,
        attn_implementation="sdpa",  # as a whole model sets it; upstream's code serves None
        **dict.fromkeys(rates, dropout),
        **options,
    )
    module = pytest.importorskip("transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer")
    return module.Wav2Vec2ConformerEncoder(config)


def fastspeech2_conformer(dropout=0.1, **options):
    transformers = pytest.importorskip("transformers")
    rates = ("dropout_rate", "positional_dropout_rate", "attention_dropout_rate")
    config = transformers.FastSpeech2ConformerConfig(
        hidden_size=WIDTH,
        **{
            f"{part}_{key}": value
            for part in ("encoder", "decoder")
            for key, value in (("layers", 2), ("num_attention_heads", HEADS), ("linear_units", HIDDEN))
        },
        **{f"encoder_{rate}": dropout for rate in rates},
        encoder_kernel_size=TAPS,
        **options,
    )
    module = pytest.importorskip("transformers.models.fastspeech2_conformer.modeling_fastspeech2_conformer")
    made = module.FastSpeech2ConformerEncoder(config, config.encoder_config)
    return with_position_biases(made)  # Only a whole FastSpeech2ConformerModel overwrites them.


def with_position_biases(model):
    """Returns the model with zeros as biases of its positions, which upstream leaves as uninitialised memory."""
    for key, parameter in model.named_parameters():
        if "pos_bias" in key:
            torch.nn.init.zeros_(parameter)
    return model


def espnet_conformer(dropout=0.1, **options):
    module = pytest.importorskip("espnet2.asr.encoder.conformer_encoder")
    sizes = {
        "output_size": WIDTH,
        "attention_heads": HEADS,
        "linear_units": HIDDEN,
        "cnn_module_kernel": TAPS,
    }
    kinds = {
        "rel_pos_type": "latest",
        "pos_enc_layer_type": "rel_pos",
        "selfattention_layer_type": "rel_selfattn",
    }
    rates = dict.fromkeys(("dropout_rate", "positional_dropout_rate", "attention_dropout_rate"), dropout)
    return module.ConformerEncoder(
        WIDTH, num_blocks=2, input_layer="linear", macaron_style=True, **sizes, **kinds, **rates, **options
    )


def nemo_conformer(dropout=0.1, **options):
    rates = ("dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att")
    return nemo_encoder.load().ConformerEncoder(
        feat_in=WIDTH,
        n_layers=2,
        d_model=WIDTH,
        n_heads=HEADS,
        ff_expansion_factor=HIDDEN // WIDTH,
        conv_kernel_size=TAPS,
        **{"subsampling": "dw_striding", "subsampling_factor": 4, "subsampling_conv_channels": 4} | options,
        **dict.fromkeys(rates, dropout),
    )


def speechbrain_conformer(dropout=0.1, **options):
    module = pytest.importorskip("speechbrain.lobes.models.transformer.Conformer")
    return module.ConformerEncoder(2, WIDTH, HIDDEN, HEADS, TAPS, dropout=dropout, **options)


def speechbrain_transformer(lengths=(21, 13, 5), masked=True, **options):
    def made():
        module = pytest.importorskip("speechbrain.lobes.models.transformer.Transformer")
        sizes = {"normalize_before": True, "dropout": 0.1}
        model = module.TransformerEncoder(3, HEADS, HIDDEN, d_model=WIDTH, **sizes | options)
        x = torch.randn(len(lengths), max(lengths), WIDTH, generator=numbers(1))
        hidden = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None] if masked else None
        return model, lambda model: [model(x, src_key_padding_mask=hidden)[0]]

    return made


def torchaudio_padded(lengths=(21, 13, 5), **options):
    model = torchaudio_conformer(**options)
    x = torch.randn(len(lengths), max(lengths), WIDTH, generator=numbers(1))
    return model, lambda model: [model(x, torch.tensor(lengths))[0]]


def call(name, net, x, lengths):
    if name in ("torchaudio", "espnet"):
        return net(x, lengths)[0]
    if name == "nemo":
        return net(audio_signal=x.transpose(1, 2), length=lengths)[0]
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    if name == "speechbrain":
        positions = torch.randn(1, 2 * x.shape[1] - 1, WIDTH, dtype=x.dtype, generator=numbers(5))
        return net(x, src_key_padding_mask=~mask, pos_embs=positions)[0]
    mask = mask.unsqueeze(1).int() if name == "fastspeech2" else mask
    return net(x.clone(), attention_mask=mask)[0]


def conformer(name):
    def made(**options):
        model = MODELS[name](**options)
        x, lengths = torch.randn(3, 21, WIDTH, generator=numbers(1)), torch.tensor([21, 13, 5])
        return model, lambda model: [call(name, model, x, lengths)]

    return made


MODELS = {
    "espnet": espnet_conformer,
    "fastspeech2": fastspeech2_conformer,
    "nemo": nemo_conformer,
    "speechbrain": speechbrain_conformer,
    "torchaudio": torchaudio_conformer,
    "wav2vec2": wav2vec2_conformer,
}


def nemo_local(**options):
    made = nemo_conformer(
        self_attention_model="rel_pos_local_attn",
        att_context_size=[3, 3],
        conv_norm_type="layer_norm",
        **options,
    )
    x, lengths = torch.randn(3, 41, WIDTH, generator=numbers(1)), torch.tensor([41, 23, 9])
    return made, lambda model: [call("nemo", model, x, lengths)]


def nemo_striding(**options):
    made = nemo_conformer(subsampling="striding", **options)
    x, lengths = torch.randn(3, 41, WIDTH, generator=numbers(1)), torch.tensor([41, 23, 9])
    return made, lambda model: [call("nemo", model, x, lengths)]


def nemo_transformer(lengths=(80, 51, 0), **options):
    def made():
        sizes = {"d_model": 32, "n_heads": HEADS, "n_layers": 2, "ff_expansion": 1.5}
        model = nemo_encoder.load_transformer().TransformerEncoder(feat_in=WIDTH, **sizes, **options)
        x = torch.randn(len(lengths), WIDTH, max(lengths), generator=numbers(1))
        return model, lambda model: [model(x, torch.tensor(lengths))[0]]

    return made


def firered(lengths=(83, 51, 30), dropout=0.1):
    def made():
        module = pytest.importorskip("fireredasr.models.module.conformer_encoder")
        sizes = {"idim": 20, "n_layers": 2, "n_head": HEADS, "d_model": WIDTH, "kernel_size": TAPS}
        rates = dict.fromkeys(("residual_dropout", "dropout_rate"), dropout)
        x = torch.randn(len(lengths), max(lengths), 20, generator=numbers(1))
        model = module.ConformerEncoder(**sizes, **rates, pe_maxlen=64)
        return model, lambda model: [model(x, torch.tensor(lengths))[0]]

    return made


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


def funasr(lengths=(43, 21, 9), **options):
    """Paraformer's encoder; SenseVoice's has the same classes of layers."""

    def made():
        module = without_init("funasr.models.sanm.encoder")
        sizes = {"output_size": WIDTH, "attention_heads": HEADS, "linear_units": HIDDEN, "num_blocks": 3}
        model = module.SANMEncoder(20, **sizes | {"input_layer": "pe", "kernel_size": 7} | options)
        x = torch.randn(len(lengths), max(lengths), 20, generator=numbers(1))
        return model, lambda model: [model(x, torch.tensor(lengths))[0]]

    return made


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


def openai_whisper(frames=24, layers=2):
    """The encoder of the package openai-whisper."""

    def made():
        module = load_openai_whisper()
        model = module.AudioEncoder(5, frames // 2, WIDTH, HEADS, layers)
        x = torch.randn(2, 5, frames, generator=numbers(1))
        return model, lambda model: [model(x)]

    return made


def gigaam(kind, lengths=(83, 51, 30)):
    def made():
        module = without_init("gigaam.encoder")
        sizes = {"feat_in": 20, "n_layers": 2, "d_model": WIDTH, "n_heads": HEADS, "conv_kernel_size": TAPS}
        model = module.ConformerEncoder(**sizes, self_attention_model=kind, pos_emb_max_len=64)
        x = torch.randn(len(lengths), 20, max(lengths), generator=numbers(1))
        return with_position_biases(model), lambda model: [model(x, torch.tensor(lengths))[0]]

    return made


def zipformer(lengths=None):
    pytest.importorskip("zipformer")
    import tiny_zipformer

    x, of_batch = tiny_zipformer.batch()
    lengths = of_batch if lengths is None else torch.tensor(lengths)
    return tiny_zipformer.tiny(), lambda model: [model(x, lengths)[0]]


def causal_zipformer():
    """A chunk of a stream in eval mode, whole recordings in training."""
    pytest.importorskip("zipformer")
    import tiny_zipformer
    from zipformer.modules.zipformer import Zipformer

    chunks = {"causal": True, "chunk_size": (8,), "left_context_frames": (16,)}
    with tiny_zipformer.plain_swoosh():
        made = tiny_zipformer.set_batch_count(
            Zipformer(**tiny_zipformer.TINY, **chunks, dropout=0.1), 20000.0
        )
    x, lengths = torch.randn(32, 2, 32, generator=numbers(1)), torch.tensor([32, 32])
    of_chunk, mask, start = (
        torch.tensor([16, 16]),
        torch.zeros(2, 32, dtype=torch.bool),
        made.get_init_states(2),
    )

    def run(model):
        if model.training:
            return [model(x, lengths, mask)[0]]
        found, states = [], [state.clone() for state in start]
        for chunk in x.split(16):
            y, _, states = model.streaming_forward(chunk, of_chunk, states, mask)
            found.append(y)
        return found

    return made, run


def zipvoice(time=2, padded=True, stream=None, **options):
    """ZipVoice's decoder or encoders. ``time``: the dimensions of the time step, or None without. ``stream``: the pairs
    of widths of the dialogue model, and which of them the input has."""

    def made():
        pytest.importorskip("zipvoice")
        from zipvoice.models.modules import zipformer as of_one
        from zipvoice.models.modules import zipformer_two_stream as of_two

        sizes = {"downsampling_factor": (1, 2, 1), "num_encoder_layers": (1, 2, 1), "num_heads": 4}
        sizes |= {"encoder_dim": 32, "query_head_dim": 8, "value_head_dim": 6, "feedforward_dim": 48}
        sizes |= {"cnn_module_kernel": (7, 5, 7), "pos_dim": 16, "time_embed_dim": 12}
        sizes |= {"use_time_embed": time is not None, "in_dim": 10, "out_dim": 6}
        if stream is None:
            model, width = of_one.TTSZipformer(**sizes | options), 10
        else:
            (first, second), which = stream
            model = of_two.TTSZipformerTwoStream(**sizes | {"in_dim": (first, second), "out_dim": (6, 12)})
            width = stream[0][which]
        x = torch.randn(2, 21, width, generator=numbers(1))
        t = None if time is None else torch.rand((2, 21)[:time], generator=numbers(2))
        padding = torch.arange(21) >= torch.tensor([21, 15])[:, None] if padded else None
        return model, lambda model: [model(x, t, padding)]

    return made


def zipformer_recogniser():
    """The losses of an AsrModel with a transducer; k2's are those of fastasr.compat."""
    module = pytest.importorskip("zipformer.modules.model")
    import tiny_recogniser
    import tiny_zipformer

    import fastasr.compat.k2

    sizes = tiny_recogniser.RECOGNISER | tiny_recogniser.WHOLE | {"feature_dim": 20, "vocab_size": 11}
    with tiny_zipformer.plain_swoosh():
        made = tiny_zipformer.set_batch_count(module.AsrModel(**sizes), 20000.0)
    x, lengths = torch.randn(2, 60, 20, generator=numbers(1)), torch.tensor([60, 52])

    def run(model):
        module.k2 = fastasr.compat.k2
        return list(model(x, lengths, [[3, 5, 5, 2], [7, 1]], prune_range=3)[:2])

    return made, run


def e_branchformer(**options):
    module = pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder")
    sizes = {"output_size": 24, "attention_heads": 3, "cgmlp_linear_units": 36, "cgmlp_conv_kernel": 7}
    sizes |= {
        "num_blocks": 2,
        "linear_units": 28,
        "use_ffn": True,
        "macaron_ffn": True,
        "input_layer": "linear",
    }
    x, lengths = torch.randn(3, 27, 20, generator=numbers(1)), torch.tensor([27, 20, 11])
    model = module.EBranchformerEncoder(20, **sizes, **options)
    return model, lambda model: [model(x, lengths)[0]]


PLAIN_ATTENTION = {"attention_layer_type": "selfattn", "pos_enc_layer_type": "abs_pos"}  # as OWSM's


def espnet_transformer(lengths=(27, 20, 11), **options):
    def made():
        module = pytest.importorskip("espnet2.asr.encoder.transformer_encoder")
        sizes = {"output_size": WIDTH, "attention_heads": HEADS, "linear_units": HIDDEN, "num_blocks": 2}
        x = torch.randn(len(lengths), max(lengths), 20, generator=numbers(1))
        model = module.TransformerEncoder(20, **sizes | {"input_layer": "linear"} | options)
        return model, lambda model: [model(x, torch.tensor(lengths))[0]]

    return made


class FrontEnds(torch.nn.Module):
    """Each of ESPnet's front ends on the same features."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x, mask):
        found = [layer(x, mask) for layer in self.layers]
        return [y * mask.transpose(1, 2) for (y, positions), mask in found]


def espnet_front_ends():
    module = pytest.importorskip("espnet.nets.pytorch_backend.transformer.subsampling")
    embedding = pytest.importorskip("espnet.nets.pytorch_backend.transformer.embedding")
    made = FrontEnds(
        getattr(module, f"Conv2dSubsampling{kind}")(
            20, WIDTH, 0.1, embedding.RelPositionalEncoding(WIDTH, 0.1)
        )
        for kind in ("", "1", "2", "6")
    )
    x, lengths = torch.randn(3, 27, 20, generator=numbers(1)), torch.tensor([27, 20, 11])
    mask = (torch.arange(27) < lengths.unsqueeze(1)).unsqueeze(1)
    return made, lambda model: model(x, mask)


def torchaudio_wav2vec2(make="wav2vec2_model", lengths=(400, 310, 90), masked=True, **options):
    """torchaudio's wav2vec 2.0, HuBERT and, without lengths, WavLM, on the waveform."""

    def made():
        models = pytest.importorskip("torchaudio.models")
        sizes = {
            "extractor_mode": "group_norm",
            "extractor_conv_layer_config": [(16, 4, 2), (12, 3, 2), (20, 2, 2)],
            "extractor_conv_bias": False,
            "encoder_embed_dim": WIDTH,
            "encoder_pos_conv_kernel": 4,
            "encoder_pos_conv_groups": 2,
            "encoder_num_layers": 2,
            "encoder_num_heads": HEADS,
            "encoder_ff_interm_features": HIDDEN,
            "encoder_layer_norm_first": False,
            "encoder_layer_drop": 0.0,
            "encoder_attention_dropout": 0.0,
            "aux_num_out": None,
        }
        parts = ("projection_dropout", "ff_interm_dropout", "dropout")
        sizes |= {f"encoder_{part}": 0.1 for part in parts}
        if make == "wavlm_model":
            sizes |= {"encoder_num_buckets": 8, "encoder_max_distance": 10}
        model = getattr(models, make)(**sizes | options)
        x = torch.randn(len(lengths), max(lengths), generator=numbers(1))
        given = (torch.tensor(lengths),) if masked else ()
        return model, lambda model: [model(x, *given)[0]]

    return made


LARGE = {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}


def emformer(streams=False):
    """Whole utterances, or the segments of a stream."""
    module = pytest.importorskip("torchaudio.models.emformer")
    sizes = {"left_context_length": 5, "right_context_length": 2, "max_memory_size": 2, "dropout": 0.1}
    x, lengths, of_segment = (
        torch.randn(3, 23, 12, generator=numbers(1)),
        *map(torch.tensor, ([21, 15, 9], [6] * 3)),
    )

    def segments(model):
        states, found = None, []
        for begin in range(0, 12, 4):
            y, _, states = model.infer(x[:, begin : begin + 6], of_segment, states)
            found.append(y)
        return found

    made = module.Emformer(12, 3, 20, 2, 4, **sizes)
    return made, segments if streams else lambda model: [model(x, lengths)[0]]


def emformer_rnnt():
    module = pytest.importorskip("torchaudio.models.rnnt")
    x, lengths = torch.randn(2, 40, 6, generator=numbers(1)), torch.tensor([36, 28])
    labels, counts = torch.randint(0, 9, (2, 5), generator=numbers(2)), torch.tensor([5, 3])

    def run(model):
        return [model(x, lengths, labels, counts)[0]]

    return tiny_emformer_rnnt.tiny(module), run


def mega(**options):
    module = pytest.importorskip("espnet2.asr_transducer.decoder.mega_decoder")
    sizes = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 20, "num_heads": 2}
    labels = torch.randint(1, 12, (3, 9), generator=numbers(1))
    made = module.MEGADecoder(12, **sizes, num_blocks=2, max_positions=24, **options)
    start = made.init_state()

    def run(model):
        if model.training:
            return [model(labels)]
        model.score_cache.clear()
        found, states = [model(labels)], copy.deepcopy(start)
        for length in range(1, 4):
            y, states = model.score([0, 4, 7][:length], states)
            found.append(y)
        return found

    return made, run


def parakeet(lengths=(75, 50, 9), **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.ParakeetEncoderConfig(**SIZES | options)
    x = torch.randn(3, 75, SIZES["num_mel_bins"], generator=numbers(1))
    mask = (torch.arange(75) < torch.tensor(lengths)[:, None]).long()
    model = transformers.ParakeetEncoder(config)
    return model, lambda model: [model(x, attention_mask=mask).last_hidden_state]


def lasr():
    transformers = pytest.importorskip("transformers")
    names = "subsampling_conv_channels", "num_mel_bins", "num_hidden_layers", "intermediate_size"
    sizes = {name: SIZES[name] for name in names} | {"hidden_size": 24, "num_attention_heads": 2}
    config = transformers.LasrEncoderConfig(**sizes, conv_kernel_size=6, layerdrop=0.0)
    x = torch.randn(3, 75, sizes["num_mel_bins"], generator=numbers(1))
    mask = torch.arange(75) < torch.tensor([75, 50, 30])[:, None]
    model = transformers.LasrEncoder(config)
    return model, lambda model: [model(x, attention_mask=mask).last_hidden_state]


def granite_speech(kind="", frames=53, **options):
    """Padding is frames of 0, which the encoder cannot tell from others."""

    def made():
        transformers = pytest.importorskip("transformers")
        folder = f"granite_speech_{kind.lower()}".rstrip("_")
        module = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
        sizes = {"input_dim": 20, "hidden_dim": WIDTH, "num_layers": 2, "num_heads": HEADS, "dim_head": 12}
        sizes |= {"output_dim": 11, "context_size": 20, "max_pos_emb": 24, "conv_kernel_size": TAPS}
        name = f"GraniteSpeech{kind}"
        config = getattr(transformers, f"{name}EncoderConfig")(**sizes | options)
        x = torch.randn(2, frames, 20, generator=numbers(1))
        x[1, frames // 2 :] = 0.0
        return getattr(module, f"{name}CTCEncoder")(config), lambda model: [model(x).last_hidden_state]

    return made


def granite_speech5(lengths=(44, 30), **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    sizes |= {"vocab_size": 11, "num_mel_bins": 5, "context_size": 8, "activation_dropout": 0.1}
    config = transformers.GraniteSpeech5EncoderConfig(**sizes | options)
    x = torch.randn(len(lengths), max(lengths), 20, generator=numbers(1))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    model = transformers.GraniteSpeech5Encoder(config)
    return model, lambda model: [model(x, attention_mask=mask).last_hidden_state]


def phi4_audio(frames=83, lengths=(83, 60), masked=True, **options):
    """Padding is hardly hidden: upstream adds its mask to the scores as 0 and 1. It cannot cut several recordings of
    more than 500 frames behind the front end."""

    def made():
        transformers = pytest.importorskip("transformers")
        module = pytest.importorskip("transformers.models.phi4_multimodal.modeling_phi4_multimodal")
        sizes = {"hidden_size": 32, "intermediate_size": 40, "num_blocks": 1, "num_attention_heads": HEADS}
        sizes |= {"nemo_conv_channels": 8, "input_size": 20, "ext_pw_out_channel": 32}
        sizes |= {"depthwise_separable_out_channel": 32, "attn_implementation": "sdpa"}
        config = transformers.Phi4MultimodalAudioConfig(**sizes | options)
        x = torch.randn(len(lengths), frames, 20, generator=numbers(1))
        mask = torch.arange(frames) < torch.tensor(lengths)[:, None] if masked else None
        return module.Phi4MultimodalAudioModel(config), lambda model: [model(x, mask)]

    return made


def fun_asr_nano(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "num_mel_bins": 5,
        "num_stacked_frames": 4,
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
    }
    sizes |= {"intermediate_size": HIDDEN, "fsmn_kernel_size": TAPS, "num_timestamp_prediction_layers": 1}
    module = pytest.importorskip("transformers.models.fun_asr_nano.modeling_fun_asr_nano")
    config = transformers.FunAsrNanoEncoderConfig(**sizes | options)
    x = torch.randn(2, 21, 20, generator=numbers(1))
    mask = (torch.arange(21) < torch.tensor([21, 13])[:, None]).long()
    return module.FunAsrNanoEncoder(config), lambda model: [model(x, mask).last_hidden_state]


def of_wav2vec2(
    package, class_name, config_name, lengths=(21, 13, 5), masked=True, implementation="sdpa", **options
):
    """An encoder with modules of Wav2Vec2Conformer's code. ``lengths``: those of the batch."""

    def made():
        transformers = pytest.importorskip("transformers")
        module = pytest.importorskip(f"transformers.models.{package}.modeling_{package}")
        config = getattr(transformers, config_name)(
            hidden_size=WIDTH, conv_depthwise_kernel_size=TAPS, **options
        )
        config._attn_implementation = implementation
        frames = max(lengths)
        x = torch.randn(len(lengths), frames, WIDTH, generator=numbers(1))
        mask = torch.arange(frames) < torch.tensor(lengths)[:, None]

        def run(model):
            found = model(x.clone(), attention_mask=mask if masked else None)
            return [found if isinstance(found, torch.Tensor) else found[0]]

        return getattr(module, class_name)(config), run

    return made


def seamless_v2(**options):
    names = "seamless_m4t_v2", "SeamlessM4Tv2ConformerEncoder", "SeamlessM4Tv2Config"
    return of_wav2vec2(*names, **SEAMLESS | options)


# Each of these acts on some numbers of a tower of random weights.
GEMMA_BOUNDS = {"input_min": -0.9, "input_max": 1.1, "output_min": -0.17, "output_max": 0.16}


def gemma4(lengths=(41, 15), bounds=GEMMA_BOUNDS, **options):
    """The audio tower of Gemma 4, of ``lengths`` frames behind its front end, with these bounds of linear layers."""

    def made():
        transformers = pytest.importorskip("transformers")
        module = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
        sizes = {
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_hidden_layers": 2,
            "output_proj_dims": 8,
        }
        config = transformers.Gemma4AudioConfig(**sizes | {"subsampling_conv_channels": [16, 4]} | options)
        x = torch.randn(len(lengths), 4 * max(lengths), 16, generator=numbers(1))
        mask = torch.arange(4 * max(lengths)) < 4 * torch.tensor(lengths)[:, None]
        model = module.Gemma4AudioModel(config)
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in bounds:
                buffer.fill_(bounds[name.rpartition(".")[2]])
        return model, lambda model: [model(x, mask).last_hidden_state]

    return made


def gemma3n(lengths=(41, 15), **options):
    """The audio tower of Gemma 3n, of ``lengths`` frames behind its front end."""

    def made():
        transformers = pytest.importorskip("transformers")
        module = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
        sizes = {"hidden_size": WIDTH, "conf_num_attention_heads": HEADS, "conf_num_hidden_layers": 2}
        sizes |= {"input_feat_size": 16, "sscp_conv_channel_size": [4, 2], "conf_reduction_factor": 1}
        config = transformers.Gemma3nAudioConfig(**sizes | options)
        x = torch.randn(len(lengths), 4 * max(lengths), 16, generator=numbers(1))
        mask = torch.arange(4 * max(lengths)) >= 4 * torch.tensor(lengths)[:, None]
        return module.Gemma3nAudioEncoder(config), lambda model: [model(x, mask).last_hidden_state]

    return made


def wavlm(stable=False, lengths=(21, 13, 5), masked=True, **options):
    """An encoder of WavLM. ``stable``: the large model's, with norms before each part."""

    def made():
        transformers = pytest.importorskip("transformers")
        module = pytest.importorskip("transformers.models.wavlm.modeling_wavlm")
        sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": HIDDEN}
        sizes |= {"num_hidden_layers": 3, "num_buckets": 8, "max_bucket_distance": 10, "layerdrop": 0.0}
        sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "attention_dropout": 0.0}
        config = transformers.WavLMConfig(**sizes | options)
        config._attn_implementation = "eager"
        frames = max(lengths)
        x = torch.randn(len(lengths), frames, WIDTH, generator=numbers(1))
        mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
        model = module.WavLMEncoderStableLayerNorm if stable else module.WavLMEncoder
        given = {"attention_mask": mask} if masked else {}
        # Upstream sets padding to 0 in its input.
        return model(config), lambda model: [model(x.clone(), **given).last_hidden_state]

    return made


def w2v_bert(**options):
    return of_wav2vec2("wav2vec2_bert", "Wav2Vec2BertEncoder", "Wav2Vec2BertConfig", **W2V_BERT, **options)


SEAMLESS = {
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": HEADS,
    "speech_encoder_intermediate_size": HIDDEN,
    "speech_encoder_dropout": 0.1,
    "speech_encoder_layerdrop": 0.0,
}
W2V_BERT = {
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "layerdrop": 0.0,
}


def nemotron(**options):
    pytest.importorskip("transformers.models.nemotron_asr_streaming")
    from transformers import NemotronAsrStreamingEncoder
    from transformers.models.nemotron_asr_streaming import (
        configuration_nemotron_asr_streaming as configuration,
    )

    config = configuration.NemotronAsrStreamingEncoderConfig(**{**SIZES, "sliding_window": 15, **options})
    x = torch.randn(3, 75, SIZES["num_mel_bins"], generator=numbers(1))
    mask = (torch.arange(75) < torch.tensor([75, 50, 9])[:, None]).long()
    model = NemotronAsrStreamingEncoder(config)
    return model, lambda model: [model(input_features=x, attention_mask=mask).last_hidden_state]


def parakeet_transducer(kind):
    """The loss in training, ``generate`` in eval mode."""

    def made():
        model = transducer(kind, SIZES | {"num_hidden_layers": 1})
        model.generation_config.decoder_start_token_id = 11
        if kind == "TDT":
            model.generation_config.suppress_tokens = list(range(12, 17))
        with torch.no_grad():
            for parameter in [*model.decoder.parameters(), *model.joint.parameters()]:
                parameter.normal_(std=0.8)
            model.encoder_projector.weight.normal_(std=2.0)
        lengths = torch.tensor([90, 61, 75])
        labels = torch.randint(1, 11, (3, 4), generator=numbers(2))
        inputs = {
            "input_features": torch.randn(3, 90, SIZES["num_mel_bins"], generator=numbers(1)),
            "attention_mask": (torch.arange(90) < lengths[:, None]).long(),
        }
        contexts = torch.nn.functional.pad(labels, (1, 0), value=11)

        def run(model):
            if not model.training:
                return [model.generate(**inputs, max_new_tokens=20).sequences.float()]
            import fastasr.compat.torchaudio

            fastasr.compat.torchaudio.install()  # upstream's RNN-T loss needs a torchaudio
            try:
                return [model(**inputs, decoder_input_ids=contexts, labels=labels).loss]
            finally:
                fastasr.compat.torchaudio.uninstall()

        return model, run

    return made


def nemo_joint(kind="rnnt", name="pytorch", **options):
    """NeMo's fused joint: its loss."""

    def made():
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

    return made


class _Wer:
    """Stands for NeMo's metric, which these calls do not ask for."""


FAMILIES = {
    **{f"{name} conformer": conformer(name) for name in MODELS},
    "nemo local": nemo_local,
    "nemo striding": nemo_striding,
    "nemo transformer": nemo_transformer(),
    "nemo transformer, causal": nemo_transformer(attn_mode="causal", qk_norm=True, qkv_bias=True),
    "speechbrain transformer": speechbrain_transformer(),
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
    "seamless m4t": of_wav2vec2(
        "seamless_m4t",
        "SeamlessM4TConformerEncoder",
        "SeamlessM4TConfig",
        max_source_positions=64,
        **SEAMLESS,
    ),
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
