# SPDX-License-Identifier: Apache-2.0
"""SpeechBrain's Transformer decoder in searches computes the last tokens alone, and in any other call is upstream's."""

import pytest
import torch
from steps import moved, numbers, seeded, swapped
from tiny_decoders import speechbrain_recogniser

import fastasr
from fastasr.swap.forwards import speechbrain_decoder

WIDTH, TOKENS, FRAMES = 16, 19, 9


def speechbrain(name):
    """Returns a module of the package. Imported with this file, its lazy parts would be there for other tests."""
    return pytest.importorskip(f"speechbrain.{name}")


def lookahead_mask(x):
    return speechbrain("lobes.models.transformer.Transformer").get_lookahead_mask(x)


@pytest.fixture
def steps(monkeypatch):
    """Collects the numbers of tokens of the calls that compute the last ones alone."""
    found = []
    compute = speechbrain_decoder._with_next

    def watched(self, steps, products, search, kept, x):
        found.append(x.shape[1])
        return compute(self, steps, products, search, kept, x)

    monkeypatch.setattr(speechbrain_decoder, "_with_next", watched)
    return found


def made(first=True):
    """Returns upstream's recogniser with its last layer, and a swapped copy."""
    seeded(f"speechbrain decoder {first}")
    theirs = moved(speechbrain_recogniser(TOKENS, WIDTH, first=first), 0.3).eval()
    return theirs, swapped(theirs)


def frames(batch=2):
    return torch.randn(batch, FRAMES, WIDTH, generator=numbers(1))


def searched(model, beams, x=None, lengths=(1.0, 0.6)):
    """Returns the tokens, their scores and the probabilities of a search."""
    options = {"bos_index": 1, "eos_index": 2, "min_decode_ratio": 0.9, "max_decode_ratio": 0.9}
    if beams > 1:
        options |= {"beam_size": beams, "using_eos_threshold": False, "return_topk": True, "topk": 2}
    else:
        options |= {"min_decode_ratio": 0.0, "temperature": 0, "eos_index": -1}
    searches = speechbrain("decoders.seq2seq")
    kind = searches.S2STransformerBeamSearcher if beams > 1 else searches.S2STransformerGreedySearcher
    with torch.no_grad():
        return kind([*model], **options)(frames() if x is None else x, torch.tensor(lengths))


@pytest.mark.parametrize("first", [True, False], ids=["norms first", "norms last"])
@pytest.mark.parametrize("beams", [1, 4])
def test_searches(beams, first, steps):
    """Two recordings, one of which has padding; the second search has the same frames."""
    theirs, ours = made(first)
    x = frames()
    for _ in range(2):
        found, expected = (searched(model, beams, x) for model in (ours, theirs))
        assert str(found[0]) == str(expected[0])
        torch.testing.assert_close(
            torch.as_tensor(found[2]), torch.as_tensor(expected[2]), rtol=2e-5, atol=2e-5
        )
        assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
        steps.clear()


def test_inference_mode(steps):
    theirs, ours = made()
    with torch.inference_mode():
        found, expected = (searched(model, 4) for model in (ours, theirs))
    assert str(found[0]) == str(expected[0])
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def tokens(length, rows=4):
    return torch.randn(rows, length, WIDTH, generator=numbers(2))


