# SPDX-License-Identifier: Apache-2.0
"""Whole models of transformers around the encoders of Whisper, Speech2Text, SpeechT5 and wav2vec 2.0: the decoder's
attention to its tokens stays upstream's, ``generate`` gives the same tokens, and outputs are what was asked for."""

import copy

import families
import pytest
import torch
from steps import close, moved, numbers, outcome, same, seeded, swapped

import fastasr
from fastasr.models.common.activations import fused_name

transformers = pytest.importorskip("transformers")


def copies(model):
    """Returns the model in double, its swapped copy and the report."""
    theirs = moved(model, 0.1).double().eval()
    ours = copy.deepcopy(theirs)
    return theirs, ours, fastasr.accelerate(ours)


SIZES = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32}
SIZES |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 23}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def whisper(**options):
    seeded("whisper")
    frames = {"num_mel_bins": 5, "max_source_positions": 12, "max_target_positions": 20}
    config = transformers.WhisperConfig(**SIZES, **frames, **options)
    return copies(transformers.WhisperForConditionalGeneration(config))


def speech2text():
    seeded("speech2text")
    config = transformers.Speech2TextConfig(**SIZES, input_feat_per_channel=24, conv_channels=12)
    return copies(transformers.Speech2TextForConditionalGeneration(config))


def features():
    return torch.randn(2, 5, 24, generator=numbers(1)).double()


@pytest.mark.parametrize(
    ("make", "name"), [(whisper, "WhisperAttention"), (speech2text, "Speech2TextAttention")]
)
def test_generate(make, name):
    theirs, ours, report = make()
    found = {row.path: row.reason for row in report.skipped if row.class_name == name}
    parts = [f"model.decoder.layers.{n}.self_attn" for n in (0, 1)]
    assert found == dict.fromkeys(parts, "is a decoder's attention to its own tokens")
    with torch.no_grad():
        states = [model.model.encoder(features()).last_hidden_state for model in (ours, theirs)]
        close(*states, 1e-10)
        for model in (ours, theirs):  # neither an end nor padding, which generate cuts
            model.generation_config.suppress_tokens = [0, 1, 2]
        options = {"input_features": features(), "max_new_tokens": 12}
        tokens = [model.generate(**options) for model in (ours, theirs)]
    assert tokens[0].shape[1] > 8
    assert torch.equal(*tokens)
    assert not fastasr.why(ours).to_dict()


def test_speecht5():
    """Its decoder has the encoder's feed-forward. In training the table of positions learns from upstream's code."""
    seeded("speecht5")
    sizes = {"hidden_size": 16, "vocab_size": 23, "encoder_max_relative_position": 4, "mask_time_prob": 0.0}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 32}
    sizes |= {"conv_dim": (4, 6), "conv_kernel": (4, 2), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4}
    sizes |= {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "max_speech_positions": 60}
    theirs, ours, report = copies(transformers.SpeechT5ForSpeechToText(transformers.SpeechT5Config(**sizes)))
    skipped = [row.reason for row in report.skipped if row.class_name == "SpeechT5Attention"]
    assert skipped == ["is part of a decoder"] * 4
    assert sum(row.class_name == "SpeechT5FeedForward" for row in report.replaced) == 4
    inputs = {"input_values": torch.randn(2, 160, generator=numbers(2)).double()}
    inputs["attention_mask"] = (torch.arange(160) < torch.tensor([[160], [90]])).long()
    with torch.no_grad():
        states = [model.speecht5.encoder(**inputs).last_hidden_state for model in (ours, theirs)]
        close(*states, 1e-10)
        tokens = [model.generate(**inputs, max_new_tokens=9, min_new_tokens=9) for model in (ours, theirs)]
        assert torch.equal(*tokens)
        assert not fastasr.why(ours).to_dict()
        given = {"decoder_input_ids": torch.tensor([[1, 5], [1, 7]]), "output_attentions": True}
        found, expected = (model(**inputs, **given).encoder_attentions for model in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-10)
    labels = torch.tensor([[5, 6], [7, 2]])
    run = lambda model: [model(**inputs, labels=labels).loss]  # noqa: E731
    with fastasr.upstream_draws():
        same(*(outcome(model, run, True) for model in (ours, theirs)), 1e-10, share=1.0)


def wav2vec2(**options):
    seeded("wav2vec2")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"conv_dim": (4, 6), "conv_kernel": (4, 2), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4}
    sizes |= {"num_conv_pos_embedding_groups": 2, "vocab_size": 11, "mask_time_prob": 0.0}
    return copies(transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**sizes | options)))


