# SPDX-License-Identifier: Apache-2.0
"""Searches of FireRedASR, NeMo and ESPnet, whose decoders project the encoder's frames at every step: swapped ones
project the frames of a recording once, and results are upstream's."""

import gc

import nemo_encoder
import pytest
import torch
from steps import moved, numbers, seeded, swapped
from tiny_decoders import speechbrain_recogniser

import fastasr
from fastasr.models.common import linear, repeated_inputs
from fastasr.swap import binding

WIDTH, HEADS, TOKENS, FRAMES = 16, 2, 19, 9


def frames(batch=1):
    return torch.randn(batch, FRAMES, WIDTH, generator=numbers(1)).double()


def copies(model):
    """Returns upstream's model in double and a swapped copy."""
    theirs = moved(model, 0.5).double().eval()
    return theirs, swapped(theirs)


def firered():
    decoder = pytest.importorskip("fireredasr.models.module.transformer_decoder").TransformerDecoder
    theirs, ours = copies(decoder(3, 4, 2, TOKENS, 2, HEADS, WIDTH))
    # `moved` moves the table of positions too; the same in both
    mask = (torch.arange(FRAMES) < torch.tensor([[FRAMES], [5]])).unsqueeze(1)

    def search(model):
        with torch.no_grad():
            found = model.batch_beam_search(frames(2), mask, beam_size=3, nbest=2, decode_max_len=7)
        return [hyp["yseq"].tolist() for hyps in found for hyp in hyps]

    return theirs, ours, search, [model.cross_attn for model in ours.layer_stack], ("w_ks", "w_vs"), [2]


def nemo(beams):
    decoders, modules, generators = nemo_encoder.load_decoder()
    decoder = decoders.TransformerDecoder(2, WIDTH, 32, HEADS, pre_ln=True)
    embedding = modules.TransformerEmbedding(TOKENS, WIDTH, 32)
    classifier = generators.TokenClassifier(WIDTH, TOKENS)
    theirs, ours = copies(torch.nn.ModuleList((embedding, decoder, classifier)))
    mask = (torch.arange(FRAMES) < torch.tensor([[FRAMES], [5]])).double()

    def search(model):
        options = {"beam_size": beams} if beams > 1 else {}
        kind = generators.BeamSearchSequenceGenerator if beams > 1 else generators.GreedySequenceGenerator
        # its settings ask for omegaconf
        kind = type(kind.__name__, (kind,), {"_init_confidence_method": lambda *_: None})
        search = kind(*model, max_sequence_length=9, **options)
        found = search(encoder_hidden_states=frames(2), encoder_input_mask=mask)
        return (found if beams > 1 else found[0]).tolist()

    layers = [layer.second_sub_layer for layer in ours[1].layers]
    # the first step of a beam search gets frames without copies
    return theirs, ours, search, layers, ("key_net", "value_net"), [2, 2] if beams > 1 else [2]


def espnet(kind):
    home = pytest.importorskip("espnet2.asr.decoder.transformer_decoder")
    beams = pytest.importorskip(f"espnet.nets.{kind}")
    decoder = home.TransformerDecoder(TOKENS, WIDTH, attention_heads=HEADS, linear_units=32, num_blocks=2)
    theirs, ours = copies(decoder)
    name = "BatchBeamSearch" if "batch" in kind else "BeamSearch"

    def search(model):
        found = getattr(beams, name)(
            {"decoder": model}, {"decoder": 1.0}, 4, TOKENS, TOKENS - 1, TOKENS - 1, pre_beam_score_key=None
        )
        with torch.no_grad():
            return [hyp.yseq.tolist() for hyp in found(frames()[0], maxlenratio=0.9)]

    return theirs, ours, search, [layer.src_attn for layer in ours.decoders], ("linear_k", "linear_v"), [1]


def speechbrain():
    theirs, ours = copies(speechbrain_recogniser(TOKENS, WIDTH))
    searches = pytest.importorskip("speechbrain.decoders.seq2seq")
    theirs.float(), ours.float()  # upstream's mask is in float32

    def search(model):
        found = searches.S2STransformerBeamSearcher(
            [*model], 1.0, bos_index=1, eos_index=2, min_decode_ratio=0.5, max_decode_ratio=0.9, beam_size=4
        )
        with torch.no_grad():
            return found(frames(2).float(), torch.tensor([1.0, 0.6]))[0]

    return theirs, ours, search, [layer.multihead_attn for layer in ours[0].decoder.layers]


def test_speechbrain():
    """Upstream's attention projects the frames at every step: those of two recordings, and not of eight beams."""
    theirs, ours, search, attentions = speechbrain()
    shapes = []
    for attention in attentions:
        forward = attention.att.forward

        def watched(query, key, *others, forward=forward, **kwargs):
            shapes.append((query.shape[1], key.shape[1]))
            return forward(query, key, *others, **kwargs)

        attention.att.forward = watched
    found = search(ours)
    assert found == search(theirs)
    assert len(found[0]) > 3
    assert set(shapes) == {(2, 2)}


SEARCHES = {
    "fireredasr": firered,
    "nemo, greedy": lambda: nemo(1),
    "nemo, beams": lambda: nemo(3),
    "espnet": lambda: espnet("beam_search"),
    "espnet, batched": lambda: espnet("batch_beam_search"),
}


def lasting(name):
    """Returns a search of more than three steps. A random decoder may end at once."""
    for attempt in range(20):
        seeded(f"{name} {attempt}")
        found = SEARCHES[name]()
        if len(found[2](found[0])[0]) > 3:
            return found
    raise AssertionError(f"{name} ends at once")


