# SPDX-License-Identifier: Apache-2.0
"""A transducer whose logits are a table, every path through a tiny lattice, and streams side by side."""

import itertools
import math

import pytest
import torch

from fastasr.asr import decoding


class TableTransducer:
    """Logits are the frame's row plus a row for the last token: the interface of an ONNX transducer,
    without a network.
    """

    context_size = 1
    blank_id = 0

    def __init__(self, vocabulary=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.after = 2 * torch.randn(vocabulary, vocabulary, generator=generator)

    def run_decoder(self, y):
        return self.after[y[:, -1].clamp(min=0)]

    def run_joiner(self, frames, predictions):
        return frames + predictions


def transducer_probabilities(model, frames):
    """Returns tokens -> log-probability, over all choices of a token or blank per frame."""
    found = {}
    vocabulary = frames.shape[1]
    for path in itertools.product(range(vocabulary), repeat=frames.shape[0]):
        tokens, total = (), 0.0
        for row, choice in zip(frames, path, strict=True):
            last = tokens[-1] if tokens else 0
            total += float((row + model.after[last]).log_softmax(-1)[choice])
            if choice != 0:
                tokens = (*tokens, choice)
        found[tokens] = _log_add(found.get(tokens, -math.inf), total)
    return found


def ctc_probabilities(log_probs):
    """Returns tokens -> log-probability, over all paths."""
    found = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=log_probs.shape[0]):
        tokens = tuple(token for token, _ in itertools.groupby(path) if token != 0)
        total = sum(float(log_probs[t, token]) for t, token in enumerate(path))
        found[tokens] = _log_add(found.get(tokens, -math.inf), total)
    return found


def same_in_chunks(search, x, lengths, step, whole):
    """Asserts that streams give the result ``whole`` that are joined for each chunk, in another order each time, and
    split behind it."""
    states, order = [search.start() for _ in lengths], [*range(len(lengths))]
    for first in range(0, max(lengths), step):
        order = [*order[1:], order[0]]
        part = x[order, first : first + step]
        there = (torch.tensor(lengths)[order] - first).clamp(0, part.shape[1])
        joined = decoding.join_states([states[n] for n in order])
        for n, state in zip(order, decoding.split_state(search.advance(joined, part, there)), strict=True):
            states[n] = state
    found = search.result(decoding.join_states(states))
    assert found.tokens == whole.tokens
    assert found.timestamps == whole.timestamps
    assert found.scores == pytest.approx(whole.scores, rel=1e-5)


def _log_add(a, b):
    high, low = max(a, b), min(a, b)
    return high + math.log1p(math.exp(low - high))
