# SPDX-License-Identifier: Apache-2.0
"""Backward passes on recordings in a row, with as many pieces of the scores' gradients, and shares of a piece, as those
of long rows."""

import os
import random
from itertools import pairwise

import pytest
import torch

from fastasr import backend, ops
from fastasr._tables import share
from fastasr.kernels import _recordings, rel_attention, zipformer_attention

FRAMES, LONGEST = 200, 60
STARTS = torch.tensor([0, 60, 61, 80, 80, 90, 150])  # and 50 frames of no recording
BLOCK = 32
SIZES = [(1, 1), (20, 1 << 15), (1024, 1 << 30)]  # programs of a kernel, and bytes of a piece


CHUNKS = {"chunk_size": 8, "left_context_chunks": 1}
PENALTY = {"score_penalty": 0.5, "score_limit": 2.01, "act": torch.ones(1)}
EQUAL = {"equal": torch.ones(1)}


@pytest.fixture
def memory_of_nan():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def results(function, leaves, g):
    """Returns the value and the gradients."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, g)


def exact(function, leaves, g):
    return results(function, [t.double() for t in leaves], g.double())


def agree(found, expected, most=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= most * b.norm()


@pytest.mark.parametrize(("programs", "room"), SIZES)
@pytest.mark.parametrize(
    ("generation", "dtype", "most"), [(80, torch.float32, 1e-5), (90, torch.bfloat16, 0.01)]
)
def test_rel_attention(monkeypatch, programs, room, generation, dtype, most):
    monkeypatch.setattr(rel_attention, "generation", lambda t: generation)  # whose tiles it takes
    monkeypatch.setattr(rel_attention, "PROGRAMS", programs)
    monkeypatch.setattr(rel_attention, "PIECE_BYTES", room)
    reach, heads = LONGEST - 1, 2
    q, k, v, g = (torch.randn(1, FRAMES, heads, 16).to(dtype) for _ in range(4))
    pos, u, w = torch.randn(2 * LONGEST - 1, heads, 16).to(dtype), *torch.randn(2, heads, 16).to(dtype)
    leaves, masks = (q, k, v, pos, u, w), (None, None, STARTS, None)
    options = 0.0, reach, reach, 1, 0.0, reach, reach
    kept = rel_attention.rel_attention_forward(*leaves, *(None,) * 3, *masks, *options, True)
    found = rel_attention.rel_attention_backward(g, *leaves, *(None,) * 3, *masks, *kept, *options)[:6]
    given = {"starts": STARTS, "context": (reach, reach), "pos_span": (reach, reach)}
    agree((kept[0], *found), exact(lambda *t: ops.rel_attention.definition(*t, **given), leaves, g), most)


OPTIONS = [{}, {"value_heads": 1}, CHUNKS, PENALTY, CHUNKS | PENALTY, EQUAL, CHUNKS | PENALTY | EQUAL]
# options, programs, bytes of a piece, shared positions: the first and last options at every size, each other one at one
# size, and both kinds of positions by turns
CASES = [
    (options, *size, (i + j) % 2)
    for i, options in enumerate(OPTIONS)
    for j, size in enumerate(SIZES)
    if i in (0, len(OPTIONS) - 1) or i % len(SIZES) == j
]


@pytest.mark.parametrize(("options", "programs", "room", "shared"), CASES)
def test_zipformer_attention(memory_of_nan, monkeypatch, programs, room, shared, options):
    """Sequences have positions of their own, or share them. Scores are multiples of 1/64: rounding puts none on another
    side of the limit."""
    monkeypatch.setattr(zipformer_attention, "PROGRAMS", programs)
    monkeypatch.setattr(zipformer_attention, "PIECE_BYTES", room)
    batch, heads, dim, pos_dim = 2, 2, 16, 4
    x = (4 * torch.randn(FRAMES, batch, heads * (2 * dim + pos_dim))).round() / 8
    pos = (8 * torch.randn(1 if shared else batch, 2 * LONGEST - 1, heads * pos_dim)).round() / 8
    value, g = torch.randn(2, FRAMES, batch, heads * 16)
    leaves, sizes, given = (x, pos, value), (heads, dim), options | {"starts": STARTS}
    with backend("triton"):
        found = results(lambda *t: ops.zipformer_attention(*t, *sizes, **given), leaves, g)
    agree(found, exact(lambda *t: ops.zipformer_attention.definition(*t, *sizes, **given), leaves, g))


def test_pieces_follow_the_recordings():
    """A block's rows hold the keys of its recordings, and pieces that only longer recordings would need are empty."""
    bounds = _recordings.bounds(STARTS, FRAMES)
    reach, more, room = LONGEST - 1, 16, 1 << 14
    table, count, size = _recordings.pieces(STARTS, bounds, reach, reach, BLOCK, BLOCK, more, room)
    begins, rows, places, firsts = table.split([-(-FRAMES // BLOCK)] * 3 + [count + 1])
    first, end = bounds.long()
    expected = []
    for begin in range(0, FRAMES, BLOCK):
        last = min(begin + BLOCK, FRAMES) - 1
        keys = max(int(first[begin]), begin - reach), min(int(end[last]), last + 1 + reach)
        whole = keys[0] // BLOCK * BLOCK
        expected.append((whole, more + (-(-(keys[1] - whole) // BLOCK) * BLOCK if keys[0] < keys[1] else 0)))
    assert list(zip(begins.tolist(), rows.tolist(), strict=True)) == expected
    assert places.tolist() == [BLOCK * int(rows[:n].sum()) for n in range(len(rows))]
    assert rows[-1] == more  # nothing, behind the last recording
    assert firsts[0] == 0
    assert firsts[-1] == len(rows)
    used = [(n, m) for n, m in pairwise(firsts.tolist()) if n < m]
    assert 1 < len(used) < count
    assert all(int(places[m - 1] + BLOCK * rows[m - 1] - places[n]) <= size for n, m in used)


def test_tables_are_made_once_for_marked_starts_alone():
    marked, plain = STARTS.clone(), STARTS.clone()
    share(marked)
    first = _recordings.bounds(marked, FRAMES)
    assert _recordings.bounds(marked, FRAMES) is first
    assert _recordings.groups(marked, FRAMES, 8, 4) is not _recordings.groups(marked, FRAMES, 8, 2)
    assert _recordings.groups(marked, FRAMES, 8, 4) is _recordings.groups(marked, FRAMES, 8, 4)
    assert torch.equal(_recordings.bounds(plain, FRAMES), first)
    plain[1] += 1
    assert not torch.equal(_recordings.bounds(plain, FRAMES), first)


def groups_of(lengths, chunk, group):
    """Yields the first frame of each group and [begin, end) of its recording."""
    begin = 0
    for length in lengths:
        for of_chunk in range(begin, begin + length, chunk):
            for first in range(of_chunk, min(of_chunk + chunk, begin + length), group):
                yield first, begin, begin + length
        begin += length


def test_groups_are_those_of_each_recording():
    numbers = random.Random(int(os.environ.get("SEED", "0")))
    cases = [([9, 30, 9], 27, 2), ([33, 11, 25, 11, 39], 28, 2), ([1, 0, 1, 1], 3, 4)]
    for _ in range(60):
        lengths = [numbers.randint(0, 40) for _ in range(numbers.randint(2, 7))]
        frames = max(1, sum(lengths))
        cases.append(
            (lengths, min(frames, numbers.choice([1, 2, 7, 8, 27, frames])), 2 ** numbers.randint(0, 4))
        )
    for lengths, chunk, group in cases:
        frames = sum(lengths)
        if not frames:
            continue
        starts = torch.tensor(lengths[:-1]).cumsum(0)
        table = _recordings.groups(starts, frames, chunk, group)
        expected = list(groups_of(lengths, chunk, group))
        found = [tuple(column) for column in table.T.tolist() if column[0] < frames]
        assert found == expected, (lengths, chunk, group)


def order_of(bounds):
    return bounds.as_strided(
        (-(-bounds.shape[1] // 64),), (1,), 2 * bounds.shape[1] + bounds.storage_offset()
    )


def test_tiles_of_long_recordings_come_first():
    starts = torch.tensor([0, 10, 70, 400, 464, 600])  # and 37 frames of no recording
    bounds = _recordings.bounds(starts, 637)
    keys = [bounds[1][min(t + 63, 636)] - bounds[0][t] for t in range(0, 637, 64)]
    order = order_of(bounds).tolist()
    assert order == [*sorted(range(9), key=lambda tile: -keys[tile]), 9]
    assert order[0] == 6  # frames of 330 and of 64 meet


def test_the_order_changes_no_bit(monkeypatch):
    monkeypatch.setattr(zipformer_attention, "PIECE_BYTES", 1 << 15)
    x, pos = torch.randn(FRAMES, 1, 72), torch.randn(1, 2 * LONGEST - 1, 8)
    value, g = torch.randn(2, FRAMES, 1, 32)
    starts, found = STARTS.clone(), []
    share(starts)
    given = CHUNKS | {"starts": starts}
    for _ in range(2):
        with backend("triton"):
            found.append(results(lambda *t: ops.zipformer_attention(*t, 2, 16, **given), (x, pos, value), g))
        order = order_of(_recordings.bounds(starts, FRAMES))
        assert order.tolist() == [1, 0, 2, 3] or found[1:]
        order.copy_(torch.arange(4))
    assert all(map(torch.equal, *found))
