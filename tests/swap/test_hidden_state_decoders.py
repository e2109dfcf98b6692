# SPDX-License-Identifier: Apache-2.0
"""Layers of ESPnet's, FireRedASR's and NeMo's decoders, of which native calls compute a token: results are upstream's,
earlier tokens are not projected again, and upstream's code runs wherever a call is of another kind."""

import copy
import gc

import pytest
import torch
from steps import moved, numbers, seeded
from tiny_conformers import WIDTH
from tiny_decoders import PROJECTING

import fastasr
from fastasr.models.common import repeated_inputs
from fastasr.ops import _dispatch, _reduced_weights
from fastasr.swap.forwards import decoder_step, hidden_state_decoders

pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="no native library")
FRAMES = 9
NAMES = {
    "espnet": hidden_state_decoders.ESPNET,
    "fireredasr": hidden_state_decoders.FIRERED,
    "nemo": hidden_state_decoders.NEMO,
}


def made(name, width=WIDTH):
    """Returns upstream's layer in float32 and a swapped copy."""
    seeded(name)
    theirs = moved(PROJECTING[name](width), 0.3).float().eval()
    ours = copy.deepcopy(theirs)
    fastasr.accelerate(ours)
    return theirs, ours


@pytest.fixture
def native(monkeypatch):
    """Collects the rows of every token that the native calls compute, and how many tokens are projected again."""
    calls, again = [], []
    result, of_tokens = decoder_step.Step.result, decoder_step.Step.of_tokens

    def counted(self, products, x, *others, **options):
        calls.append(len(x))
        return result(self, products, x, *others, **options)

    def projected(self, x):
        again.append(x.shape[1])
        return of_tokens(self, x)

    monkeypatch.setattr(decoder_step.Step, "result", counted)
    monkeypatch.setattr(decoder_step.Step, "of_tokens", projected)
    return calls, again


