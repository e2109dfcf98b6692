# SPDX-License-Identifier: Apache-2.0
"""The Emformer computes what torchaudio's does: whole utterances, every step and state of a stream, gradients."""

import copy
from functools import partial

import pytest
import torch
from steps import numbers, same_state, same_step, seeded

from fastasr.models.emformer import Emformer

emformer = pytest.importorskip("torchaudio.models.emformer")

CASES = {
    "memory": {"segment_length": 4, "left_context_length": 6, "right_context_length": 2, "max_memory_size": 3},
    "tanh on memory": {
        "segment_length": 4, "left_context_length": 3, "right_context_length": 1, "max_memory_size": 1,
        "tanh_on_mem": True, "activation": "gelu",
    },
    "no memory": {"segment_length": 3, "left_context_length": 10, "right_context_length": 1, "activation": "silu"},
    "no context": {"segment_length": 4, "weight_init_scale_strategy": "constant"},
    "memory alone": {"segment_length": 5, "max_memory_size": 2, "weight_init_scale_strategy": None},
    "left alone": {"segment_length": 4, "left_context_length": 5},
}  # fmt: skip
WIDTH = 12


def _pair(dropout: float = 0.0, **options):
    seeded(3)
    theirs = emformer.Emformer(WIDTH, 3, 20, 3, dropout=dropout, **options)
    seeded(3)
    ours = Emformer(WIDTH, 3, 20, 3, dropout=dropout, **options)
    return ours, theirs


def _input(batch: int, frames: int, right: int):
    return torch.randn(batch, frames + right, WIDTH, generator=numbers(batch + frames))


_close = partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5)


class _Valid(torch.nn.Module):
    """Returns the frames that exist."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, lengths):
        y, out_lengths = self.model(x, lengths)
        assert torch.equal(out_lengths, lengths)
        return y * (torch.arange(y.shape[1]) < lengths[:, None])[..., None]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_state_dicts_and_seeds_agree(options):
    ours, theirs = _pair(**options)
    same_state(ours, theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "lengths", [(21, 14, 5), (20, 17, 20), (15,), (16,)], ids=("ragged", "all short", "one", "whole segments")
)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_training_step(options, lengths, dropout):
    x = _input(len(lengths), 21, options.get("right_context_length", 0))
    nets = map(_Valid, _pair(dropout, **options))
    same_step(*nets, x, torch.tensor(lengths), tolerance=1e-4, seed=11, share=0.1)


@pytest.mark.parametrize("training", [False, True], ids=("eval", "dropout"))
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_step_and_state_of_a_stream(options, batch, training):
    ours, theirs = _pair(dropout=0.2 if training else 0.0, **options)
    right, segment = options.get("right_context_length", 0), options["segment_length"]
    whole = _input(batch, 7 * segment, right)
    full = torch.full((batch,), segment + right)
    states = [None, None]
    for step in range(7):
        lengths = full if step < 6 else full - 1 - torch.arange(batch) % 2  # the last chunk is short
        chunk, found = whole[:, step * segment : (step + 1) * segment + right], []
        for i, model in enumerate((ours.train(training), theirs.train(training))):
            seeded(step)
            with torch.no_grad():
                y, out_lengths, states[i] = model.infer(chunk, lengths, states[i])
            valid = (torch.arange(segment) < out_lengths[:, None])[..., None]
            found.append((y * valid, out_lengths, *(t for layer in states[i] for t in layer)))
        for a, b in zip(*found, strict=True):
            _close(a, b)


def test_states_are_updated_in_the_callers_lists():
    ours, _ = _pair(**CASES["memory"])
    x = _input(2, 4, 2)
    _, _, states = ours.infer(x, torch.tensor([6, 6]))
    _, _, again = ours.infer(x, torch.tensor([6, 6]), states)
    assert all(a is b for a, b in zip(states, again, strict=True))
    assert again[0][3].tolist() == [[8, 8]]


def test_lengths_of_a_step_may_be_floats():
    ours, theirs = _pair(**CASES["memory"])
    x, lengths = _input(3, 4, 2), torch.ones(3) * 6
    y, out, _ = ours.infer(x, lengths)
    expected, expected_out, _ = theirs.infer(x, lengths)
    _close(y, expected)
    _close(out, expected_out)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_whole_equals_streaming(options):
    ours, _ = _pair(**options)
    right, segment = options.get("right_context_length", 0), options["segment_length"]
    x = _input(2, 6 * segment, right)
    with torch.no_grad():
        whole, _ = ours.eval()(x, torch.tensor([6 * segment] * 2))
        states, parts = None, []
        for step in range(6):
            chunk = x[:, step * segment : (step + 1) * segment + right]
            y, _, states = ours.infer(chunk, torch.tensor([segment + right] * 2), states)
            parts.append(y)
    _close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_bfloat16_streams(options):
    ours, _ = _pair(**options)
    wide = copy.deepcopy(ours).eval()
    narrow = ours.to(torch.bfloat16).eval()
    right, segment = options.get("right_context_length", 0), options["segment_length"]
    x, states = _input(2, 3 * segment, right), [None, None]
    lengths = torch.tensor([segment + right] * 2)
    with torch.no_grad():
        for step in range(3):
            chunk = x[:, step * segment : (step + 1) * segment + right]
            y, _, states[0] = narrow.infer(chunk.bfloat16(), lengths, states[0])
            expected, _, states[1] = wide.infer(chunk, lengths, states[1])
            assert y.dtype is torch.bfloat16
            assert (y - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()


def test_options_are_checked():
    with pytest.raises(ValueError, match="activation"):
        Emformer(8, 2, 8, 1, 4, activation="tanh")
    with pytest.raises(ValueError, match="num_heads"):
        Emformer(8, 3, 8, 1, 4)
    with pytest.raises(ValueError, match="weight_init_scale_strategy"):
        Emformer(8, 2, 8, 1, 4, weight_init_scale_strategy="deep")
    with pytest.raises(ValueError, match="negative_inf"):
        Emformer(8, 2, 8, 1, 4, negative_inf=-5.0)
    with pytest.raises(ValueError, match="expected 5 frames"):
        Emformer(8, 2, 8, 1, 4, right_context_length=1).infer(torch.zeros(1, 4, 8), torch.tensor([4]))
