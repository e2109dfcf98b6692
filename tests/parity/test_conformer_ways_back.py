# SPDX-License-Identifier: Apache-2.0
"""What a Conformer's blocks leave to upstream's code: it computes what upstream does, is logged once, and
``fastasr.why`` names the reason. ``tests/swap/test_ways_back.py`` has those of all other models."""

import copy

import families
import pytest
import torch
import torch.nn.attention.flex_attention
from families import TAPS, WIDTH
from leaving import Case, check, unreached
from test_conformer import ATTENTION, call, pair

import fastasr

LENGTHS = torch.tensor([21, 13, 5])

# the hooked part of a model, the block that leaves, the reason
HOOKED = {
    "wav2vec2 glu": ("layers.0.conv_module.glu", "layers.0.conv_module", "glu is not a plain GLU"),
    "wav2vec2 dropout": (
        "layers.0.self_attn.dropout",
        "layers.0.self_attn",
        "the dropout of attention weights has hooks",
    ),
    "fastspeech2 dropout": (
        "conformer_layers.0.self_attn.dropout",
        "conformer_layers.0.self_attn",
        "the dropout of attention weights has hooks",
    ),
    "torchaudio glu": (
        "conformer_layers.0.conv_module.sequential.1",
        "conformer_layers.0.conv_module",
        "sequential or its glu is not a plain one",
    ),
    "torchaudio sequence": (
        "conformer_layers.0.ffn1.sequential",
        "conformer_layers.0.ffn1",
        "sequential is not a plain Sequential",
    ),
    "speechbrain ffn": (
        "layers.0.ffn_module1.1.ffn",
        "layers.0.ffn_module1.1",
        "ffn is not a plain Sequential",
    ),
    "speechbrain after_conv": (
        "layers.0.convolution_module.after_conv",
        "layers.0.convolution_module",
        "a part has hooks",
    ),
    "nemo dropout": (
        "layers.0.self_attn.dropout",
        "layers.0.self_attn",
        "the dropout of attention weights has hooks",
    ),
    "nemo subsampling": ("pre_encode.conv.0", "pre_encode", "conv or one of its layers has hooks"),
}


def nets(name, **options):
    ours, theirs = pair(name, training=False, **options)
    return ours.float(), theirs.float()  # SpeechBrain's attention has float32 weights whatever the dtype


def case(ours, theirs, run, block, reason, **options):
    run = torch.no_grad()(run)
    return Case(ours, lambda: run(ours), lambda: run(theirs), f"{block}.forward", reason, **options)


def hooked(name):
    framework, (part, block, reason) = name.split()[0], HOOKED[name]
    ours, theirs = nets(framework)
    ours.get_submodule(part).register_forward_hook(lambda *_: None)
    x = torch.randn(3, 21, WIDTH)
    return case(ours, theirs, lambda net: call(framework, net, x, LENGTHS), block, reason)


def of_attention(name, reason, run, change=lambda ours, theirs: None):
    """Returns the case of an attention module. ``run(module, x)``; ``change(ours, theirs)`` changes the models."""
    ours, theirs = nets(name)
    change(ours, theirs)
    x, block = torch.randn(3, 21, WIDTH), ATTENTION[name]
    return case(ours, theirs, lambda net: run(net.get_submodule(block), x), block, reason)


def table(batch=1):
    return torch.linspace(-1, 1, 41 * WIDTH).sin().view(1, -1, WIDTH).expand(batch, -1, -1)


def weights_of_wav2vec2():
    def change(ours, theirs):
        ours.config._attn_implementation = theirs.config._attn_implementation = "eager"
        ours.layers[0].self_attn.register_forward_hook(lambda *_: None)

    def run(module, x):
        return module(x, None, relative_position_embeddings=table())[0]

    return of_attention("wav2vec2", "attention weights are asked for", run, change)


def a_query_without_keys():
    def run(module, x):
        mask = torch.ones(3, 1, 21, 21, dtype=torch.bool)
        mask[0, 0, 3] = False
        return module(x, mask, relative_position_embeddings=table())[0]

    return of_attention("wav2vec2", "a query sees no key", run)


def positions_of_each_sequence():
    reason = "an input, a mask or positions that rel_attention does not take"
    return of_attention("wav2vec2", reason, lambda module, x: module(x, None, table(3))[0])


def weights_of_fastspeech2():
    def run(module, x):
        return module(x, None, table(), output_attentions=True)

    return of_attention("fastspeech2", "attention weights are asked for", run)


def other_keys_of_nemo():
    def run(module, x):
        return module(x, x.flip(0), x.flip(0), None, table())

    return of_attention("nemo", "an input, a mask or positions that rel_attention does not take", run)


