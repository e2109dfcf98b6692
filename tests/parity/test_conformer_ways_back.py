# SPDX-License-Identifier: Apache-2.0
"""What a Conformer's blocks leave to upstream's code: it computes what upstream does, is logged once, and
``fastasr.why`` names the reason. ``tests/swap/test_ways_back.py`` has those of all other models."""

import contextlib
import logging
import math

import families
import pytest
import torch
import torch.nn.attention.flex_attention
from leaving import beside, check, unreached
from steps import swapped
from test_conformer import ATTENTION, pair
from tiny_conformers import TAPS, WIDTH

WATCHED = "the attention has hooks, which may read its weights"
REL_ATTENTION = "an input, a mask or positions that rel_attention does not take"
OTHER_KEYS = "the call has frames before its own, or keys of another sequence"
ASKED = "attention weights are asked for"
WEIGHTS_DROPOUT = "the dropout of attention weights has hooks"
OF_TORCHAUDIO = "encoder.transformer.layers.0.attention"
# family, the block that leaves, the part of it that has a hook, the reason
HOOKED = (
    ("wav2vec2 conformer", "layers.0.conv_module", "glu", "glu is not a plain GLU"),
    ("fastspeech2 conformer", "conformer_layers.0.self_attn", "dropout", WEIGHTS_DROPOUT),
    (
        "torchaudio conformer",
        "conformer_layers.0.conv_module",
        "sequential.1",
        "sequential or its glu is not a plain one",
    ),
    ("torchaudio conformer", "conformer_layers.0.ffn1", "sequential", "sequential is not a plain Sequential"),
    ("speechbrain conformer", "layers.0.ffn_module1.1", "ffn", "ffn is not a plain Sequential"),
    ("speechbrain conformer", "layers.0.convolution_module", "after_conv", "a part has hooks"),
    ("nemo conformer", "layers.0.self_attn", "dropout", WEIGHTS_DROPOUT),
    ("nemo conformer", "pre_encode", "conv.0", "conv or one of its layers has hooks"),
    ("nemo transformer", "layers.0.ffn", "net", "net is not a plain Sequential"),
    ("fireredasr", "layer_stack.0.ffn1", "net", "net is not a plain Sequential"),
    ("seamless m4t", "layers.0.conv_module", "glu", "glu or pointwise_conv1 is no plain one"),
    ("phi-4", "embed", "conv.0", "conv or one of its layers has hooks or is no plain one"),
    (
        "phi-4",
        "encoders.0.conv",
        "glu.ext_pw_conv_1d",
        "a part has hooks or is no plain one, or an activation is not SiLU",
    ),
    ("funasr", "encoders.0.self_attn", "fsmn_block", "fsmn_block or pad_fn has hooks or is no plain one"),
    (
        "fun-asr-nano",
        "layers.0.self_attn.fsmn",
        "conv",
        "conv or pad has hooks, or has an even number of taps",
    ),
    ("granite speech", "layers.0.conv", "glu", "glu is not a plain GLU"),
    ("granite speech", "layers.0.attn", "rel_pos_emb", REL_ATTENTION),
    ("granite speech 5", "layers.0.self_attn", "rel_pos_emb", REL_ATTENTION),
    # the second layer runs upstream's code on the bias of every pair, the third ours again
    ("wavlm", "layers.1.attention", "", WATCHED),
    ("gemma 4", "layers.1.self_attn", "", WATCHED),
    ("gemma 4", "layers.0.feed_forward1.ffw_layer_1", "linear", "linear has hooks or is no plain one"),
    ("gemma 4", "layers.0.feed_forward1", "pre_layer_norm", "a norm has hooks or is no plain one"),
    (
        "gemma 4",
        "layers.0.lconv1d",
        "depthwise_conv1d",
        "a norm or depthwise_conv1d has hooks or is no plain one",
    ),
    ("gemma 4", "layers.1", "norm_out", "a part has hooks or is no plain one"),
    ("gemma 4", "subsample_conv_projection.layer0", "norm", "conv, norm or act has hooks or is no plain one"),
    ("gemma 3n", "conformer.1", "norm", "a part has hooks or is no plain one"),
    (
        "gemma 3n",
        "subsample_conv_projection.conv_0",
        "conv",
        "conv, norm or activation has hooks or is no plain one",
    ),
    ("gemma 3n", "conformer.0.attention.attn", "relative_position_embedding", REL_ATTENTION),
    ("voxtral realtime", "layers.1", "final_layer_norm", "a norm has hooks or is no plain one"),
)


def copies(family, **options):
    """Returns the swapped model, upstream's, and a call of them."""
    theirs, run = families.make(family)
    return swapped(theirs, **options), theirs, run


def wave(*shape):
    return torch.linspace(-1, 1, math.prod(shape)).sin().view(shape)


