# SPDX-License-Identifier: Apache-2.0
"""``fastasr.why``: what it says before a call and after, of models, searches and engines, and how it reads."""

import copy
import logging

import families
import pytest
import test_ways_back as ways
import torch
from packed_layers import chunk_of
from steps import seeded
from test_parakeet_generate import batch, only_generate, parakeet

import fastasr
from fastasr.asr import decoding

pytestmark = ways.pytestmark
MASKED = torch.zeros(2, 10, dtype=torch.bool)  # of a chunk's keys


def fast_generate():
    model, inputs = parakeet(), batch()
    only_generate(model)
    return model, lambda: model.generate(**inputs), ["generate"]


def fast_loss():
    model, labels = parakeet(), torch.tensor([[1, 2], [3, 1], [2, 2]])
    inputs = batch() | {"decoder_input_ids": torch.cat((torch.full((3, 1), 11), labels), 1), "labels": labels}
    only_generate(model)
    return model, lambda: model(**inputs), ["forward"]


def fast_layer():
    layer = ways.swapped(ways.causal_layer())
    whole, chunk = ways.whole(layer), chunk_of(layer, masked=MASKED)
    return layer, lambda: (layer(*whole), layer.streaming_forward(*chunk)), ["forward", "streaming_forward"]


def fast_emformer():
    model = ways.emformer.Emformer(12, 3, 20, 2, 4, left_context_length=5, right_context_length=2).eval()
    fastasr.accelerate(model)
    x, lengths = torch.randn(3, 6, 12), torch.tensor([6, 6, 6])
    return model, lambda: model.infer(x, lengths), [f"emformer_layers.{i}.infer" for i in (0, 1)]


def fast_mega():
    model = ways.swapped(ways.decoder())
    states = model.init_state()
    return model, lambda: model.inference(torch.tensor([[1]]), states), ["inference"]


def fast_lstm():
    model = ways.swapped(ways.rnnt._Predictor(9, 14, 12, 2, 16, True, 1e-3, 0.0).eval())
    labels, lengths = torch.randint(0, 9, (3, 7)), torch.tensor([7, 5, 2])
    return model, lambda: model(labels, lengths), ["lstm_layers.0.forward"]


def fast_encoder():
    model = ways.swapped(ways.upstream(), ragged=True)
    return model, lambda: model(ways.source(), ways.LENGTHS, ways.PADDING), ["forward"]


def fast_search():
    search, frames = decoding.GreedySearch(ways.asr_model()), torch.randn(2, 9, 24)
    return search, lambda: search.advance(search.start(2), frames), ["advance"]


def fast_engine():
    engine = ways.StreamingEncoder.from_model(ways.asr_model(), 8, 16)
    stream, features = engine.open(), torch.randn(1, 29, 80)
    return engine, lambda: engine.step(features, [stream]), ["step"]


@pytest.mark.parametrize(
    "make",
    [
        fast_generate,
        fast_loss,
        fast_layer,
        fast_emformer,
        fast_mega,
        fast_lstm,
        fast_encoder,
        fast_search,
        fast_engine,
    ],
)
@torch.no_grad()
def test_the_fast_path_leaves_nothing(make, caplog):
    caplog.set_level(logging.DEBUG, "fastasr")
    seeded(0)
    obj, call, keys = make()
    for _ in range(2):
        call()
    found = fastasr.why(obj)
    assert not [record for record in caplog.records if record.name == "fastasr"]
    assert [found[key] for key in keys] == [""] * len(keys)
    assert not [row.key for row in found.rows if row.now or row.left or row.calls]
    assert str(found) == f"{type(obj).__name__}: nothing is known to leave fastasr's fast path"


@torch.no_grad()
def test_before_and_after_calls():
    layer = ways.swapped(ways.causal_layer())
    assert fastasr.why(layer)["forward"] == "not called yet"
    assert "nothing is known" in str(fastasr.why(layer))
    layer(*ways.whole(layer))
    assert fastasr.why(layer)["forward"] == ""
    with ways.bfloat16():
        layer(*ways.whole(layer))
    assert fastasr.why(layer)["forward"] == "autocast is on"
    (row,) = [row for row in fastasr.why(layer).rows if row.key == "forward"]
    assert (row.now, row.left, row.calls) == ("", "autocast is on", 1)
    assert "forward: 1 calls have left, the last one: autocast is on" in str(fastasr.why(layer))
    layer(*ways.whole(layer))
    assert fastasr.why(layer)["forward"] == "autocast is on"  # the last call that left
    copied = copy.deepcopy(layer)
    assert fastasr.why(copied)["forward"] == "not called yet"
    fastasr.restore(layer)
    assert fastasr.why(layer).to_dict()["forward"] == "autocast is on"


@torch.no_grad()
def test_a_hook_for_all_modules():
    swapped = ways.swapped(ways.causal_layer())
    ours = ways.ZipformerEncoderLayer(32, 16, 2, 8, 4, 6, 48, cnn_module_kernel=7, causal=True).eval()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        for layer in (swapped, ours):
            layer.streaming_forward(*chunk_of(layer, masked=MASKED))
            assert fastasr.why(layer)["streaming_forward"] == "hooks of all modules are registered"
    finally:
        handle.remove()