@pytest.mark.parametrize("name", SEARCHES)
def test_searches(name, monkeypatch):
    theirs, ours, search, attentions, names, projected = lasting(name)
    rows = []

    def watched(layer, x):
        rows.append((layer, len(x)))
        return fastasr.ops.linear(x, layer.weight, layer.bias)

    monkeypatch.setattr(linear, "_product", watched)
    found = search(ours)
    assert len(found[0]) > 3
    assert found == search(theirs)
    for attention in attentions:
        for part in names:
            layer = getattr(attention, part)
            assert [n for other, n in rows if other is layer] == projected
    gc.collect()
    assert not repeated_inputs._results  # the frames are gone


def decoded(model, memory, tokens):
    return model.decoders[0](tokens, None, memory, None)[0]


def test_compiled_and_mapped():
    theirs, ours, *_ = espnet("beam_search")
    memory, tokens = frames(2), frames(2)[:, :3].clone()
    with torch.no_grad():
        expected = decoded(theirs, memory, tokens)
        compiled = torch.compile(decoded, backend="eager", fullgraph=True)(ours, memory, tokens)
        each = torch.func.vmap(lambda m, t: decoded(ours, m[None], t[None])[0])(memory, tokens)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(each, expected, rtol=0, atol=1e-10)


def test_watched_projections_see_every_beam():
    _, ours, search, *_ = espnet("batch_beam_search")
    rows = []
    ours.decoders[0].src_attn.linear_k.register_forward_hook(
        lambda module, args, y: rows.append(len(args[0]))
    )
    search(ours)
    assert max(rows) == 4


def test_weights_of_the_last_call():
    """ESPnet keeps the weights of the last call in ``attn``, with a row for each beam."""
    theirs, ours, *_ = espnet("batch_beam_search")
    found = []
    for model in (theirs, ours):
        with torch.no_grad():
            decoded(model, frames().expand(3, -1, -1), frames(3)[:, :2])
        found.append(model.decoders[0].src_attn.attn)
    assert found[1].shape == (3, HEADS, 2, FRAMES)
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------- when a result is used again
@pytest.fixture
def layer():
    seeded("layer")
    made = torch.nn.Linear(WIDTH, 8).double()
    binding.bind(made, linear.Linear.forward)
    yield made
    repeated_inputs._results.clear()


def called(layer, x, monkeypatch, times=1):
    """Returns how often the product is computed in some calls, each of which must give the right result."""
    count = []

    def watched(of, rows):
        count.append(len(rows))
        return fastasr.ops.linear(rows, of.weight, of.bias)

    monkeypatch.setattr(linear, "_product", watched)
    with torch.no_grad():
        for _ in range(times):
            with repeated_inputs.kept(layer):
                y = layer(x)
            expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
            assert y.shape == expected.shape
    return len(count)


def test_again(layer, monkeypatch):
    x = frames(2)
    assert called(layer, x, monkeypatch, times=3) == 1
    assert called(layer, x[:], monkeypatch) == 0  # a view
    assert called(layer, x[:1], monkeypatch) == 1
    assert called(layer, x, monkeypatch) == 1


def test_expanded_rows(layer, monkeypatch):
    x = frames()[0]
    assert called(layer, x.expand(1, -1, -1), monkeypatch) == 1
    for n in (3, 5, 2):
        with torch.no_grad():
            found, rows = repeated_inputs.without_copies(layer, x.expand(n, -1, -1))
        assert found == n
        assert called(layer, rows, monkeypatch) == 0


def test_gradients_of_expanded_rows(layer):
    x = frames()[0].expand(3, -1, -1)
    assert repeated_inputs.without_copies(layer, x)[0] == 1
    with torch.no_grad():
        assert repeated_inputs.without_copies(layer, x)[0] == 3


CHANGES = {
    "counted write": lambda layer, x: x.mul_(2),
    "uncounted write": lambda layer, x: x.data.copy_(2 * x),
    "weight": lambda layer, x: layer.weight.detach().mul_(2),
    "bias": lambda layer, x: layer.bias.data.copy_(2 * layer.bias),
    "parameter": lambda layer, x: setattr(layer, "weight", torch.nn.Parameter(2 * layer.weight.detach())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes(change, layer, monkeypatch):
    x = frames(2)
    assert called(layer, x, monkeypatch, times=2) == 1
    CHANGES[change](layer, x)
    assert called(layer, x, monkeypatch, times=2) == 1


def test_other_modes(layer, monkeypatch):
    x = frames(2)
    with fastasr.backend("eager"):
        assert called(layer, x, monkeypatch, times=2) == 1
    assert called(layer, x, monkeypatch, times=2) == 1
    with torch.inference_mode():
        assert called(layer, x, monkeypatch, times=2) == 0
        assert called(layer, frames(2), monkeypatch, times=2) == 1


def test_nothing_stays(layer, monkeypatch):
    x = frames(2)
    assert called(layer, x, monkeypatch) == 1
    assert layer in repeated_inputs._results
    del x
    gc.collect()
    assert layer not in repeated_inputs._results
    with repeated_inputs.kept(layer):
        x = frames(2)
        assert layer(x).requires_grad  # with gradients nothing is kept
    assert layer not in repeated_inputs._results
    with torch.no_grad():
        layer(x)  # nor outside the block
    assert layer not in repeated_inputs._results