def called(theirs, ours, x, states, **kwargs):
    """Compares both decoders' results."""
    kwargs.setdefault("tgt_mask", lookahead_mask(x))
    with torch.no_grad():
        found, expected = (model[0].decoder(x, states, **kwargs) for model in (ours, theirs))
    torch.testing.assert_close(found[0], expected[0], rtol=2e-5, atol=2e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if a is not None:  # the attention of a whole sequence returns no weights
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    return found


def test_steps(steps):
    """Rows of a recording change places, or are repeated, between steps. Results are the caller's to write to."""
    theirs, ours = made()
    x, states = tokens(5, rows=6), frames(2).repeat_interleave(3, 0)
    padding = (torch.arange(FRAMES) >= torch.tensor([[FRAMES], [5]])).repeat_interleave(3, 0)
    orders = (
        [0, 1, 2, 3, 4, 5],
        [2, 0, 1, 3, 5, 4],
        [0, 0, 1, 5, 5, 5],
        [2, 1, 0, 3, 4, 5],
        [1, 1, 1, 4, 3, 3],
    )
    for n, order in enumerate(orders, 1):
        x = x[order]
        x[:, n - 1] = torch.randn(6, WIDTH, generator=numbers(n))
        found = called(theirs, ours, x[:, :n], states, memory_key_padding_mask=padding)
        for t in (found[0], *found[1], *found[2]):
            t.fill_(7)
    assert steps == [1, 2, 3, 4, 5]


def test_beams_share_frames(steps):
    theirs, ours = made()
    states = frames(2).repeat_interleave(2, 0)
    for n in (1, 2, 3):
        called(theirs, ours, tokens(3)[:, :n], states)
    (search,) = (
        kept[3] for kept in speechbrain_decoder.repeated_inputs._results.values() if kept[3] is not None
    )
    assert search.beams == 2
    assert len(search.frames[0][0]) == 2
    assert steps == [1, 2, 3]


def test_other_calls_are_upstreams(steps):
    theirs, ours = made()
    x, states = tokens(4), frames(4)
    called(theirs, ours, x, states)  # no step came before
    called(theirs, ours, x[:, :1], states)
    assert steps == [1]
    called(theirs, ours, x[:, :3], states)  # a step is missing
    called(theirs, ours, x[:, :2] + 1, states)  # other tokens
    called(theirs, ours, x[[1, 0, 2, 3], :2], states)  # tokens of another recording
    called(theirs, ours, x[:, :2], states, tgt_mask=torch.zeros(2, 2))
    called(theirs, ours, x[:, :2], states, tgt_mask=None)
    padding = torch.arange(FRAMES).expand(4, -1) > 6
    called(theirs, ours, x[:, :2], states, memory_key_padding_mask=padding)
    called(theirs, ours, x[:, :2], states, tgt_key_padding_mask=torch.tensor([[False, True]] * 4))
    assert steps == [1]
    called(theirs, ours, x[:, :2], states)
    assert steps == [1, 2]
    called(theirs, ours, x[:, :3], states.clone())  # other frames
    called(theirs, ours, x[:, :3], states)
    assert steps == [1, 2]


def written_frames(model, states):
    states[:, 3] += 1


def written_weight(model, states):
    with torch.no_grad():
        model[0].decoder.layers[1].multihead_attn.att.in_proj_weight.mul_(1.5)


def other_weight(model, states):
    attention = model[0].decoder.layers[0].self_attn.att
    attention.in_proj_weight = torch.nn.Parameter(attention.in_proj_weight.detach() * 2)


def hooked(model, states):
    model[0].decoder.layers[1].self_attn.att.register_forward_hook(lambda module, args, y: (2 * y[0], y[1]))


CHANGES = (written_frames, written_weight, other_weight, hooked)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_two_steps(change):
    theirs, ours = made()
    x, given = tokens(3), (frames(4), frames(4))
    for n in (1, 2, 3):
        if n == 2:
            for model, states in zip((theirs, ours), given, strict=True):
                change(model, states)
        mask = lookahead_mask(x[:, :n])
        with torch.no_grad():
            y, z = (
                m[0].decoder(x[:, :n], s, tgt_mask=mask)[0]
                for m, s in zip((theirs, ours), given, strict=True)
            )
        torch.testing.assert_close(z, y, rtol=2e-5, atol=2e-5)


def test_gradients_are_upstreams(steps):
    theirs, ours = made()
    x, states = tokens(2), frames(4)
    found = []
    for model in (theirs, ours):
        y, _, _ = model[0].decoder(x[:, :1], states, tgt_mask=torch.zeros(1, 1))
        y.square().sum().backward()
        found.append(model[0].decoder.layers[0].self_attn.att.in_proj_weight.grad)
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)
    assert not steps


def test_relative_positions_are_left_alone():
    home = speechbrain("lobes.models.transformer.Transformer")
    model = torch.nn.ModuleList(
        [home.TransformerDecoder(1, 2, 32, d_model=WIDTH, attention_type="RelPosMHAXL")]
    )
    found = {row.class_name: row.reason for row in fastasr.accelerate(model).skipped}
    assert found["TransformerDecoder"] == "its attention is RelPosMHAXL"
