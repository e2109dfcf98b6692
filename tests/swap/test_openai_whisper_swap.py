# SPDX-License-Identifier: Apache-2.0
"""Whole models of the package openai-whisper: the decoder's cache stays upstream's, and it finds the same
tokens; layers cast their weights, and parts that a user changed are called."""

import copy
import sys

import families
import pytest
import torch
from steps import moved, numbers, seeded

import fastasr
from fastasr.swap.forwards import openai_whisper
from fastasr.swap.forwards.beams import queries


def whisper():
    """Returns upstream's model, its swapped copy and the report."""
    module = families.load_openai_whisper()
    seeded("openai whisper")
    sizes = module.ModelDimensions(5, 12, 16, 2, 2, 23, 20, 16, 2, 2)
    theirs = module.Whisper(sizes)
    torch.nn.init.normal_(theirs.decoder.positional_embedding)
    theirs = moved(theirs, 0.1).eval()
    ours = copy.deepcopy(theirs)
    return theirs, ours, fastasr.accelerate(ours)


def features():
    return torch.randn(2, 5, 24, generator=numbers(1))


def searched(model, recordings=2):
    """Returns the tokens of a search with upstream's cache, and the logits of its last step: greedy for two recordings,
    and for one with two beams that change places."""
    inference = sys.modules["whisper.decoding"].PyTorchInference(model, initial_token_length=2)
    tokens, states = torch.tensor([[1, 5], [1, 7]]), model.encoder(features()[:recordings])
    for _ in range(10):
        logits = inference.logits(tokens, states)[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        if recordings == 1:
            tokens = tokens.flip(0)
            inference.rearrange_kv_cache([1, 0])
    inference.cleanup_caching()
    return tokens, logits


def test_a_search():
    theirs, ours, report = whisper()
    for path in ("encoder.blocks.1", "decoder.blocks.1", "decoder"):
        assert report[path].status == "replaced"
    assert sum(row.class_name == "Linear" for row in report.replaced) == 2 * 6 + 2 * 10
    with torch.no_grad():
        for _ in range(2):
            (found, logits), (expected, exact) = (searched(model) for model in (ours, theirs))
            assert torch.equal(found, expected)
            torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)
    assert len(found.unique()) > 3
    assert not fastasr.why(ours).to_dict()


def test_beams(monkeypatch):
    theirs, ours, _ = whisper()
    seen = []
    monkeypatch.setattr(openai_whisper, "queries", lambda *given: seen.append(queries(*given)) or seen[-1])
    with torch.no_grad():
        (found, logits), (expected, exact) = (searched(model, recordings=1) for model in (ours, theirs))
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)
    assert len(seen) == 20
    assert {len(x) for x in seen} == {1}
    assert seen[-1].shape[:2] == (1, 2)


@pytest.mark.parametrize("part", ["cross_attn", "cross_attn.query", "cross_attn.out"])
def test_hooks_see_rows_of_beams(part):
    """Hooks on the attention to the frames, as of packages that align words, see a row of each beam."""
    found = []
    for model in whisper()[:2]:
        seen = []
        for block in model.decoder.blocks:
            block.get_submodule(part).register_forward_hook(
                lambda _, given, y, to=seen: to.append((given[0], y))
            )
        with torch.no_grad():
            tokens, logits = searched(model, 1)
        found.append((tokens, logits, seen))
    assert len(found[0][2]) == 20
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_scores_for_times_of_words():
    """``word_timestamps`` reads the scores of the decoder, which upstream forms then."""
    theirs, ours, _ = whisper()
    module, found = sys.modules["whisper.model"], {}
    for model in (ours, theirs):
        block = model.decoder.blocks[1].cross_attn
        block.register_forward_hook(lambda *args, model=model: found.__setitem__(model, args[-1][1]))
    with torch.no_grad(), module.disable_sdpa():
        logits = [model(features(), torch.tensor([[1, 5, 3]] * 2)) for model in (ours, theirs)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert found[ours] is not None
    torch.testing.assert_close(found[ours], found[theirs], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_layers_cast_their_weights(dtype):
    theirs, ours, _ = whisper()
    with torch.no_grad():
        found, expected = (model.encoder(features().to(dtype)) for model in (ours, theirs))
    assert found.dtype == expected.dtype == dtype
    rounding = max(torch.finfo(dtype).eps, 1e-7)
    torch.testing.assert_close(found, expected, rtol=20 * rounding, atol=20 * rounding)


@pytest.mark.parametrize("path", ["attn", "attn.query", "mlp", "mlp.0", "mlp.1", "mlp.2"])
def test_changed_parts_are_called(path):
    theirs, ours, _ = whisper()
    for model in (ours, theirs):
        part = model.encoder.blocks[1].get_submodule(path)
        part.register_forward_hook(lambda module, args, y: (-y[0], y[1]) if isinstance(y, tuple) else -y)
    with torch.no_grad():
        found, expected, plain = (model.encoder(features()) for model in (ours, theirs, whisper()[0]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
