# SPDX-License-Identifier: Apache-2.0
"""Language models in searches of ESPnet and SpeechBrain: a step computes its own tokens alone, results are upstream's,
and outside a search so is the code."""

import copy

import pytest
import torch
from steps import moved, numbers, seeded
from tiny_searches import (
    FRAMES,
    TOKENS,
    WIDTH,
    espnet_search,
    speechbrain,
    speechbrain_lm,
    speechbrain_search,
)

import fastasr
from fastasr.ops import _dispatch
from fastasr.swap.forwards import decoder_step, searches

pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="no native library")


@pytest.fixture
def native(monkeypatch):
    """Collects the rows of every token of a language model that the native calls compute."""
    rows = []
    result = decoder_step.Step.result

    def counted(self, products, x, *others, **options):
        if not self._of_frames:
            rows.append(len(x))
        return result(self, products, x, *others, **options)

    monkeypatch.setattr(decoder_step.Step, "result", counted)
    return rows


def copies(model):
    theirs = moved(model, 0.3).float().eval()
    for part in theirs.modules():
        if hasattr(part, "fc"):  # SpeechBrain's search: it finds no padding
            part.fc.w.bias.data[0] = -100
    ours = copy.deepcopy(theirs)
    fastasr.accelerate(ours)
    return theirs, ours


# --------------------------------------------------------------------------- ESPnet
def espnet_found(search):
    with torch.no_grad():
        found = search(torch.randn(FRAMES, WIDTH, generator=numbers(1)), maxlenratio=0.9)
    return [(hyp.yseq.tolist(), float(hyp.score)) for hyp in found]


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one by one"])
def test_espnet(batched, native):
    seeded("espnet language model")
    theirs, ours = copies(espnet_search(batched))
    expected, found = espnet_found(theirs), espnet_found(ours)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-4)
    assert len(expected[0][0]) > 5
    assert max(native) == (4 if batched else 2)
    assert len(native) > 12
    assert not fastasr.why(ours).to_dict()
    assert searches._thread.kept is None


def test_espnet_without_its_search(native):
    """A swap of the language model alone leaves upstream's search, in which its layers are upstream's."""
    seeded("espnet language model alone")
    theirs, ours = (moved(espnet_search(), 0.3).float().eval() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    fastasr.accelerate(ours.nn_dict.lm)
    assert [t for t, _ in espnet_found(ours)] == [t for t, _ in espnet_found(theirs)]
    assert not native


def test_espnet_projects_no_token_again(native, monkeypatch):
    seeded("espnet tokens")
    _, ours = copies(espnet_search())
    again, of_tokens = [], decoder_step.Step.of_tokens
    monkeypatch.setattr(
        decoder_step.Step, "of_tokens", lambda self, x: again.append(x.shape[1]) or of_tokens(self, x)
    )
    espnet_found(ours)
    # The first token has no cache in upstream's code. Upstream computes the language model's first input anew, whose
    # bits may depend on the number of rows.
    assert again.count(1) == 4
    assert len(again) < len(native) / 2


# --------------------------------------------------------------------------- SpeechBrain
def models(beams=4, scorer="TransformerLMScorer", **options):
    """Returns upstream's search with a language model, and a swapped copy."""
    seeded(f"speechbrain {options}")
    lm = speechbrain_lm(**options)
    kind = getattr(speechbrain("decoders.scorer"), scorer) if isinstance(scorer, str) else scorer
    search = speechbrain_search(beams, [kind(lm)], {"transformerlm": 0.6})
    return copies(torch.nn.ModuleList((search, lm)))


def speechbrain_found(model, rows=2):
    x = torch.randn(rows, FRAMES, WIDTH, generator=numbers(1))
    with torch.no_grad():
        tokens, _, scores, _ = model[0](x, torch.tensor([1.0, 0.6])[:rows])
    return tokens, torch.as_tensor(scores)


def same(theirs, ours, **options):
    (tokens, scores), (expected, others) = (speechbrain_found(model, **options) for model in (ours, theirs))
    assert tokens == expected
    torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-4)
    assert max(map(len, tokens)) > 5


@pytest.mark.parametrize("options", [{}, {"first": True}, {"d_embedding": 8}], ids=str)
def test_speechbrain(options, native):
    """Norms behind the blocks, which is upstream's default, or before them."""
    theirs, ours = models(**options)
    for _ in range(2):
        same(theirs, ours)
    assert set(native) == {2, 8}  # the example has two rows
    assert len(native) > 30
    assert searches._thread.kept is None


def test_many_beams(native):
    theirs, ours = models(beams=66)
    for _ in range(2):  # the products of so many rows are measured first
        same(theirs, ours, rows=1)
    assert 66 in native


def test_speechbrain_without_its_search(native):
    theirs, ours = models()
    fastasr.restore(ours[0])
    same(theirs, ours)
    assert not native


def test_greedy_search():
    """It reads the decoder's last tokens alone, too."""
    seeded("greedy")
    theirs, ours = copies(torch.nn.ModuleList([speechbrain_search(1)]))
    same(theirs, ours)


