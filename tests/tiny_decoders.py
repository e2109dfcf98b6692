# SPDX-License-Identifier: Apache-2.0
"""Tiny models of transformers with an encoder and a decoder, and layers of decoders or their attention.
``tests/families.py`` says what a maker returns."""

import nemo_encoder
import pytest
import torch
from steps import numbers
from tiny_transformers import HEADS, WIDTH

TOKENS = {"vocab_size": 23, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
FFN = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART = {"d_model": 16, "decoder_start_token_id": 1} | TOKENS | LAYERS | FFN
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = ENCODER | {"num_hidden_layers": 2}
PARAKEET = ENCODER | {"num_mel_bins": 24, "subsampling_conv_channels": 4}


def _package():
    return pytest.importorskip("transformers")


def features(mels, frames, name="input_features"):
    return {name: torch.randn(2, *((mels, frames) if mels else (frames,)), generator=numbers(1)).double()}


def batch(frames, *shape, name="input_features"):
    """Two recordings, the second of which has padding."""
    mask = torch.arange(frames) < torch.tensor([[frames], [frames * 2 // 3]])
    return features(*shape, name=name) | {"attention_mask": mask.long()}


def whisper(**more):
    sizes = {"num_mel_bins": 5, "max_source_positions": 12, "max_target_positions": 30}
    config = _package().WhisperConfig(**BART | sizes | more)
    return _package().WhisperForConditionalGeneration(config), features(5, 24)


def speech2text():
    config = _package().Speech2TextConfig(**BART, input_feat_per_channel=24, conv_channels=12)
    return _package().Speech2TextForConditionalGeneration(config), batch(40, 40, 24)


def moonshine():
    heads = {f"{part}_num_attention_heads": 2 for part in ("encoder", "decoder")}
    layers = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 2}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "decoder_start_token_id": 1}
    config = _package().MoonshineConfig(**TOKENS, **sizes, **heads, **layers)
    return _package().MoonshineForConditionalGeneration(config), batch(8000, None, 8000, name="input_values")


def moonshine_streaming():
    encoder = ENCODER | {"num_key_value_heads": 2, "sliding_windows": [[4, 1]]}
    sizes = DECODER | {"decoder_start_token_id": 1, "num_key_value_heads": 2, "encoder_config": encoder}
    config = _package().MoonshineStreamingConfig(**TOKENS, **sizes)
    model = _package().MoonshineStreamingForConditionalGeneration(config)
    return model, batch(8000, None, 8000, name="input_values")


def seamless(version=""):
    sizes = {
        "hidden_size": 16,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 1,
        "speech_encoder_layers": 1,
    }
    sizes |= {
        "speech_encoder_attention_heads": 2,
        "speech_encoder_intermediate_size": 32,
        "adaptor_kernel_size": 3,
    }
    sizes |= {"adaptor_stride": 3, "feature_projection_input_dim": 12, "num_adapter_layers": 1}
    config = getattr(_package(), f"SeamlessM4T{version}Config")(**TOKENS, **LAYERS, **FFN, **sizes)
    return getattr(_package(), f"SeamlessM4T{version}ForSpeechToText")(config), batch(30, 30, 12)


def canary():
    decoder = DECODER | TOKENS | {"head_dim": 8, "num_key_value_heads": 2}
    config = _package().CanaryConfig(
        encoder_config=PARAKEET, decoder_config=decoder, **TOKENS, decoder_start_token_id=7
    )
    return _package().CanaryForConditionalGeneration(config), batch(64, 64, 24)


def cohere_asr():
    sizes = DECODER | TOKENS | {"decoder_start_token_id": 7, "encoder_config": PARAKEET}
    config = _package().CohereAsrConfig(**sizes)
    return _package().CohereAsrForConditionalGeneration(config), batch(64, 64, 24)


def speechbrain_recogniser(tokens, width, inputs=None, layers=2, first=True):
    """SpeechBrain's Transformer with its output layer, for frames of ``inputs`` channels. ``first``: norms come before
    the blocks."""
    home = pytest.importorskip("speechbrain.lobes.models.transformer.TransformerASR")
    last = pytest.importorskip("speechbrain.nnet.linear").Linear(tokens, input_size=width)
    sizes = {"d_model": width, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": layers, "d_ffn": 32}
    asr = home.TransformerASR(tokens, inputs or width, **sizes, normalize_before=first, causal=False)
    return torch.nn.ModuleList((asr, last))


MAKERS = {f.__name__: f for f in (whisper, speech2text, moonshine, moonshine_streaming, canary, cohere_asr)}
MAKERS |= {"seamless": seamless, "seamless v2": lambda: seamless("v2")}

# Where a decoder's layer is
PLACES = dict.fromkeys(MAKERS, "model.decoder.layers.0")
PLACES |= dict.fromkeys(("seamless", "seamless v2"), "text_decoder.layers.0")


class Decoders(torch.nn.Module):
    """Layers of several decoders with the same frames. Their outputs lie one behind the other."""

    def __init__(self, parts):
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, x, states):
        found = [_of_layer(part, x, states) for part in self.parts]
        return torch.cat([y[0] if isinstance(y, tuple) else y for y in found], 1)


def _of_layer(layer, x, states):
    if hasattr(layer, "first_sub_layer"):  # NeMo's
        return layer(x, None, x, states, None)
    if hasattr(layer, "src_attn"):  # ESPnet's
        return layer(x, None, states, None)
    if hasattr(layer, "self_attn_norm"):  # FireRedASR's
        return layer(x, states, None, None)
    angles = torch.linspace(0, 2, x.shape[1] * 4, dtype=x.dtype).view(1, -1, 4)
    rotary = type(layer).__name__.startswith("Moonshine")
    more = {"position_embeddings": (angles.cos(), angles.sin())} if rotary else {}
    return layer(x, encoder_hidden_states=states, **more)


def _called(parts):
    x, states = (torch.randn(3, n, WIDTH, generator=numbers(n)) for n in (4, 9))
    return Decoders(parts), lambda model: [model(x, states)]


def decoder_layers():
    """Those of transformers."""
    return _called([MAKERS[name]()[0].get_submodule(path) for name, path in PLACES.items()])


def espnet_layer(width=WIDTH):
    home = pytest.importorskip("espnet2.asr.decoder.transformer_decoder")
    sizes = {"attention_heads": HEADS, "linear_units": 2 * width, "num_blocks": 1}
    return home.TransformerDecoder(9, width, **sizes).decoders[0]


def firered_layer(width=WIDTH):
    home = pytest.importorskip("fireredasr.models.module.transformer_decoder")
    return home.DecoderLayer(width, HEADS, 0.1)


def nemo_layer(width=WIDTH):
    decoders = nemo_encoder.load_decoder()[0]
    return decoders.TransformerDecoderBlock(width, 2 * width, HEADS, 0.1, 0.1, 0.1, pre_ln=True)


PROJECTING = {"espnet": espnet_layer, "fireredasr": firered_layer, "nemo": nemo_layer}


def projecting_layers():
    """Those whose searches project the frames, and earlier tokens, at every step."""
    return _called([make() for make in PROJECTING.values()])
