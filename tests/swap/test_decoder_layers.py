# SPDX-License-Identifier: Apache-2.0
"""Layers of transformers' decoders, of which native calls compute a token: results are upstream's, and so is the code
wherever a call is of another kind."""

import copy
from functools import partial

import pytest
import torch
from steps import moved, numbers, seeded
from tiny_decoders import MAKERS, PLACES

import fastasr
from fastasr.ops import _dispatch, _reduced_weights
from fastasr.swap.forwards import decoder_layer, decoder_step

transformers = pytest.importorskip("transformers")
cache_utils = pytest.importorskip("transformers.cache_utils")
pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="no native library")


@pytest.fixture
def tokens(monkeypatch):
    """Collects the rows of every token that the native calls compute."""
    rows = []
    result = decoder_step.Step.result

    def counted(self, products, x, *others, **options):
        rows.append(len(x))
        return result(self, products, x, *others, **options)

    monkeypatch.setattr(decoder_step.Step, "result", counted)
    return rows


def made(name, **sizes):
    """Returns upstream's model in float32, a swapped copy and their inputs."""
    seeded(name)
    model, inputs = MAKERS[name](**sizes)
    theirs = moved(model, 0.3).float().eval()
    # neither an end nor padding, which generate cuts
    theirs.generation_config.suppress_tokens = [0, 2]
    ours = copy.deepcopy(theirs)
    fastasr.accelerate(ours)
    return theirs, ours, {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}


def generated(models, **options):
    options = {"max_new_tokens": 7, "output_scores": True, "return_dict_in_generate": True} | options
    return [model.generate(**options) for model in models]