def hooked(family, block, part, reason):
    ours, theirs, run = copies(family)
    ours.get_submodule(f"{block}.{part}".rstrip(".")).register_forward_hook(lambda *_: None)
    return beside(ours, theirs, run, f"{block}.forward", reason)


def nets(name, **options):
    ours, theirs = pair(name, training=False, **options)
    return ours.float(), theirs.float()  # SpeechBrain's attention has float32 weights whatever the dtype


def of_attention(name, reason, run, change=lambda ours, theirs: None):
    """Returns the case of an attention module. ``run(module, x)``; ``change(ours, theirs)`` changes the models."""
    ours, theirs = nets(name)
    change(ours, theirs)
    x, block = torch.randn(3, 21, WIDTH), ATTENTION[name]
    return beside(ours, theirs, lambda net: run(net.get_submodule(block), x), f"{block}.forward", reason)


def table(batch=1):
    return wave(1, 41, WIDTH).expand(batch, -1, -1)


def weights_of_wav2vec2():
    def change(ours, theirs):
        ours.config._attn_implementation = theirs.config._attn_implementation = "eager"
        ours.layers[0].self_attn.register_forward_hook(lambda *_: None)

    def run(module, x):
        return module(x, None, relative_position_embeddings=table())[0]

    return of_attention("wav2vec2", WATCHED, run, change)


def a_query_without_keys():
    def run(module, x):
        mask = torch.ones(3, 1, 21, 21, dtype=torch.bool)
        mask[0, 0, 3] = False
        return module(x, mask, relative_position_embeddings=table())[0]

    return of_attention("wav2vec2", "a query sees no key", run)


def with_other_keys(family, path):
    ours, theirs, _ = copies(family)
    x, keys = torch.randn(2, 3, 21, WIDTH)

    def run(model):
        found = model.get_submodule(path)(x, keys, keys, table())
        return found[0] if isinstance(found, tuple) else found

    return beside(ours, theirs, run, f"{path}.forward", REL_ATTENTION)


def other_keys_of_rotary_gigaam():
    ours, theirs, _ = copies("gigaam, rotary")
    x, keys = torch.randn(2, 3, 21, WIDTH)

    def run(model):
        turned = model.pos_enc(x)[1]
        return model.layers[0].self_attn(x, keys, keys, turned)

    return beside(ours, theirs, run, "layers.0.self_attn.forward", REL_ATTENTION)


def other_keys_of_espnet():
    ours, theirs, _ = copies("espnet transformer")
    x, keys = torch.randn(2, 3, 21, WIDTH)
    run = lambda model: model.encoders[0].self_attn(x, keys, keys.clone(), None)  # noqa: E731
    return beside(ours, theirs, run, "encoders.0.self_attn.forward", OTHER_KEYS, level=logging.INFO)


def cache_of_a_hooked_convolution():
    ours, theirs = nets("nemo", conv_context_size="causal", conv_norm_type="layer_norm")
    ours.layers[0].conv.depthwise_conv.register_forward_hook(lambda *_: None)
    x, cache = torch.randn(3, 21, WIDTH), torch.randn(3, WIDTH, TAPS - 1)
    reason = "a cache, and a convolution or norm that is no plain one or has hooks"
    return beside(
        ours, theirs, lambda net: net.layers[0].conv(x, cache=cache), "layers.0.conv.forward", reason
    )


def mask_of_nemo_transformer():
    ours, theirs, _ = copies("nemo transformer")
    flex = torch.nn.attention.flex_attention

    def run(model):
        mask = flex.create_block_mask(
            lambda b, h, q, k: (q - k).abs() < 3, B=2, H=1, Q_LEN=5, KV_LEN=5, device="cpu"
        )
        x, positions = wave(2, 5, 32), torch.ones(1, 9, 32)
        return model.layers[0].attn(x, mask, positions)

    return beside(ours, theirs, run, "layers.0.attn.forward", REL_ATTENTION)


def pairs_of_phi4():
    ours, theirs, run = copies("phi-4")
    ours.relative_attention_bias_layer.register_forward_hook(lambda *_: None)
    return beside(ours, theirs, run, "encoders.0.self_attn.forward", "the bias has every pair of frames")


def chunks_of_funasr():
    ours, theirs, _ = copies("funasr")
    x, mask, seen = torch.randn(2, 9, WIDTH), torch.ones(2, 1, 9), torch.ones(9, 9).tril()
    run = lambda model: model.encoders[0].self_attn(x, mask, None, seen)  # noqa: E731
    reason = "masks of chunks, or a mask that is not (B, 1, T)"
    return beside(ours, theirs, run, "encoders.0.self_attn.forward", reason)


