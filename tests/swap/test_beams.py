# SPDX-License-Identifier: Apache-2.0
"""``generate`` of transformers' models with an encoder and a decoder: beams of one recording share the keys and values
of its frames, and results are upstream's."""

import copy
import pickle

import pytest
import torch
from steps import moved, numbers, seeded
from tiny_decoders import MAKERS

import fastasr
from fastasr.swap.forwards.transformers_cache import SharedRows, shared_layer

transformers = pytest.importorskip("transformers")
cache_utils = pytest.importorskip("transformers.cache_utils")


def made(name, implementation="sdpa", attempt=0):
    """Returns upstream's model in double, a swapped copy and their inputs."""
    seeded(f"{name} {attempt}")
    model, inputs = MAKERS[name]()
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = implementation
    theirs = moved(model, 0.3).double().eval()
    # neither an end nor padding, which generate cuts
    theirs.generation_config.suppress_tokens = [0, 2]
    ours = copy.deepcopy(theirs)
    fastasr.accelerate(ours)
    return theirs, ours, inputs


@pytest.fixture
def held(monkeypatch):
    """Collects (rows of keys, beams) of a swapped model's cross attention at every step."""
    rows = []
    reorder = SharedRows.reorder_cache

    def watched(self, beam_idx):
        rows.append((len(self.held["keys"]), self.beams))
        reorder(self, beam_idx)

    monkeypatch.setattr(SharedRows, "reorder_cache", watched)
    return rows