def test_paths_and_groups():
    class Recogniser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ways.emformer.Emformer(12, 3, 20, 2, 4, right_context_length=2).eval()

    model = Recogniser()
    fastasr.accelerate(model)
    with fastasr.backend("eager"), torch.no_grad():
        model.net.infer(torch.randn(3, 6, 12), torch.tensor([6, 6, 6]))
    found = fastasr.why(model)
    assert found["net.emformer_layers.1.infer"] == "backend 'eager' is forced"
    assert found.to_dict().keys() >= {f"net.emformer_layers.{i}.infer" for i in (0, 1)}
    lines = str(found).splitlines()
    assert lines[0] == "Recogniser: these leave fastasr's fast path"
    assert lines[1:] == [
        "  2 x _EmformerLayer.infer, first net.emformer_layers.0.infer: 2 calls have left, the last one: "
        "backend 'eager' is forced"
    ]
    with pytest.raises(KeyError):
        found["net.forward"]


def test_ops_in_eager():
    layer = ways.causal_layer()
    with fastasr.backend("eager"):
        reason = "bias_norm in eager: backend 'eager' is forced"
        assert reason in fastasr.accelerate(layer)["norm"].reason
        found = fastasr.why(layer)
    assert found["norm.ops"] == reason
    assert f"norm.ops: {reason}" in str(found)
    assert "norm.ops" not in fastasr.why(layer).to_dict()


def test_what_holds_a_model():
    search = decoding.GreedySearch(ways.asr_model())
    search.predictor.model.decoder.register_forward_hook(lambda *_: None)
    assert fastasr.why(search)["advance"] == "a submodule has hooks or another forward"
    keys = fastasr.why(search).to_dict()
    assert any(key.startswith("predictor.model.encoder.encoders.0.layers.0.") for key in keys)
    for other in (3, "encoder", [search]):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module or an object of fastasr's"):
            fastasr.why(other)


def test_reports_say_it_at_once():
    model = parakeet(hidden_act="gelu")
    for report in (fastasr.explain(model), fastasr.accelerate(model), fastasr.explain(model)):
        reason = report[""].reason
        assert "generate leaves the fast path: upstream's loop runs: the joint network's activation" in reason
        assert "forward leaves the fast path: the loss is computed from logits: hidden_act is gelu" in reason
    assert "leaves the fast path" not in fastasr.accelerate(parakeet())[""].reason
    encoder = ways.upstream()
    assert "leaves" not in fastasr.explain(encoder)[""].reason  # layers that are not swapped yet
    assert "leaves" not in fastasr.accelerate(encoder)[""].reason
    fastasr.restore(encoder.encoders[0].layers[0])
    assert "encoders.0.layers.0 is not swapped" in fastasr.explain(encoder)[""].reason


def test_verify_notes_nothing(caplog):
    caplog.set_level(logging.INFO, "fastasr")
    layer = ways.swapped(ways.causal_layer())
    report = fastasr.verify(layer, ways.whole(layer))  # with gradients too
    assert report.ok, str(report)
    assert not [record for record in caplog.records if record.name == "fastasr"]
    assert fastasr.why(layer)["forward"] in ("", "not called yet")


def test_compiled_calls_that_leave(caplog):
    case = ways.CASES["parakeet_encoder positions"]()
    attention, expected = case.obj.layers[0].self_attn, case.upstream()
    x, positions = torch.randn(2, 5, 24), torch.randn(2, 9, 24)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(x, position_embeddings=positions)[0]
        assert not [record for record in caplog.records if record.name == "fastasr"]
        torch.testing.assert_close(found, attention(x, position_embeddings=positions)[0])
    assert len([record for record in caplog.records if record.name == "fastasr"]) == 1
    assert expected.shape == found.shape


def test_a_call_without_suppressed_durations_is_native(caplog):
    """Upstream's next token is the largest of all logits: as long as that is no duration's, our search serves."""
    model, inputs = parakeet(), batch()
    only_generate(model)
    model.generation_config.suppress_tokens = None
    served = 0
    for scale in (-50.0, 0.0, -50.0, 50.0):
        with torch.no_grad():
            model.joint.head.bias[12:] = scale
        caplog.clear()
        try:
            expected = type(model).generate(model, **inputs)
        except IndexError:  # a duration's index is no token
            with pytest.raises(IndexError):
                model.generate(**inputs)
            assert "a duration has the largest logit" in fastasr.why(model)["generate"]
            continue
        found = model.generate(**inputs)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.durations, expected.durations)
        served += not caplog.records
    assert served >= 2


def test_a_scripted_part():
    model, _ = families.make("parakeet")
    fastasr.accelerate(model)
    model.layers[0].norm_out = torch.jit.script(model.layers[0].norm_out)
    assert "nothing is known" in str(fastasr.why(model))