OUTPUTS = ("encoder_hidden_states", "encoder_attentions", "hidden_states", "attentions", "logits")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [whisper, wav2vec2])
def test_asked_outputs(make, implementation):
    """Weights are upstream's where it forms them, and the capturing hooks of transformers do not stop the swap."""
    theirs, ours, report = make(attn_implementation=implementation)
    attentions = sum("Attention" in row.class_name for row in report.replaced)
    assert attentions == (4 if make is whisper else 2)
    if make is whisper:
        inputs = {"input_features": features(), "decoder_input_ids": torch.tensor([[1, 5], [1, 7]])}
    else:
        lengths = torch.tensor([[80], [61]])
        inputs = {"input_values": torch.randn(2, 80, generator=numbers(2)).double()}
        inputs["attention_mask"] = torch.arange(80) < lengths
    with torch.no_grad():
        for asked in (True, False):
            options = {"output_attentions": asked, "output_hidden_states": asked}
            found, expected = (model(**inputs, **options) for model in (ours, theirs))
            for name in OUTPUTS:
                a, b = (getattr(y, name, None) for y in (found, expected))
                a, b = ((y,) if isinstance(y, torch.Tensor) else y or () for y in (a, b))
                assert len(a) == len(b)
                for one, other in zip(a, b, strict=True):
                    close(one, other, 1e-10)


@pytest.mark.parametrize("make", [whisper, wav2vec2])
def test_a_training_step(make):
    """Upstream sets padding to 0 in the output of a swapped linear layer."""
    theirs, ours, _ = make(**{"layerdrop": 0.0, "mask_time_prob": 0.0} if make is wav2vec2 else {})
    inputs = {"labels": torch.tensor([[3, 5, 7], [4, 4, 8]])}
    if make is whisper:
        inputs["input_features"] = features()
    else:
        inputs["input_values"] = torch.randn(2, 80, generator=numbers(2)).double()
        inputs["attention_mask"] = torch.arange(80) < torch.tensor([[80], [61]])
    with fastasr.upstream_draws():
        results = [outcome(model, lambda model: [model(**inputs).loss], True) for model in (ours, theirs)]
    same(*results, 1e-10, share=1.0)


def test_a_layer_clamps_half_precision():
    model, _ = families.make("whisper")
    theirs = model.layers[0].half()
    ours = copy.deepcopy(theirs)
    assert fastasr.accelerate(ours).replaced
    x = torch.linspace(-65400.0, 65400.0, families.WIDTH).half().expand(1, 3, -1)
    with torch.no_grad():
        found, expected = (layer(x, None) for layer in (ours, theirs))
    assert expected.max() == -expected.min() == torch.tensor(64504.0).half()
    torch.testing.assert_close(found, expected, rtol=0, atol=64.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"is_causal": True}, "is part of a decoder"), ({"scaling": 1.0}, "scaling is 1.0, expected 1 / √8")],
)
def test_a_changed_attention_stays(change, reason):
    model, _ = families.make("wav2vec2")
    vars(model.layers[0].attention).update(change)
    (row,) = [row for row in fastasr.accelerate(model).skipped if row.class_name == "Wav2Vec2Attention"]
    assert row.reason == reason


@pytest.mark.parametrize("family", ["whisper", "glm-asr", "moonshine"])
def test_an_attention_becomes_causal(family):
    """torch's kernel then hides later frames, if there is no mask."""
    theirs, _ = families.make(family)
    theirs = theirs.double()
    ours = swapped(theirs)
    x, found = torch.randn(2, 9, families.WIDTH, generator=numbers(1)).double(), []
    for model in (ours, theirs):
        layer = model.layers[0]
        layer.self_attn.is_causal = True
        angles = torch.arange(9.0).double()[None, :, None] * torch.linspace(0.1, 1, 8).double()
        given = {} if family == "whisper" else {"position_embeddings": (angles.cos(), angles.sin())}
        found.append(layer.self_attn(x, attention_mask=None, **given)[0].detach())
    close(*found, 1e-10)
    assert not fastasr.why(ours).to_dict()


def test_names_of_gelu():
    names = {"gelu": "gelu", "gelu_python": None, "gelu_new": None, "quick_gelu": None, "silu": "silu"}
    assert {name: fused_name(transformers.activations.ACT2FN[name]) for name in names} == names