def cache_of_a_hooked_convolution():
    ours, theirs = nets("nemo", conv_context_size="causal", conv_norm_type="layer_norm")
    ours.layers[0].conv.depthwise_conv.register_forward_hook(lambda *_: None)
    x, cache = torch.randn(3, 21, WIDTH), torch.randn(3, WIDTH, TAPS - 1)
    reason = "a cache, and a convolution or norm that is no plain one or has hooks"
    return case(ours, theirs, lambda net: net.layers[0].conv(x, cache=cache), "layers.0.conv", reason)


def glu_of_seamless():
    theirs, run = families.make("seamless m4t")
    ours = copy.deepcopy(theirs.eval())
    fastasr.accelerate(ours)
    ours.layers[0].conv_module.glu.register_forward_hook(lambda *_: None)
    return case(ours, theirs, run, "layers.0.conv_module", "glu or pointwise_conv1 is no plain one")


def of_nemo_transformer(reason, change, path, run=None):
    theirs, call = families.make("nemo transformer")
    ours = copy.deepcopy(theirs)
    fastasr.accelerate(ours)
    change(ours)
    return case(ours, theirs, run or call, path, reason)


def sequence_of_nemo_transformer():
    def change(ours):
        ours.layers[0].ffn.net.register_forward_hook(lambda *_: None)

    return of_nemo_transformer("net is not a plain Sequential", change, "layers.0.ffn")


def mask_of_nemo_transformer():
    flex = torch.nn.attention.flex_attention

    def run(model):
        mask = flex.create_block_mask(
            lambda b, h, q, k: (q - k).abs() < 3, B=2, H=1, Q_LEN=5, KV_LEN=5, device="cpu"
        )
        x, positions = torch.linspace(-1, 1, 2 * 5 * 32).sin().view(2, 5, 32), torch.ones(1, 9, 32)
        return model.layers[0].attn(x, mask, positions)

    reason = "an input, a mask or positions that rel_attention does not take"
    return of_nemo_transformer(reason, lambda ours: None, "layers.0.attn", run)


def with_a_hook(family, reason, part, block):
    theirs, run = families.make(family)
    ours = copy.deepcopy(theirs)
    fastasr.accelerate(ours)
    ours.get_submodule(f"{block}.{part}").register_forward_hook(lambda *_: None)
    return case(ours, theirs, run, block, reason)


def sequence_of_firered():
    return with_a_hook("fireredasr", "net is not a plain Sequential", "net", "layer_stack.0.ffn1")


def with_other_keys(family, path):
    theirs, _ = families.make(family)
    ours = copy.deepcopy(theirs)
    fastasr.accelerate(ours)
    x, keys = torch.randn(2, 3, 21, WIDTH)

    def run(model):
        found = model.get_submodule(path)(x, keys, keys, table())
        return found[0] if isinstance(found, tuple) else found

    reason = "an input, a mask or positions that rel_attention does not take"
    return case(ours, theirs, run, path, reason)


def other_keys_of_firered():
    return with_other_keys("fireredasr", "layer_stack.0.mhsa")


def other_keys_of_gigaam():
    return with_other_keys("gigaam", "layers.0.self_attn")


def front_end_of_phi4():
    reason = "conv or one of its layers has hooks or is no plain one"
    return with_a_hook("phi-4", reason, "conv.0", "embed")


def gate_of_phi4():
    reason = "a part has hooks or is no plain one, or an activation is not SiLU"
    return with_a_hook("phi-4", reason, "glu.ext_pw_conv_1d", "encoders.0.conv")


def pairs_of_phi4():
    theirs, run = families.make("phi-4")
    ours = copy.deepcopy(theirs)
    fastasr.accelerate(ours)
    ours.relative_attention_bias_layer.register_forward_hook(lambda *_: None)
    return case(ours, theirs, run, "encoders.0.self_attn", "the bias has every pair of frames")


def memory_of_funasr():
    reason = "fsmn_block or pad_fn has hooks or is no plain one"
    return with_a_hook("funasr", reason, "fsmn_block", "encoders.0.self_attn")


def chunks_of_funasr():
    theirs, _ = families.make("funasr")
    ours = copy.deepcopy(theirs)
    fastasr.accelerate(ours)
    x, mask, seen = torch.randn(2, 9, WIDTH), torch.ones(2, 1, 9), torch.ones(9, 9).tril()

    def run(model):
        return model.encoders[0].self_attn(x, mask, None, seen)

    reason = "masks of chunks, or a mask that is not (B, 1, T)"
    return case(ours, theirs, run, "encoders.0.self_attn", reason)


def memory_of_fun_asr():
    reason = "conv or pad has hooks, or has an even number of taps"
    return with_a_hook("fun-asr-nano", reason, "conv", "layers.0.self_attn.fsmn")


def glu_of_granite_speech():
    return with_a_hook("granite speech", "glu is not a plain GLU", "glu", "layers.0.conv")


def table_of_granite_speech():
    reason = "an input, a mask or positions that rel_attention does not take"
    return with_a_hook("granite speech", reason, "rel_pos_emb", "layers.0.attn")