def frames(rows, recordings=1, width=WIDTH):
    """The frames of each recording, once for each of its rows."""
    x = torch.randn(recordings, FRAMES, width, generator=numbers(recordings))
    return x.repeat_interleave(rows // recordings, 0)


def inputs(rows, length, seed=3, width=WIDTH):
    return torch.randn(rows, length, width, generator=numbers(seed))


def step(layer, x, states, seen=None):
    """Returns all results of a layer for the last token of x (R, T, WIDTH). ``seen``: frames (R or 1, K), or None."""
    rows, length = x.shape[:2]
    kind = type(layer).__module__.partition(".")[0]
    if kind == "nemo":
        mask = None if seen is None else (~seen)[:, None, None] * -10000.0
        y, more = layer(x[:, -1:], torch.zeros(rows, 1, 1, 1), x, states, mask)
        return y, more["xatt_scores"]
    cache, own = x[:, :-1] * 2, torch.ones(1, length, length).tril().bool()
    frames = None if seen is None else seen[:, None]
    if kind == "espnet":
        y = layer(x, own, states, frames, cache=cache)[0]
        return y, layer.self_attn.attn, layer.src_attn.attn
    return (layer(x, states, own, frames, cache=cache),)


def compare(theirs, ours, *call, **options):
    with torch.no_grad():
        found = [step(layer, *call, **options) for layer in (theirs, ours)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def searched(theirs, ours, order, states, **options):
    """Compares tokens, before each of which rows change places: ``order`` has their places before."""
    x = inputs(len(order[0]), 1)
    compare(theirs, ours, x, states, **options)
    for seed, places in enumerate(order[1:]):
        x = torch.cat((x[places], inputs(len(x), 1, seed)), 1)
        compare(theirs, ours, x, states, **options)


ORDER = [[0, 1, 2], [0, 0, 0], [0, 1, 2], [2, 0, 0], [1, 1, 2]]


@pytest.mark.parametrize("recordings", [1, 3])
@pytest.mark.parametrize("name", PROJECTING)
def test_beams(name, recordings, native):
    theirs, ours = made(name)
    searched(theirs, ours, ORDER, frames(3, recordings))
    assert native == ([2, 3, 3, 3, 3, 3], [])  # the example has two rows
    assert not fastasr.why(ours).to_dict()


@pytest.mark.parametrize("name", PROJECTING)
def test_masks(name, native):
    """Of the frames' keys some are hidden, and in one row all."""
    theirs, ours = made(name)
    seen = torch.rand(4, FRAMES, generator=numbers(2)) > 0.4
    seen[1] = False
    searched(theirs, ours, [[0, 1, 2, 3], [1, 1, 3, 2]], frames(4, 2), seen=seen)
    searched(theirs, ours, [[0, 1, 2, 3], [1, 1, 3, 2]], frames(4, 2), seen=seen[2:3])
    assert native[0][1:] == [4] * 4


@pytest.mark.parametrize("name", PROJECTING)
def test_unknown_tokens(name, native):
    """Tokens that were not in the step before are projected again: other ones, after a gap, and some of the rows."""
    theirs, ours = made(name)
    states, x = frames(2), inputs(2, 5)
    compare(theirs, ours, x[:, :3], states)
    compare(theirs, ours, x[:, :4], states)
    compare(theirs, ours, inputs(2, 5, seed=4), states)
    other = inputs(2, 6, seed=4)
    other[1, 2, 5] += 1
    compare(theirs, ours, other, states)
    assert native[1] == [2, 4, 5]


@pytest.mark.parametrize("name", PROJECTING)
def test_rows_leave(name, native):
    """A hypothesis ends, and its row goes."""
    theirs, ours = made(name)
    states, x = frames(1).expand(3, -1, -1), inputs(3, 4)
    compare(theirs, ours, x[:, :3], states)
    compare(theirs, ours, x[[0, 2]], states[:2])
    assert native == ([2, 3, 2], [2])


@pytest.mark.parametrize("name", PROJECTING)
def test_weights_change(name, native):
    """Earlier tokens and frames are projected again by weights that changed, in place or by another tensor."""
    theirs, ours = made(name)
    states, x = frames(2), inputs(2, 6)
    compare(theirs, ours, x[:, :3], states)
    part = NAMES[name]
    for length, change in ((4, "own"), (5, "frames"), (6, "own_norm")):
        for layer in (theirs, ours):
            changed = layer.get_submodule(getattr(part, change))
            target = changed if change == "own_norm" else getattr(changed, part.projections[1])
            with torch.no_grad():
                if length == 4:
                    target.weight = torch.nn.Parameter(target.weight * 1.5)
                else:
                    target.weight.mul_(1.5)
        compare(theirs, ours, x[:, :length], states)
    assert native[1] == [2, 3, 4, 5]


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_weights_in_fewer_bits(weights, native, monkeypatch):
    """The native calls read the copies that the modules' products read."""
    if reason := _reduced_weights.why_not(weights):
        pytest.skip(reason)
    theirs, ours = made("fireredasr", 64)
    assert fastasr.accelerate(ours, weights=weights).weights.reduced
    x, states = inputs(2, 3, width=64), frames(2, width=64)
    with torch.no_grad():
        expected, found = (step(layer, x, states)[0][:, 2:] for layer in (theirs, ours))
        monkeypatch.setattr(hidden_state_decoders, "_token", lambda *call: None)
        by_modules = step(ours, x, states)[0][:, 2:]
    assert native[0]
    assert (found - by_modules).norm() < 0.2 * (by_modules - expected).norm()


def watched(layer):
    layer.get_submodule("norm1").register_forward_hook(lambda module, inputs, y: 3 * y)


def other_activation(layer):
    layer.feed_forward.activation = torch.nn.Softplus().eval()


def doubled(layer):
    layer.self_attn.q_norm = torch.nn.Sequential(torch.nn.Tanh()).eval()


CHANGES = {"a hook": (watched, "norm1 has hooks"), "an activation": (other_activation, "Softplus")}
CHANGES["a norm of queries"] = (doubled, "compute something else")


@pytest.mark.parametrize("name", CHANGES)
def test_changed_parts(name, native):
    """A layer that a user has changed between two tokens runs upstream's code, and says why."""
    act, reason = CHANGES[name]
    theirs, ours = made("espnet")
    states, x = frames(2), inputs(2, 4)
    compare(theirs, ours, x[:, :3], states)
    for layer in (theirs, ours):
        act(layer)
    native[0].clear()
    compare(theirs, ours, x, states)
    assert 2 not in native[0][1:]
    (noted,) = fastasr.why(ours).to_dict().values()
    assert reason in noted


OTHERS = {
    "gradients": lambda x: torch.enable_grad(),
    "eager": lambda x: fastasr.backend("eager"),
    "autocast": lambda x: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", OTHERS)
@pytest.mark.parametrize("name", PROJECTING)
def test_other_modes(name, mode, native):
    found = []
    for layer in made(name):
        x = inputs(2, 3)
        with torch.no_grad(), OTHERS[mode](x):
            found.append(step(layer, x, frames(2))[0].detach().float())
    rtol = 0.05 if mode == "autocast" else 1e-5
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=rtol)
    assert not native[0]


@pytest.mark.parametrize("name", PROJECTING)
def test_many_rows(name, native):
    """256 rows at most."""
    theirs, ours = made(name)
    for rows, recordings in ((256, 16), (257, 1), (20, 1)):
        for _ in range(2):  # the products of more than 15 rows are measured first
            compare(theirs, ours, inputs(rows, 2), frames(rows, recordings))
    assert set(native[0]) == {2, 256, 20}


def test_nothing_stays():
    """Keys and values of tokens are gone with the frames."""
    _, ours = made("espnet")
    states = frames(2)
    with torch.no_grad():
        step(ours, inputs(2, 3), states)
    assert repeated_inputs._results
    del states
    gc.collect()
    assert not repeated_inputs._results


def test_bad_input_raises_as_upstream():
    theirs, ours = made("espnet")
    for layer in (theirs, ours):
        with pytest.raises(AssertionError), torch.no_grad():
            layer(inputs(2, 3), None, frames(2), None, cache=inputs(2, 3))
        with pytest.raises(RuntimeError), torch.no_grad():
            layer(inputs(2, 3), None, frames(3), None, cache=inputs(2, 2))