def close(found, rtol=2e-4):
    """Compares the tokens and their scores."""
    theirs, ours = found
    assert torch.equal(theirs.sequences, ours.sequences)
    for a, b in zip(theirs.scores, ours.scores, strict=True):
        seen = a.isfinite()
        assert torch.equal(seen, b.isfinite())
        torch.testing.assert_close(b[seen], a[seen], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_generate(name, beams, tokens):
    """Two recordings, of which one has padding if the model has masks."""
    theirs, ours, inputs = made(name)
    close(generated([theirs, ours], **inputs, num_beams=beams))
    assert len(tokens) >= 12
    assert set(tokens) == {2, 2 * beams}  # the examples of both layers have two rows
    assert not fastasr.why(ours).to_dict()


@pytest.mark.parametrize("beams", [9, 16])
def test_many_rows(beams, tokens):
    """The products of more than 15 rows are those that have been measured."""
    theirs, ours, inputs = made("whisper")
    for _ in range(2):
        close(generated([theirs, ours], **inputs, num_beams=beams))
    assert set(tokens) == {2, 2 * beams}


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_weights_in_fewer_bits(weights, tokens, monkeypatch):
    """The native calls read the copies that the modules' products read."""
    if reason := _reduced_weights.why_not(weights):
        pytest.skip(reason)
    theirs, ours, inputs = made("whisper", d_model=64, decoder_ffn_dim=80)
    assert fastasr.accelerate(ours, weights=weights).weights.reduced
    found = generated([ours], **inputs)
    assert len(tokens) >= 12
    monkeypatch.setattr(decoder_layer, "_kept_frames", lambda *call: "")
    expected = generated([ours, theirs], **inputs)
    close([expected[0], *found], 0.02)
    scores = [torch.stack(result.scores)[..., 3:] for result in (*found, *expected)]
    apart = (scores[0] - scores[1]).norm() / (scores[2] - scores[1]).norm()
    assert apart < 0.2  # it is far nearer to the copies' results than those are to float32's


def step(model, cache=None, rows=2, length=1, **kwargs):
    """Returns a step of the first layer with a cache that holds a prompt of 3 tokens, and the cache."""
    layer = model.model.decoder.layers[0]
    states = torch.randn(rows, 5, 16, generator=numbers(2))
    prompt, x = (torch.randn(rows, n, 16, generator=numbers(n)) for n in (3, length))
    cache = cache or cache_utils.EncoderDecoderCache(cache_utils.DynamicCache(), cache_utils.DynamicCache())
    with torch.no_grad():
        layer(prompt, None, states, cache=cache)
    return layer(x, None, states, cache=cache, **kwargs), cache


def both(theirs, ours, act=lambda model: None, grad=False, **kwargs):
    """Compares the step of both models, after ``act``, and what it leaves in the cache."""
    found = []
    for model in (theirs, ours):
        act(model)
        with torch.set_grad_enabled(grad):
            found.append(step(model, **kwargs))
    (y, kept), (z, kept_of_ours) = found
    torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
    for name in ("self_attention_cache", "cross_attention_cache"):
        for layer in zip(*(getattr(cache, name).layers[:1] for cache in (kept, kept_of_ours)), strict=True):
            a, b = layer
            torch.testing.assert_close(b.keys, a.keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(b.values, a.values, rtol=1e-5, atol=1e-5)


def test_step(tokens):
    theirs, ours, _ = made("whisper")
    both(theirs, ours)
    assert tokens == [2, 2]
    both(theirs, ours, rows=256)
    both(theirs, ours, rows=256)
    both(theirs, ours, rows=257)
    assert set(tokens) <= {2, 256}


def test_two_tokens_or_gradients_run_upstreams(tokens):
    theirs, ours, _ = made("whisper")
    both(theirs, ours, length=2)
    both(theirs, ours, grad=True)
    both(theirs.train(), ours.train())
    assert not tokens


MASKS = {
    "bools": torch.tensor([[True, False, True, True], [False, True, True, True]]),
    "numbers": torch.tensor([[0.0, -1.5, float("-inf"), 0.5], [0.0, 0.0, 0.0, torch.finfo().min]]),
    "one row": torch.tensor([[True, True, False, True]]),
    "no bools": torch.tensor([[False, False, False, False], [True, True, True, True]]),
    "no numbers": torch.tensor([[float("-inf")] * 4, [0.0] * 4]),
}


def masked(model, implementation, mask, call=lambda layer: layer):
    """Returns the step of the first layer that sees what ``mask`` (R, T) says of tokens and, from behind, of frames."""
    model.set_attn_implementation(implementation)
    layer, mask = model.model.decoder.layers[0], mask[:, None, None]
    states, prompt, x = (torch.randn(2, n, 16, generator=numbers(n)) for n in (4, 3, 1))
    cache = cache_utils.EncoderDecoderCache(cache_utils.DynamicCache(), cache_utils.DynamicCache())
    with torch.no_grad():
        layer(prompt, None, states, cache=cache)
        return call(layer)(x, mask, states, encoder_attention_mask=mask.flip(-1), cache=cache)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, implementation, tokens):
    """``eager`` adds bools as numbers, and gives NaN to a query that sees no key."""
    found = [masked(model, implementation, MASKS[name]) for model in made("whisper")[:2]]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5, equal_nan=True)
    by_upstream = implementation == "eager" and name != "numbers"
    assert tokens == ([] if by_upstream else [2, 2])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_compiled(implementation, tokens):
    """torch.compile makes one graph of a step, as of upstream's."""
    compiled = partial(torch.compile, backend="eager", fullgraph=True)
    found = [masked(model, implementation, MASKS["numbers"], compiled) for model in made("whisper")[:2]]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert not tokens


def other_tokens(cache):
    cache.self_attention_cache = cache_utils.DynamicCache()


def static_tokens(cache):
    kept, cache.self_attention_cache = cache.self_attention_cache, cache_utils.DynamicCache()
    cache.self_attention_cache.layers = [Shifted(*kept.layers[:1])]


class Shifted(cache_utils.DynamicLayer):
    """A layer of a user, which reads what it has otherwise."""

    def __init__(self, kept):
        super().__init__()
        vars(self).update(vars(kept))

    def update(self, *states, **kwargs):
        keys, values = super().update(*states, **kwargs)
        return keys + 1, values