def test_calls_outside_a_search(native):
    theirs, ours = models()
    ids = torch.randint(1, TOKENS, (3, 5), generator=numbers(1))
    with torch.no_grad():
        found, expected = ours[1](ids), theirs[1](ids)
    assert found.shape == (3, 5, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not native


def test_a_users_scorer_gets_all_tokens(native):
    base = speechbrain("decoders.scorer").TransformerLMScorer
    shapes = []

    class TransformerLMScorer(base):
        def score(self, inp_tokens, memory, candidates, attn):
            found = super().score(inp_tokens, memory, candidates, attn)
            shapes.append(self.lm(found[1]).shape[1])
            return found

    theirs, ours = models(scorer=TransformerLMScorer)
    same(theirs, ours)
    assert shapes[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not native


class OfEarlierTokens(torch.nn.Module):
    """A last layer whose results depend on earlier tokens."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.w = linear, linear.w

    def forward(self, x):
        return self.linear(x.cumsum(1))


def other_last_layer(search):
    search.fc = OfEarlierTokens(search.fc)


def other_model(search):
    class Other(type(search.model)):
        def decode(self, *args, **kwargs):
            y, attention = super().decode(*args, **kwargs)
            return y.cumsum(1), attention

    search.model.__class__ = Other


def other_method(search):
    decode = search.model.decode

    def other(*args):
        y, attention = decode(*args)
        return y.cumsum(1), attention

    search.model.decode = other


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("change", [other_last_layer, other_model, other_method])
def test_what_reads_earlier_tokens_gets_them(change, beams):
    seeded(f"reads all {beams}")
    models = copies(torch.nn.ModuleList([speechbrain_search(beams)]))
    for model in models:
        change(model[0])
    same(*models)


@pytest.mark.parametrize("place", ["0.fc", "0.fc.w", "0.softmax", "0.model.decoder", "1"])
def test_hooks_see_all_tokens(place):
    """``1`` is the language model."""
    lengths = []
    for model in models():
        seen = []
        part = model.get_submodule(place)
        part.register_forward_hook(
            lambda _, args, y, seen=seen: seen.append((y[0] if isinstance(y, tuple) else y).shape[1])
        )
        speechbrain_found(model)
        lengths.append(seen)
    assert lengths[0] == lengths[1]
    assert max(lengths[1]) > 5


class OwnScorer:
    """What upstream's search asks of a scorer without CTC."""

    def __init__(self):
        self.weights = {"ctc": 0.0, "length": 0.0}

    def reset_scorer_mem(self, x, lengths):
        return None

    def score(self, tokens, memory, attention, scores, beams):
        return scores - 0.1 * torch.arange(TOKENS), memory

    def permute_scorer_mem(self, memory, index, candidates):
        return memory


def test_an_own_scorer():
    seeded("own scorer")
    models = copies(torch.nn.ModuleList([speechbrain_search()]))
    for model in models:
        model[0].scorer = OwnScorer()
    same(*models)


def in_search(ours, theirs, *steps):
    """Compares the logits of the last tokens of some calls in one search."""
    with torch.no_grad(), searches.running([ours]):
        for ids in steps:
            found, expected = ours(ids), theirs(ids)
            torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_other_tokens(native):
    """A padding token, or tokens that were not in the step before, are upstream's."""
    theirs, ours = models()
    theirs, ours = theirs[1], ours[1]
    ids = torch.randint(1, TOKENS, (3, 6), generator=numbers(1))
    in_search(ours, theirs, ids[:, :1], ids[:, :2], ids[[1, 1, 0], :3])
    assert set(native) == {2, 3}
    native.clear()
    padded = ids.clone()
    padded[1, 2] = 0
    in_search(ours, theirs, ids[:, :3], padded[:, :3], padded[:, :4])
    in_search(ours, theirs, ids[:, :1], ids[:, 1:3], ids[:2, :2])
    assert native == [3, 3, 2, 2]


def test_weights_change():
    theirs, ours = models()
    theirs, ours = theirs[1], ours[1]
    ids = torch.randint(1, TOKENS, (3, 6), generator=numbers(1))
    with torch.no_grad(), searches.running([ours]):
        for length in range(1, 5):
            if length == 3:
                for model in (theirs, ours):
                    model.encoder.layers[1].self_att.att.in_proj_weight.mul_(1.5)
            found, expected = ours(ids[:, :length]), theirs(ids[:, :length])
            torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-5, atol=1e-5)


def test_a_hook_sees_upstreams_calls(native):
    theirs, ours = models()
    for model in (theirs, ours):
        model[1].encoder.layers[0].norm2.register_forward_hook(lambda module, args, y: 2 * y)
    same(theirs, ours)
    assert not native
    assert "norm2 has hooks" in str(fastasr.why(ours))


def test_what_is_kept_is_gone_after_an_error():
    _, ours = models()
    with pytest.raises(RuntimeError), torch.no_grad():
        ours[0](torch.randn(1, FRAMES, WIDTH + 1), torch.ones(1))
    assert searches._thread.kept is None
    assert not searches.reads_last_token(ours[1])
