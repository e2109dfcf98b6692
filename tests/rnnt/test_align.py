# SPDX-License-Identifier: Apache-2.0
"""Forced alignments against the best of all paths through small lattices."""

import itertools
import math

import pytest
import torch
from problems import TYPES
from steps import seeded

from fastasr import rnnt
from fastasr.rnnt import align, logprobs

DURATIONS = [(0, 1, 2, 3, 4), (1,), (0, 1), (3, 1), (2, 0, 5), (2, 4)]
SIZES = [(0, 1), (1, 1), (0, 4), (2, 1), (3, 4), (2, 5), (4, 3), (2, 0), (0, 0)]  # tokens, frames


def expected(paths, length):
    """Returns (starts, durations, confidences, score) of the best path. A path is its score, the ranks of its arcs and
    (frame, duration, probability) of its tokens."""
    best = min(paths, key=lambda path: (-path[0], path[1][::-1]), default=(-math.inf, [], []))
    if best[0] == -math.inf:
        return [-1] * length, [0] * length, [0.0] * length, -math.inf
    rest = length - len(best[2])
    starts, durations, confidences = zip(*best[2], strict=True) if best[2] else ((), (), ())
    return [*starts] + [-1] * rest, [*durations] + [0] * rest, [*confidences] + [0.0] * rest, best[0]