@pytest.mark.parametrize("name", MAKERS)
def test_beams(name, held):
    options = {"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 1}
    for attempt in range(20):  # a random decoder may say the same of all recordings
        theirs, ours, inputs = made(name, attempt=attempt)
        expected = theirs.generate(**inputs, **options)
        if len({tuple(row) for row in expected.tolist()}) >= 2:
            break
    assert len({tuple(row) for row in expected.tolist()}) >= 2
    assert expected.shape[1] > 6
    assert len(expected) == 4
    assert torch.equal(ours.generate(**inputs, **options), expected)
    # a row of keys for each recording at every step of both layers
    assert set(held) == {(2, 6 if name == "whisper" else 3)}  # Whisper multiplies beams and results
    assert len(held) >= 16
    one = [model.generate(**inputs, max_new_tokens=9) for model in (theirs, ours)]
    assert torch.equal(*one)


@pytest.mark.parametrize("name", ["whisper", "moonshine", "speech2text", "seamless"])
def test_weights(name):
    theirs, ours, inputs = made(name, "eager")
    options = inputs | {"max_new_tokens": 5, "num_beams": 2, "output_attentions": True}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    found = [model.generate(**options) for model in (theirs, ours)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for step, other in zip(*(result.cross_attentions for result in found), strict=True):
        for a, b in zip(step, other, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    for a, b in zip(*(result.scores for result in found), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10)


def filled(beams=3, batch=2):
    """Returns a cache of upstream's with the rows of beams, and the same in a shared layer."""
    keys, values = torch.randn(2, batch, 2, 5, 4, generator=numbers(3))
    theirs, layer = cache_utils.DynamicLayer(), cache_utils.DynamicLayer()
    theirs.update(keys.repeat_interleave(beams, 0), values.repeat_interleave(beams, 0))
    layer.update(keys, values)
    return theirs, shared_layer(layer, beams)


def same(theirs, ours):
    assert torch.equal(theirs.keys, ours.keys)
    assert torch.equal(theirs.values, ours.values)
    assert theirs.get_seq_length() == ours.get_seq_length()


CHANGES = {
    "within a recording": (lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0, 5, 3, 3])), 3),
    "between recordings": (lambda layer: layer.reorder_cache(torch.tensor([1, 4, 0, 5, 3, 3])), 1),
    "fewer": (lambda layer: layer.reorder_cache(torch.tensor([0, 3])), 1),
    "selected": (lambda layer: layer.batch_select_indices(torch.tensor([0, 4])), 1),
    "repeated": (lambda layer: layer.batch_repeat_interleave(2), 1),
    "cropped": (lambda layer: layer.crop(-2), 1),
    "longer": (lambda layer: layer.update(*torch.ones(2, 6, 2, 1, 4)), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layer_is_upstreams_to_others(change):
    act, beams = CHANGES[change]
    theirs, ours = filled()
    for layer in (theirs, ours):
        act(layer)
    assert ours.beams == beams
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours):
        same(theirs, other)


def test_layer_is_written_in_place():
    theirs, ours = filled()
    for layer in (theirs, ours):
        layer.keys[1] = 0
        layer.values[2:].mul_(3)
    same(theirs, ours)
    other = copy.copy(ours)
    other.keys = other.keys[:2]
    same(theirs, ours)
    theirs, ours = filled()
    with ours.shared():
        assert len(ours.keys) == 2


def test_reset_layer():
    _, ours = filled()
    ours.reset()
    assert ours.get_seq_length() == 0
    assert ours.keys is None


def attention(rows, cache=None, mask=None, tokens=1):
    """Returns upstream's and our outputs of a decoder's attention to an encoder's frames in these rows."""
    theirs, ours, _ = made("whisper")
    parts = [model.model.decoder.layers[0].encoder_attn for model in (theirs, ours)]
    x = torch.randn(len(rows), tokens, 16, generator=numbers(5)).double()
    states = torch.randn(len(rows), 4, 16, generator=numbers(6)).double()[rows]
    found = []
    for part in parts:
        made_cache = cache_utils.EncoderDecoderCache(cache_utils.DynamicCache(), cache_utils.DynamicCache())
        with torch.no_grad():
            y = [part(x, key_value_states=states, attention_mask=mask, cache=made_cache)[0] for _ in range(2)]
        found.append((torch.stack(y), made_cache.cross_attention_cache.layers[0]))
    (y, layer), (z, shared) = found
    beams = getattr(shared, "beams", 1)
    torch.testing.assert_close(z, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(shared.keys, layer.keys, rtol=0, atol=1e-12)
    return beams


@pytest.mark.parametrize(
    ("rows", "beams"),
    [
        ([0, 0, 1, 1], 2),
        ([0, 0, 0, 0], 4),
        ([0, 0, 0, 0, 1, 1], 2),
        ([0, 0, 0, 1], 1),
        ([0, 1, 0, 1], 1),
        ([0], 1),
    ],
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_groups_of_equal_rows(rows, beams, tokens):
    assert attention(rows, tokens=tokens) == beams


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (1, 1, 3, 4), (4, 1, 1, 4), (4, 1, 3, 4), (4, 2, 3, 4)])
def test_masks(shape):
    mask = torch.rand(shape, generator=numbers(7)) > 0.4
    mask[..., 0] = True
    assert attention([0, 0, 1, 1], mask=mask, tokens=3) == 2


def test_rows_that_differ_late():
    """The first frames of two rows are equal, a later one is not."""
    theirs, ours, _ = made("whisper")
    x = torch.randn(2, 1, 16, generator=numbers(5)).double()
    states = torch.randn(1, 4, 16, generator=numbers(6)).double().repeat(2, 1, 1)
    outputs = []
    for change in (0.0, 0.0, 1.0):  # written in place between two calls
        states[1, 3] += change
        for model in (theirs, ours):
            cache = cache_utils.EncoderDecoderCache(cache_utils.DynamicCache(), cache_utils.DynamicCache())
            for layer in model.model.decoder.layers:
                with torch.no_grad():
                    y = layer.encoder_attn(x, key_value_states=states, cache=cache)[0]
            outputs.append((y, cache))
        torch.testing.assert_close(outputs[-1][0], outputs[-2][0], rtol=0, atol=1e-12)
    beams = [getattr(cache.cross_attention_cache.layers[1], "beams", 1) for _, cache in outputs[1::2]]
    assert beams == [2, 2, 1]


def test_without_sharing():
    """Upstream's rows stay in training, with watched projections, and in other caches."""
    _, ours, _ = made("whisper")
    part = ours.model.decoder.layers[0].encoder_attn
    x, states = torch.randn(2, 1, 16).double(), torch.randn(1, 4, 16).double().repeat(2, 1, 1)

    def rows():
        cache = cache_utils.EncoderDecoderCache(cache_utils.DynamicCache(), cache_utils.DynamicCache())
        part(x, key_value_states=states, cache=cache)
        return getattr(cache.cross_attention_cache.layers[0], "beams", 1)

    assert rows() == 2
    hook = part.k_proj.register_forward_hook(lambda *_: None)
    assert rows() == 1
    hook.remove()
    assert rows() == 2
    part.train()
    assert rows() == 1


def decoded(model, states, between=None, cache=None):
    """Returns the decoder's outputs of three steps with the frames ``states``, and the cache."""
    if cache is None:
        cache = cache_utils.EncoderDecoderCache(cache_utils.DynamicCache(), cache_utils.DynamicCache())
    outputs = []
    for step in range(3):
        tokens = (torch.arange(2 * len(states)).reshape(-1, 2) + 3)[:, 0 if step == 0 else 1 :]
        y = model.model.decoder(input_ids=tokens, encoder_hidden_states=states, cache=cache)
        outputs.append(y.last_hidden_state)
        if between is not None:
            between(model, step)
    return torch.cat(outputs, 1), cache


def frames(*rows):
    return torch.randn(len(rows), 4, 16, generator=numbers(6)).double()[list(rows)]


def test_gradients_of_equal_rows():
    """Each row of the frames gets its own gradient, and its own derivative in forward mode."""
    theirs, ours, _ = made("whisper", "eager")
    states, found = frames(0, 0, 1, 1), []
    tangents = torch.randn(states.shape, generator=numbers(7)).double()
    for model in (theirs, ours):
        leaf = states.clone().requires_grad_()
        (decoded(model, leaf)[0] ** 2).sum().backward()
        own = torch.func.grad(lambda s, model=model: (decoded(model, s)[0] ** 2).sum())(states)
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            y = decoded(model, torch.autograd.forward_ad.make_dual(states, tangents))[0]
            found.append((leaf.grad, own, torch.autograd.forward_ad.unpack_dual(y).tangent))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-9)
    with torch.no_grad():
        assert decoded(ours, states)[1].cross_attention_cache.layers[0].beams == 2


