# SPDX-License-Identifier: Apache-2.0
"""Tiny Conformers: of six packages in one size, with a call that serves all; and other ones of transformers.
``tests/families.py`` says what a maker returns."""

import nemo_encoder
import pytest
import torch
from steps import maker, numbers
from tiny_transformers import HEADS, HIDDEN, WIDTH, batch, transformers_encoder

TAPS = 7


def torchaudio_conformer(dropout=0.1, **options):
    models = pytest.importorskip("torchaudio.models")
    return models.Conformer(WIDTH, HEADS, HIDDEN, 2, TAPS, dropout=dropout, **options)


def wav2vec2_conformer(dropout=0.1, **options):
    rates = ("activation_dropout", "attention_dropout", "hidden_dropout", "conformer_conv_dropout")
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": 2,
        "conv_depthwise_kernel_size": TAPS,
        "hidden_act": "swish",
        "max_source_positions": 64,
        "num_conv_pos_embedding_groups": 2,
        "layerdrop": 0.0,
    }
    names = "wav2vec2_conformer", "Wav2Vec2ConformerEncoder", "Wav2Vec2ConformerConfig"
    return transformers_encoder(*names, sizes | dict.fromkeys(rates, dropout), **options)


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


MODELS = {
    "espnet": espnet_conformer,
    "fastspeech2": fastspeech2_conformer,
    "nemo": nemo_conformer,
    "speechbrain": speechbrain_conformer,
    "torchaudio": torchaudio_conformer,
    "wav2vec2": wav2vec2_conformer,
}


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


@maker
def conformer(name, **options):
    x, lengths = torch.randn(3, 21, WIDTH, generator=numbers(1)), torch.tensor([21, 13, 5])
    return MODELS[name](**options), lambda model: [call(name, model, x, lengths)]


def torchaudio_padded(lengths=(21, 13, 5), **options):
    model = torchaudio_conformer(**options)
    x = torch.randn(len(lengths), max(lengths), WIDTH, generator=numbers(1))
    return model, lambda model: [model(x, torch.tensor(lengths))[0]]


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


@maker
def of_wav2vec2(
    package, class_name, config_name, lengths=(21, 13, 5), masked=True, implementation="sdpa", **options
):
    """An encoder with modules of Wav2Vec2Conformer's code. ``lengths``: those of the batch."""
    sizes = {"hidden_size": WIDTH, "conv_depthwise_kernel_size": TAPS}
    encoder = transformers_encoder(package, class_name, config_name, sizes, implementation, **options)
    x, mask = batch(lengths, WIDTH)

    def run(model):
        found = model(x.clone(), attention_mask=mask if masked else None)
        return [found if isinstance(found, torch.Tensor) else found[0]]

    return encoder, run


SEAMLESS = {
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": HEADS,
    "speech_encoder_intermediate_size": HIDDEN,
    "speech_encoder_dropout": 0.1,
    "speech_encoder_layerdrop": 0.0,
}


def seamless(**options):
    names = "seamless_m4t", "SeamlessM4TConformerEncoder", "SeamlessM4TConfig"
    return of_wav2vec2(*names, **SEAMLESS | options)


def seamless_v2(**options):
    names = "seamless_m4t_v2", "SeamlessM4Tv2ConformerEncoder", "SeamlessM4Tv2Config"
    return of_wav2vec2(*names, **SEAMLESS | options)


W2V_BERT = {
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "layerdrop": 0.0,
}


def w2v_bert(**options):
    return of_wav2vec2("wav2vec2_bert", "Wav2Vec2BertEncoder", "Wav2Vec2BertConfig", **W2V_BERT, **options)


@maker
def granite_speech(kind="", frames=53, **options):
    """Padding is frames of 0, which the encoder cannot tell from others."""
    sizes = {"input_dim": 20, "hidden_dim": WIDTH, "num_layers": 2, "num_heads": HEADS, "dim_head": 12}
    sizes |= {"output_dim": 11, "context_size": 20, "max_pos_emb": 24, "conv_kernel_size": TAPS}
    folder, name = f"granite_speech_{kind.lower()}".rstrip("_"), f"GraniteSpeech{kind}"
    model = transformers_encoder(folder, f"{name}CTCEncoder", f"{name}EncoderConfig", sizes, None, **options)
    x = torch.randn(2, frames, 20, generator=numbers(1))
    x[1, frames // 2 :] = 0.0
    return model, lambda model: [model(x).last_hidden_state]


def granite_speech5(lengths=(44, 30), **options):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    sizes |= {"vocab_size": 11, "num_mel_bins": 5, "context_size": 8, "activation_dropout": 0.1}
    names = "granite_speech5", "GraniteSpeech5Encoder", "GraniteSpeech5EncoderConfig"
    model = transformers_encoder(*names, sizes, None, **options)
    x, mask = batch(lengths, 20)
    return model, lambda model: [model(x, attention_mask=mask).last_hidden_state]


@maker
def phi4_audio(frames=83, lengths=(83, 60), masked=True, **options):
    """Padding is hardly hidden: upstream adds its mask to the scores as 0 and 1. It cannot cut several recordings of
    more than 500 frames behind the front end."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_blocks": 1, "num_attention_heads": HEADS}
    sizes |= {"nemo_conv_channels": 8, "input_size": 20, "ext_pw_out_channel": 32}
    sizes |= {"depthwise_separable_out_channel": 32}
    names = "phi4_multimodal", "Phi4MultimodalAudioModel", "Phi4MultimodalAudioConfig"
    model = transformers_encoder(*names, sizes, **options)
    x = torch.randn(len(lengths), frames, 20, generator=numbers(1))
    mask = torch.arange(frames) < torch.tensor(lengths)[:, None] if masked else None
    return model, lambda model: [model(x, mask)]


# Each of these acts on some numbers of a tower of random weights.
GEMMA_BOUNDS = {"input_min": -0.9, "input_max": 1.1, "output_min": -0.17, "output_max": 0.16}


@maker
def gemma4(lengths=(41, 15), bounds=GEMMA_BOUNDS, **options):
    """The audio tower of Gemma 4, of ``lengths`` frames behind its front end, with these bounds of linear layers."""
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2}
    sizes |= {"output_proj_dims": 8, "subsampling_conv_channels": [16, 4]}
    names = "gemma4", "Gemma4AudioModel", "Gemma4AudioConfig"
    model = transformers_encoder(*names, sizes, None, **options)
    x = torch.randn(len(lengths), 4 * max(lengths), 16, generator=numbers(1))
    mask = torch.arange(4 * max(lengths)) < 4 * torch.tensor(lengths)[:, None]
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in bounds:
            buffer.fill_(bounds[name.rpartition(".")[2]])
    return model, lambda model: [model(x, mask).last_hidden_state]


@maker
def gemma3n(lengths=(41, 15), **options):
    """The audio tower of Gemma 3n, of ``lengths`` frames behind its front end."""
    sizes = {"hidden_size": WIDTH, "conf_num_attention_heads": HEADS, "conf_num_hidden_layers": 2}
    sizes |= {"input_feat_size": 16, "sscp_conv_channel_size": [4, 2], "conf_reduction_factor": 1}
    names = "gemma3n", "Gemma3nAudioEncoder", "Gemma3nAudioConfig"
    model = transformers_encoder(*names, sizes, None, **options)
    x = torch.randn(len(lengths), 4 * max(lengths), 16, generator=numbers(1))
    mask = torch.arange(4 * max(lengths)) >= 4 * torch.tensor(lengths)[:, None]
    return model, lambda model: [model(x, mask).last_hidden_state]