def check(found, paths, length):
    """Compares an alignment with the best of each sequence's paths."""
    truth = [expected(p, length) for p in paths]
    for name, row in zip(("starts", "durations"), range(2), strict=True):
        assert getattr(found, name).tolist() == [t[row] for t in truth], name
    for t, confidences, score in zip(truth, found.confidences, found.scores, strict=True):
        torch.testing.assert_close(
            confidences, torch.tensor(t[2], dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
        assert score.item() == pytest.approx(t[3], rel=1e-12, abs=1e-12)


def rnnt_paths(px, py, rnnt_type, end):
    """Returns all paths through one lattice px (S, T), py (S + 1, T) that ends at (s, t)."""
    found, takes_frame = [], rnnt_type != "regular"

    def walk(s, t, score, ranks, tokens):
        if (s, t) == end:
            found.append((score, ranks, tokens))
        if t < end[1]:
            walk(s, t + 1, score + py[s, t].item(), [*ranks, 0], tokens)
        if s < end[0] and t < end[1]:
            more = px[s, t].item() + (py[s + 1, t].item() if rnnt_type == "constrained" else 0.0)
            walk(s + 1, t + takes_frame, score + more, [*ranks, 1], [*tokens, (t, 1, px[s, t].exp().item())])

    walk(0, 0, 0.0, [], [])
    return found


def tdt_paths(px, py, pd, durations, end):
    """Returns all paths through one lattice px (T, S), py (T, S + 1), pd (T, S + 1, N)."""
    found = []

    def walk(s, t, score, ranks, tokens):
        if (s, t) == end:
            found.append((score, ranks, tokens))
        for i, d in enumerate(durations):
            if d and t + d <= end[1]:
                walk(s, t + d, score + py[t, s].item() + pd[t, s, i].item(), [*ranks, 2 * i], tokens)
            if s < end[0] and t + d < end[1]:
                token = t, d, px[t, s].exp().item()
                more = px[t, s].item() + pd[t, s, i].item()
                walk(s + 1, t + d, score + more, [*ranks, 2 * i + 1], [*tokens, token])

    walk(0, 0, 0.0, [], [])
    return found


def ctc_paths(log_probs, targets, blank):
    """Returns all paths of log_probs (T, C) that spell the targets."""
    frames, length = len(log_probs), len(targets)
    labels = [blank, *(label for token in targets for label in (token, blank))]
    found = []
    for states in itertools.product(range(len(labels)), repeat=frames):
        moves = [b - a for a, b in itertools.pairwise((0, *states))]
        if any(move not in (0, 1, 2) for move in moves) or (states or (0,))[-1] < 2 * length - 1:
            continue
        skips = [state for state, move in zip(states, moves, strict=True) if move == 2]
        if any(s % 2 == 0 or labels[s] == labels[s - 2] for s in skips) or moves[:1] == [2]:
            continue
        terms = [log_probs[t, labels[state]].item() for t, state in enumerate(states)]
        score = 0.0
        for term in terms:
            score += term
        tokens = []
        for n in range(length):
            frames_of = [t for t, state in enumerate(states) if state == 2 * n + 1]
            mean = sum(math.exp(terms[t]) for t in frames_of) / len(frames_of)
            tokens.append((frames_of[0], len(frames_of), mean))
        found.append((score, [*moves, int((states or (0,))[-1] == 2 * length)], tokens))
    return found


def lengths_of(length, frames):
    """Returns frames and tokens of four sequences, the first as long as the lattice."""
    counts = [(frames, length)] + [
        (int(torch.randint(0, frames + 1, ())), int(torch.randint(0, length + 1, ()))) for _ in range(3)
    ]
    return (torch.tensor(column) for column in zip(*counts, strict=True))


def boundary_of(frames, symbols):
    zero = torch.zeros_like(frames)
    return torch.stack((zero, zero, symbols, frames), 1)


@pytest.fixture(autouse=True, params=range(3))
def _drawn(request, _seeded):
    seeded(request.node.nodeid)


@pytest.mark.parametrize(("length", "frames"), SIZES)
@pytest.mark.parametrize("rnnt_type", TYPES)
def test_rnnt(rnnt_type, length, frames):
    logits = torch.randn(4, frames, length + 1, 5, dtype=torch.float64)
    symbols, (ends_t, ends_s) = torch.randint(1, 5, (4, length)), lengths_of(length, frames)
    boundary = boundary_of(ends_t, ends_s)
    found = rnnt.rnnt_align(logits, symbols, 0, boundary, rnnt_type)
    px, py = logprobs.joint("test", logits, symbols, 0, boundary, "modified")
    ends = zip(ends_s.tolist(), ends_t.tolist(), strict=True)
    check(found, [rnnt_paths(px[b], py[b], rnnt_type, end) for b, end in enumerate(ends)], length)


@pytest.mark.parametrize(("length", "frames"), SIZES)
@pytest.mark.parametrize("durations", DURATIONS, ids=str)
def test_tdt(durations, length, frames):
    tokens = torch.randn(4, frames, length + 1, 5, dtype=torch.float64)
    steps = torch.randn(4, frames, length + 1, len(durations), dtype=torch.float64)
    targets, (ends_t, ends_s) = torch.randint(1, 5, (4, length)), lengths_of(length, frames)
    found = rnnt.tdt_align(tokens, steps, targets, ends_t, ends_s, 0, durations)
    logs = tokens.log_softmax(-1)
    px = logs[:, :, :-1].gather(-1, targets[:, None, :, None].expand(-1, frames, -1, 1))[..., 0]
    pd, ends = steps.log_softmax(-1), zip(ends_s.tolist(), ends_t.tolist(), strict=True)
    paths = [tdt_paths(px[b], logs[b, ..., 0], pd[b], durations, end) for b, end in enumerate(ends)]
    check(found, paths, length)


@pytest.mark.parametrize(("length", "frames"), [*SIZES, (3, 6)])
@pytest.mark.parametrize("tied", [False, True])
def test_ctc(tied, length, frames):
    log_probs = torch.randn(4, frames, 4, dtype=torch.float64).log_softmax(-1)
    if tied:
        log_probs = torch.randint(-2, 0, log_probs.shape).double()
    targets, (ends_t, ends_s) = torch.randint(0, 3, (4, length)), lengths_of(length, frames)
    found = rnnt.ctc_align(log_probs, targets, ends_t, ends_s, blank=3)
    ends = zip(ends_s.tolist(), ends_t.tolist(), strict=True)
    paths = [ctc_paths(log_probs[b, :t], targets[b, :s].tolist(), 3) for b, (s, t) in enumerate(ends)]
    check(found, paths, length)


@pytest.mark.parametrize("rnnt_type", TYPES)
def test_of_equal_rnnt_paths_the_documented_one_is_taken(rnnt_type):
    px, py = torch.randint(-2, 0, (4, 3, 5)).double(), torch.randint(-2, 0, (4, 4, 5)).double()
    found = align._through_rnnt("test", px, py, None, rnnt_type)
    check(found, [rnnt_paths(px[b], py[b], rnnt_type, (3, 5)) for b in range(4)], 3)


@pytest.mark.parametrize("durations", DURATIONS[:5], ids=str)
def test_of_equal_tdt_paths_the_documented_one_is_taken(durations):
    px, py = torch.randint(-2, 0, (4, 5, 3)).double(), torch.randint(-2, 0, (4, 5, 4)).double()
    pd, boundary = torch.randint(-2, 0, (4, 5, 4, len(durations))).double(), torch.tensor([[0, 0, 3, 5]] * 4)
    found = align._through_tdt(px, py, pd, torch.tensor(durations), boundary, 0.0)
    check(found, [tdt_paths(px[b], py[b], pd[b], durations, (3, 5)) for b in range(4)], 3)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_joiners_give_the_alignment_of_their_logits(activation):
    am, lm, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((3, 9, 8), (3, 5, 8), (9, 8), (9,)))
    logits = torch.nn.functional.linear(
        getattr(torch, activation)(am[:, :, None] + lm[:, None]), weight, bias
    )
    symbols, frames, ends = torch.randint(1, 6, (3, 4)), torch.tensor([9, 6, 4]), torch.tensor([4, 2, 0])
    boundary, durations = boundary_of(frames, ends), [0, 1, 2]
    with torch.inference_mode():
        tdt = (
            rnnt.tdt_joiner_align(
                am, lm, weight, bias, symbols, frames, ends, 0, durations, 0.05, activation
            ),
            rnnt.tdt_align(logits[..., :6], logits[..., 6:], symbols, frames, ends, 0, durations, 0.05),
        )
    joiner = (
        rnnt.joiner_align(am, lm, weight, bias, symbols, 0, boundary, activation=activation),
        rnnt.rnnt_align(logits, symbols, 0, boundary),
    )
    for ours, truth in (tdt, joiner):
        for name in ("starts", "durations", "confidences", "scores"):
            torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=1e-11, atol=1e-12)