def wanting_gradients(cache):
    layer = cache.cross_attention_cache.layers[0]
    layer.values = layer.values.detach().requires_grad_()


class Doubling(cache_utils.DynamicCache):
    def update(self, *args, **kwargs):
        return [2 * t for t in super().update(*args, **kwargs)]


def doubled_tokens(cache):
    kept, cache.self_attention_cache = cache.self_attention_cache, Doubling()
    cache.self_attention_cache.layers = kept.layers


def no_tokens(cache):
    cache.self_attention_cache.crop(-cache.get_seq_length())


def spread_channels(cache):
    layer = cache.cross_attention_cache.layers[0]
    layer.keys = layer.keys.mT.contiguous().mT


def no_frames(cache):
    layer = cache.cross_attention_cache.layers[0]
    layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]


CHANGED_CACHES = (
    other_tokens,
    static_tokens,
    wanting_gradients,
    doubled_tokens,
    no_tokens,
    spread_channels,
    no_frames,
)


@pytest.mark.parametrize("change", CHANGED_CACHES)
def test_changed_caches(change, tokens):
    found = []
    for model in made("whisper")[:2]:
        _, cache = step(model.requires_grad_(False))
        tokens.clear()
        change(cache)
        layer = model.model.decoder.layers[0]
        states, x = (torch.randn(2, n, 16, generator=numbers(n)) for n in (5, 1))
        found.append(layer(x, None, states, cache=cache))
        assert found[-1].requires_grad == (change is wanting_gradients)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert not tokens


def test_other_caches(tokens):
    theirs, ours, inputs = made("whisper")
    close(generated([theirs, ours], **inputs, cache_implementation="static"))
    close(generated([theirs, ours], **inputs, use_cache=False))
    assert not tokens


REASONS = {
    "static cache": ({"cache_implementation": "static"}, "the cache is not transformers' DynamicCache"),
    "rows": ({"num_return_sequences": 129, "do_sample": True}, "more than 256 hypotheses"),
    "outputs": ({"output_attentions": True}, "the call has output_attentions"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name, tokens):
    """``fastasr.why`` tells why upstream's code computes tokens after the prompt."""
    options, reason = REASONS[name]
    _, ours, inputs = made("whisper")
    ours.generate(**inputs, max_new_tokens=2)
    assert not fastasr.why(ours).to_dict()
    tokens.clear()
    ours.generate(**inputs, max_new_tokens=2, **options)
    assert reason in fastasr.why(ours)["model.decoder.layers.1.forward"]
    assert not tokens


@pytest.mark.parametrize("implementation", ["of_a_user", "eager"])
def test_reasons_of_attention(implementation, tokens):
    """An implementation that a user registered, and a mask of which ``eager`` makes NaN."""
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    functions.register("of_a_user", functions["sdpa"])
    _, ours, _ = made("whisper")
    try:
        masked(ours, implementation, MASKS["no numbers"])
    finally:
        del functions._global_mapping["of_a_user"]
    reason = {
        "of_a_user": "the attention implementation is of_a_user",
        "eager": "what its attention does with a mask",
    }
    assert reason[implementation] in fastasr.why(ours)["model.decoder.layers.0.forward"]
    assert not tokens


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(model):
    layer, made = model.model.decoder.layers[0], Doubled(16, 16).eval()
    made.load_state_dict(layer.self_attn.v_proj.state_dict())
    layer.self_attn.v_proj = made


def watched(model):
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda module, inputs, y: 3 * y)


def other_activation(model):
    model.model.decoder.layers[0].activation_fn = torch.nn.Softplus().eval()


def wider(model):
    layer = model.model.decoder.layers[0]
    layer.final_layer_norm = torch.nn.Sequential(layer.final_layer_norm, torch.nn.Tanh()).eval()