def mask_of_gemma4():
    ours, theirs, _ = copies("gemma 4")

    def run(model):
        mask = torch.zeros(1, 1, 2, 12, 24)
        mask[..., 5] = -1.0
        x, positions = wave(1, 20, WIDTH), torch.ones(1, 13, WIDTH)
        return model.layers[0].self_attn(x, positions, mask)

    return beside(ours, theirs, run, "layers.0.self_attn.forward", REL_ATTENTION)


def bias_of_pairs(family, first):
    """Without a swap of the first layer's attention, the others get upstream's bias."""
    ours, theirs, run = copies(family, exclude=[first])
    reason = "the position bias has every pair of frames"
    return beside(ours, theirs, run, f"{first.replace('0', '1')}.forward", reason)


def of_the_attention(family, path, reason, **given):
    ours, theirs, _ = copies(family)
    x = wave(1, 9, WIDTH)
    run = lambda model: model.get_submodule(path)(x, **given)[0]  # noqa: E731
    return beside(ours, theirs, run, f"{path}.forward", reason)


def training_of_speecht5():
    ours, theirs, run = copies("speecht5")
    reason = "the table of positions has gradients"
    return beside(ours, theirs, run, "layers.0.attention.forward", reason, gradients=True, level=logging.INFO)


@contextlib.contextmanager
def doubled_queries():
    """Registers a function in the place of transformers' own."""
    functions = pytest.importorskip("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS

    def doubled(module, query, key, value, attention_mask, scaling=None, **kwargs):
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(2 * query, key, value, attention_mask, scale=scaling).transpose(1, 2), None

    functions["sdpa"] = doubled
    try:
        yield
    finally:
        del functions["sdpa"]


def registered_function(family, path):
    ours, theirs, run = copies(family)
    reason = "doubled_queries.<locals>.doubled, registered as sdpa"
    return beside(ours, theirs, run, f"{path}.forward", reason, around=doubled_queries)


def scale_of(family, path):
    """The scale changes after the swap."""
    ours, theirs, run = copies(family)
    for model in (ours, theirs):
        vars(model.get_submodule(path))["scaling"] = 3.0
    return beside(ours, theirs, run, f"{path}.forward", "scaling is 3.0, expected 1 / √8")


def mask_of_openai_whisper():
    mask = torch.full((9, 9), -torch.inf).triu(1)
    ours, theirs, _ = copies("openai whisper")
    x = wave(1, 9, WIDTH)
    return beside(
        ours, theirs, lambda model: model.blocks[0](x, mask=mask), "blocks.0.forward", REL_ATTENTION
    )


def mask_of_torchaudio(reason, hidden):
    mask = torch.zeros(2, 1, 9, 9)
    mask[1, :, :, hidden:] = -10000.0 if reason != REL_ATTENTION else -1.0
    x, (ours, theirs, _) = wave(2, 9, WIDTH), copies("torchaudio wav2vec2")
    run = lambda model: model.get_submodule(OF_TORCHAUDIO)(x, mask)[0]  # noqa: E731
    return beside(ours, theirs, run, f"{OF_TORCHAUDIO}.forward", reason)


def hooked_convolution_of_nemo():
    ours, theirs, run = copies("nemo striding")
    for model in (ours, theirs):
        model.pre_encode.conv[1].register_forward_hook(lambda module, args, y: 2 * y)
    return beside(
        ours, theirs, run, "pre_encode.forward", "conv or one of its layers has hooks or is no plain one"
    )


def frames_before_those_of_a_call():
    ours, theirs, _ = copies("voxtral realtime")
    x = wave(1, 20, WIDTH)

    def run(model):
        found = model(inputs_embeds=x[:, :12], use_cache=True)
        return model(inputs_embeds=x[:, 12:], cache=found.cache)[0]

    return beside(ours, theirs, run, "layers.0.self_attn.forward", OTHER_KEYS)


def of_a_decoder_layer(reason, rows=1, act=lambda layer: None):
    ours, theirs, _ = copies("decoders of transformers")
    caches = pytest.importorskip("transformers.cache_utils")
    x = torch.linspace(-2, 1, 7 * WIDTH).sin().expand(rows, -1).view(rows, 7, WIDTH)
    for model in (ours, theirs):
        act(model.parts[0])

    @torch.no_grad()
    def run(model):
        cache = caches.EncoderDecoderCache(caches.DynamicCache(), caches.DynamicCache())
        for tokens in (x[:, :2], x[:, 2:3]):
            y = model.parts[0](tokens, None, x, cache=cache)
        return y

    return beside(ours, theirs, run, "parts.0.forward", reason)


def hooked_part_of_a_decoder_layer():
    act = lambda layer: layer.fc1.register_forward_hook(lambda module, args, y: 2 * y)  # noqa: E731
    return of_a_decoder_layer("fc1 has hooks", act=act)


def many_rows_of_a_decoder_layer():
    return of_a_decoder_layer("more than 256 hypotheses", 257)


def hooked_part_of_espnets_decoder_layer():
    ours, theirs, _ = copies("decoders that project")
    x = torch.linspace(-2, 1, 7 * WIDTH).sin().view(1, 7, WIDTH)
    for model in (ours, theirs):
        model.parts[0].norm3.register_forward_hook(lambda module, args, y: 2 * y)
    run = lambda model: model.parts[0](x[:, :3], None, x, None, cache=x[:, :2])[0]  # noqa: E731
    return beside(ours, theirs, run, "parts.0.forward", "norm3 has hooks")


def hooked_part_of_speechbrains_decoder():
    ours, theirs, run = copies("speechbrain decoder")
    for model in (ours, theirs):
        model.layers[1].norm2.register_forward_hook(lambda module, args, y: 2 * y)
    return beside(ours, theirs, run, "forward", "norm2 has hooks")


OTHERS = {
    "asked weights of fastspeech2": lambda: of_attention(
        "fastspeech2", ASKED, lambda module, x: module(x, None, table(), output_attentions=True)
    ),
    "asked weights of whisper": lambda: of_the_attention(
        "whisper", "layers.0.self_attn", ASKED, output_attentions=True
    ),
    "asked weights of speecht5": lambda: of_the_attention(
        "speecht5", "layers.0.attention", ASKED, output_attentions=True
    ),
    "positions of each sequence": lambda: of_attention(
        "wav2vec2", REL_ATTENTION, lambda module, x: module(x, None, table(3))[0]
    ),
    "a bias of pairs that is not of offsets": lambda: of_the_attention(
        "speecht5", "layers.0.attention", REL_ATTENTION, position_bias=wave(9, 9, WIDTH // 2)
    ),
    "bias of pairs of wavlm": lambda: bias_of_pairs("wavlm", "layers.0.attention"),
    "bias of pairs of torchaudio": lambda: bias_of_pairs("torchaudio wavlm", OF_TORCHAUDIO),
    "padding, which torchaudio's encoder never gives": lambda: of_the_attention(
        "torchaudio wavlm", OF_TORCHAUDIO, REL_ATTENTION, key_padding_mask=torch.arange(9).expand(1, 9) > 5
    ),
    "no frames of torchaudio": lambda: mask_of_torchaudio("a query sees no key", 0),
    "other numbers of torchaudio": lambda: mask_of_torchaudio(REL_ATTENTION, 5),
    "other keys of nemo": lambda: of_attention(
        "nemo", REL_ATTENTION, lambda module, x: module(x, x.flip(0), x.flip(0), None, table())
    ),
    "other keys of wav2vec2": lambda: of_the_attention(
        "wav2vec2", "layers.0.attention", REL_ATTENTION, key_value_states=wave(1, 9, WIDTH).flip(1)
    ),
    "other keys of fireredasr": lambda: with_other_keys("fireredasr", "layer_stack.0.mhsa"),
    "other keys of gigaam": lambda: with_other_keys("gigaam", "layers.0.self_attn"),
    "scale of wav2vec2": lambda: scale_of("wav2vec2", "layers.1.attention"),
    "scale of qwen": lambda: scale_of("qwen2.5-omni", "layers.1.self_attn"),
    "registered function of wav2vec2": lambda: registered_function("wav2vec2", "layers.0.attention"),
    "registered function of parakeet": lambda: registered_function("parakeet", "layers.0.self_attn"),
}
OTHERS |= {
    make.__name__: make
    for make in (
        hooked_part_of_a_decoder_layer,
        hooked_part_of_espnets_decoder_layer,
        hooked_part_of_speechbrains_decoder,
        many_rows_of_a_decoder_layer,
        frames_before_those_of_a_call,
        hooked_convolution_of_nemo,
        weights_of_wav2vec2,
        a_query_without_keys,
        other_keys_of_espnet,
        other_keys_of_rotary_gigaam,
        cache_of_a_hooked_convolution,
        mask_of_nemo_transformer,
        pairs_of_phi4,
        chunks_of_funasr,
        mask_of_gemma4,
        training_of_speecht5,
        mask_of_openai_whisper,
    )
}


@pytest.mark.parametrize("row", HOOKED, ids=lambda row: " ".join(row[:3]))
def test_hooks(row, caplog):
    check(hooked(*row), caplog)


@pytest.mark.parametrize("name", OTHERS)
def test_a_way_back(name, caplog):
    check(OTHERS[name](), caplog)


def test_no_way_back_is_missing(monkeypatch):
    made = [*(hooked(*row) for row in HOOKED), *(make() for make in OTHERS.values())]
    assert unreached(made, monkeypatch, conformers=True) == set()