def test_a_path_is_never_likelier_than_all_together():
    logits = torch.randn(3, 30, 8, 6, dtype=torch.float64)
    symbols = torch.randint(1, 6, (3, 7))
    found = rnnt.rnnt_align(logits, symbols, 0)
    assert (found.scores < -rnnt.rnnt_loss(logits, symbols, 0, reduction="none")).all()


def test_ctc_of_torchaudio():
    forced_align = pytest.importorskip("torchaudio.functional", exc_type=ImportError).forced_align
    try:
        forced_align(torch.zeros(1, 2, 2), torch.ones(1, 1, dtype=torch.int64))
    except (AttributeError, RuntimeError) as missing:
        pytest.skip(f"torchaudio's library does not run with this torch: {missing}")
    log_probs, targets = torch.randn(1, 60, 7).log_softmax(-1), torch.randint(1, 7, (1, 15))
    labels, scores = forced_align(log_probs, targets)
    found = rnnt.ctc_align(log_probs, targets, torch.tensor([60]), torch.tensor([15]))
    ours = torch.zeros(60, dtype=torch.int64)
    for token, start, duration in zip(targets[0], found.starts[0], found.durations[0], strict=True):
        ours[start : start + duration] = token
    assert ours.tolist() == labels[0].tolist()
    torch.testing.assert_close(found.scores.float(), scores.double().sum(1).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({1: torch.zeros(1, 2, dtype=torch.int64)}, "targets: expected tokens other than blank"),
        ({1: torch.full((1, 2), 5)}, r"symbols: expected classes in \[0, 5\)"),
        ({2: torch.tensor([5])}, r"logit_lengths: expected lengths in \[0, 4\]"),
        ({3: torch.tensor([3])}, r"target_lengths: expected lengths in \[0, 2\]"),
        ({4: 5}, r"blank: expected a class in \[0, 5\)"),
    ],
)
def test_wrong_arguments(changed, message):
    call = torch.randn(1, 4, 5), torch.ones(1, 2, dtype=torch.int64), torch.tensor([4]), torch.tensor([2]), 0
    with pytest.raises(ValueError, match=rf"fastasr.rnnt.ctc_align: {message}"):
        rnnt.ctc_align(*(changed.get(i, value) for i, value in enumerate(call)))


@pytest.mark.parametrize("kind", ["RNN-T", "TDT", "CTC"])
def test_a_long_recording_with_a_path_that_stands_out(kind):
    """The alignment finds tokens that were put on known frames, and makes no graph for gradients."""
    seeded(kind)
    frames, tokens = 700, 90
    starts = torch.randperm(frames - 2)[:tokens].sort().values
    starts[1:] = torch.maximum(starts[1:], starts[:-1] + 1)
    targets = torch.arange(tokens) % 4 + 1
    if kind == "CTC":
        log_probs = torch.zeros(1, frames, 5)
        log_probs[0, :, 0] = 4.0
        log_probs[0, starts, targets] = 9.0
        ends = torch.tensor([frames]), torch.tensor([tokens])
        found = rnnt.ctc_align(log_probs.log_softmax(-1).requires_grad_(), targets[None], *ends)
        assert found.durations.max() == 1
    else:
        position = torch.searchsorted(starts, torch.arange(frames + 1))  # tokens before each frame
        logits = torch.zeros(1, frames, tokens + 1, 5)
        logits[0, torch.arange(frames), position[1:], 0] = 9.0
        logits[0, starts, torch.arange(tokens), targets] = 9.0
        logits.requires_grad_()
        if kind == "RNN-T":
            found = rnnt.rnnt_align(logits, targets[None], 0)
        else:
            ends = torch.tensor([frames]), torch.tensor([tokens])
            steps = torch.zeros(1, frames, tokens + 1, 2)
            steps[0, :, :, 1] = 2.0
            steps[0, starts, torch.arange(tokens), 0] = 7.0  # a token stays on its frame
            found = rnnt.tdt_align(logits, steps, targets[None], *ends, 0, [0, 1])
            assert not found.durations.any()
    assert found.starts[0].tolist() == starts.tolist()
    assert not found.scores.requires_grad