def table_of_granite_speech5():
    reason = "an input, a mask or positions that rel_attention does not take"
    return with_a_hook("granite speech 5", reason, "rel_pos_emb", "layers.0.self_attn")


def weights_of_wavlm():
    """The second layer runs upstream's code on the bias of every pair, the third ours again."""
    theirs, run = families.make("wavlm")
    ours = copy.deepcopy(theirs.eval())
    fastasr.accelerate(ours)
    ours.layers[1].attention.register_forward_hook(lambda *_: None)
    return case(ours, theirs, run, "layers.1.attention", "attention weights are asked for")


def weights_of_gemma4():
    theirs, run = families.make("gemma 4")
    ours = copy.deepcopy(theirs.eval())
    fastasr.accelerate(ours)
    ours.layers[1].self_attn.register_forward_hook(lambda *_: None)
    return case(ours, theirs, run, "layers.1.self_attn", "attention weights are asked for")


def mask_of_gemma4():
    theirs, _ = families.make("gemma 4")
    ours = copy.deepcopy(theirs.eval())
    fastasr.accelerate(ours)

    def run(model):
        mask = torch.zeros(1, 1, 2, 12, 24)
        mask[..., 5] = -1.0
        x, positions = torch.linspace(-1, 1, 20 * WIDTH).sin().view(1, 20, WIDTH), torch.ones(1, 13, WIDTH)
        return model.layers[0].self_attn(x, positions, mask)

    reason = "an input, a mask or positions that rel_attention does not take"
    return case(ours, theirs, run, "layers.0.self_attn", reason)


def product_of_gemma4():
    reason = "linear has hooks or is no plain one"
    return with_a_hook("gemma 4", reason, "linear", "layers.0.feed_forward1.ffw_layer_1")


def norm_of_gemma4():
    reason = "a norm has hooks or is no plain one"
    return with_a_hook("gemma 4", reason, "pre_layer_norm", "layers.0.feed_forward1")


def convolution_of_gemma4():
    reason = "a norm or depthwise_conv1d has hooks or is no plain one"
    return with_a_hook("gemma 4", reason, "depthwise_conv1d", "layers.0.lconv1d")


def layer_of_gemma4():
    return with_a_hook("gemma 4", "a part has hooks or is no plain one", "norm_out", "layers.1")


def layer_of_gemma3n():
    return with_a_hook("gemma 3n", "a part has hooks or is no plain one", "norm", "conformer.1")


def front_end_of_gemma4():
    reason = "conv, norm or act has hooks or is no plain one"
    return with_a_hook("gemma 4", reason, "norm", "subsample_conv_projection.layer0")


def front_end_of_gemma3n():
    reason = "conv, norm or activation has hooks or is no plain one"
    return with_a_hook("gemma 3n", reason, "conv", "subsample_conv_projection.conv_0")


def positions_of_gemma3n():
    reason = "an input, a mask or positions that rel_attention does not take"
    return with_a_hook("gemma 3n", reason, "relative_position_embedding", "conformer.0.attention.attn")


def bias_of_pairs_of_wavlm():
    """Without a swap of the first layer's attention, the others get upstream's bias."""
    theirs, run = families.make("wavlm")
    ours = copy.deepcopy(theirs.eval())
    fastasr.accelerate(ours, exclude=["layers.0.attention"])
    reason = "the position bias has every pair of frames"
    return case(ours, theirs, run, "layers.1.attention", reason)


OTHERS = (
    weights_of_gemma4,
    mask_of_gemma4,
    product_of_gemma4,
    norm_of_gemma4,
    convolution_of_gemma4,
    layer_of_gemma4,
    layer_of_gemma3n,
    front_end_of_gemma4,
    front_end_of_gemma3n,
    positions_of_gemma3n,
    weights_of_wavlm,
    bias_of_pairs_of_wavlm,
    sequence_of_firered,
    other_keys_of_firered,
    other_keys_of_gigaam,
    front_end_of_phi4,
    gate_of_phi4,
    pairs_of_phi4,
    memory_of_fun_asr,
    memory_of_funasr,
    chunks_of_funasr,
    glu_of_granite_speech,
    table_of_granite_speech,
    table_of_granite_speech5,
    sequence_of_nemo_transformer,
    mask_of_nemo_transformer,
    glu_of_seamless,
    weights_of_wav2vec2,
    a_query_without_keys,
    positions_of_each_sequence,
    weights_of_fastspeech2,
    other_keys_of_nemo,
    cache_of_a_hooked_convolution,
)


@pytest.mark.parametrize("name", HOOKED)
def test_hooks(name, caplog):
    check(hooked(name), caplog)


@pytest.mark.parametrize("make", OTHERS)
def test_a_way_back(make, caplog):
    check(make(), caplog)


def test_no_way_back_is_missing(monkeypatch):
    made = [*map(hooked, HOOKED), *(make() for make in OTHERS)]
    assert unreached(made, monkeypatch, conformers=True) == set()