@pytest.mark.parametrize("name", ["q_proj", "out_proj"])
@pytest.mark.parametrize("first", [0, 1])
def test_hooks_see_rows_of_beams(name, first):
    """Hooks that users add before a step or between two see upstream's rows."""
    shapes = []

    def watch(model, step):
        if step == first - 1:
            part = getattr(model.model.decoder.layers[1].encoder_attn, name)
            part.register_forward_hook(lambda _, inputs, y: shapes[-1].append((inputs[0].shape, y.shape)))

    outputs = []
    for model in made("whisper")[:2]:
        shapes.append([])
        watch(model, -1)
        with torch.no_grad():
            outputs.append(decoded(model, frames(0, 0, 1, 1), watch)[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 3 - first


def test_training_between_steps():
    """Dropout of the weights draws upstream's numbers though earlier steps shared keys."""
    found = []
    for model in made("whisper")[:2]:
        for layer in model.model.decoder.layers:
            layer.encoder_attn.dropout = 0.5
        seeded("dropout")
        with torch.no_grad():
            found.append(decoded(model, frames(0, 0), lambda m, _: m.train())[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_users_attention_function():
    """An attention function that a user registered gets upstream's rows."""
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    seen = []

    def function(module, query, key, *others, **kwargs):
        seen.append((len(query), len(key)))
        return sdpa(module, query, key, *others, **kwargs)

    sdpa = functions["sdpa"]
    _, ours, _ = made("whisper")
    functions.register("of_a_user", function)
    try:
        ours.model.decoder.config._attn_implementation = "of_a_user"
        with torch.no_grad():
            decoded(ours, frames(0, 0))
    finally:
        del functions._global_mapping["of_a_user"]
    assert set(seen) == {(2, 2)}


def test_frames_that_change_in_place():
    """A layer is swapped alone, and the caller keeps one buffer for the frames of all calls."""
    theirs, ours, _ = made("whisper")
    fastasr.restore(ours)
    fastasr.accelerate(ours, only="model.decoder.layers.1.*")
    states = frames(0, 0)
    for change in (0.0, 1.0):
        states[1] += change
        with torch.no_grad():
            y, z = (decoded(model, states)[0] for model in (theirs, ours))
        torch.testing.assert_close(z, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rows", "count"), [((0, 0), 1), ((0, 0), 4), ((0, 0, 0, 0), 2)])
def test_other_number_of_rows(rows, count):
    """Upstream reads frames of another number of rows as longer or shorter ones."""
    x, found = torch.randn(count, 1, 16, generator=numbers(5)).double(), []
    for model in made("whisper")[:2]:
        cache = cache_utils.EncoderDecoderCache(cache_utils.DynamicCache(), cache_utils.DynamicCache())
        part = model.model.decoder.layers[0].encoder_attn
        with torch.no_grad():
            y = [part(x, key_value_states=frames(*rows), cache=cache)[0] for _ in range(2)]
        found.append(torch.stack(y))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_cache_that_has_keys():
    """Upstream appends keys to those that a cache has, if its flag does not say that it is full."""
    found = []
    for model in made("whisper")[:2]:
        with torch.no_grad():
            cache = decoded(model, frames(0, 1))[1]
            cache.is_updated.clear()
            found.append(decoded(model, frames(0, 0), cache=cache)[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_decoder_with_fewer_rows_than_its_cache():
    """Upstream refuses other rows than the cache has. One row of keys would serve them all."""
    for model in made("whisper")[:2]:
        with torch.no_grad():
            cache = decoded(model, frames(0, 0))[1]
            part = model.model.decoder.layers[0].encoder_attn
            with pytest.raises(RuntimeError):
                part(torch.ones(4, 1, 16).double(), key_value_states=frames(0, 0, 0, 0), cache=cache)


@torch.no_grad()
def test_restored_in_between():
    """A cache with shared rows serves upstream's code too."""
    theirs, ours, inputs = made("whisper")
    cache = [
        cache_utils.EncoderDecoderCache(cache_utils.DynamicCache(), cache_utils.DynamicCache())
        for _ in range(2)
    ]
    states = [
        model.model.encoder(**inputs).last_hidden_state.repeat_interleave(2, 0) for model in (theirs, ours)
    ]
    tokens = torch.tensor([[1], [3], [1], [4]])
    for step in range(2):
        logits = [
            model(encoder_outputs=(s,), decoder_input_ids=tokens, cache=c).logits
            for model, s, c in zip((theirs, ours), states, cache, strict=True)
        ]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-9)
        if step == 0:
            assert cache[1].cross_attention_cache.layers[1].beams == 2
            fastasr.restore(ours)