CHANGES = {
    "a projection": (doubled, "not a plain torch.nn.Linear"),
    "a hook": (watched, "fc1 has hooks"),
    "an activation": (other_activation, "Softplus"),
    "a norm": (wider, "a norm is not"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_parts(name, tokens):
    """A layer that a user has changed, before its first token or between two, runs upstream's code, and says why."""
    act, reason = CHANGES[name]
    theirs, ours, _ = made("whisper")
    both(theirs, ours)
    both(theirs, ours, act)
    assert tokens == [2, 2]
    (noted,) = fastasr.why(ours).to_dict().values()
    assert reason in noted
    theirs, ours, _ = made("whisper")
    both(theirs, ours, act)
    assert tokens == [2, 2]


@pytest.mark.parametrize("name", MAKERS)
def test_outputs_that_a_call_collected(name, tokens):
    """The hooks with which transformers collects outputs stay. Later calls that ask for none are native."""
    theirs, ours, inputs = made(name)
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    for options in (asked, {}, asked):
        tokens.clear()
        found = generated([theirs, ours], **inputs, **options)
        close(found)
        assert len(tokens) == (0 if options else 14)  # with an example of each layer
        if options:
            for part in ("cross_attentions", "decoder_attentions", "decoder_hidden_states"):
                for a, b in zip(*(getattr(result, part) for result in found), strict=True):
                    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    noted = fastasr.why(ours)[f"{PLACES[name]}.forward"]
    assert noted == "the call has output_attentions and output_hidden_states"


def test_hook_of_the_layer(tokens, monkeypatch):
    """A layer's own hooks run around its native calls, before its first token too."""
    made_steps, shapes = [], []
    packed = decoder_step.Step.__init__
    monkeypatch.setattr(decoder_step.Step, "__init__", lambda *given: made_steps.append(packed(*given)))
    theirs, ours, inputs = made("whisper")
    for model in (theirs, ours):
        layer = model.model.decoder.layers[0]
        layer.register_forward_hook(lambda module, given, y: shapes.append(y.shape))
    close(generated([theirs, ours], **inputs))
    assert len(tokens) == 14
    assert len(made_steps) == 2
    assert shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :]


def test_weights_change(tokens):
    """Parameters that are written, in place or by another tensor, count from the next token on."""
    theirs, ours, _ = made("whisper")
    both(theirs, ours)

    def written(model):
        with torch.no_grad():
            model.model.decoder.layers[0].fc1.weight.mul_(1.5)
            model.model.decoder.layers[0].encoder_attn_layer_norm.bias.add_(1)

    def replaced(model):
        layer = model.model.decoder.layers[0]
        layer.fc2.weight = torch.nn.Parameter(torch.randn(16, 32, generator=numbers(3)))

    both(theirs, ours, written)
    both(theirs, ours, replaced)
    assert len(tokens) >= 4


@pytest.mark.parametrize("name", MAKERS)
def test_scaling_changes(name, tokens):
    """The factor of an attention's scores counts from the next token on, as in other swapped attention."""
    theirs, ours, inputs = made(name)
    close(generated([theirs, ours], **inputs))
    for model in (theirs, ours):
        layer = model.get_submodule(PLACES[name])
        for part in decoder_layer.names_of(layer)[0:3:2]:
            layer.get_submodule(part).scaling *= 1.7
    tokens.clear()
    close(generated([theirs, ours], **inputs))
    assert len(tokens) == 12


def test_autocast(tokens):
    theirs, ours, _ = made("whisper")
    with torch.autocast("cpu", torch.bfloat16):
        found = [step(model)[0] for model in (theirs.requires_grad_(False), ours.requires_grad_(False))]
    torch.testing.assert_close(found[1].float(), found[0].float(), rtol=0.05, atol=0.05)
    assert fastasr.why(ours)["model.decoder.layers.0.forward"] == "autocast is on"
    assert not tokens


def test_restored(tokens):
    theirs, ours, _ = made("whisper")
    fastasr.restore(ours)
    both(theirs, ours)
    assert not tokens
