# SPDX-License-Identifier: Apache-2.0
"""Recordings in a row: both ops of Zipformer's attention give what they give for each recording alone."""

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from fastasr import backend
from fastasr.ops import zipformer_attention, zipformer_attention_weights

HEADS, DIM, POS_DIM, VALUE_DIM = 2, 3, 2, 4
WIDTH = HEADS * (2 * DIM + POS_DIM)
# name: arguments of the row, whose masks are cut for a recording
OPTIONS = {
    "plain": lambda rows: {},
    "padding": lambda rows: {"key_padding_mask": torch.rand(1, rows) < 0.4},
    "mask": lambda rows: {"attn_mask": torch.rand(rows, rows) < 0.4},
    "chunks": lambda rows: {"chunk_size": 4},
    "chunks, padding": lambda rows: {
        "chunk_size": 5,
        "left_context_chunks": 1,
        "key_padding_mask": torch.rand(1, rows) < 0.4,
    },
}


def _cut(options: dict, first: int, end: int) -> dict:
    cut = dict(options)
    if "key_padding_mask" in cut:
        cut["key_padding_mask"] = cut["key_padding_mask"][:, first:end].contiguous()
    if "attn_mask" in cut:
        cut["attn_mask"] = cut["attn_mask"][first:end, first:end].contiguous()
    return cut


def _middle(pos: Tensor | None, frames: int) -> Tensor | None:
    """Returns the rows of a shorter recording."""
    return None if pos is None else pos[:, len(pos[0]) // 2 - frames + 1 : len(pos[0]) // 2 + frames]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("table", ["row", "longest", "none"])
@pytest.mark.parametrize("lengths", [(7, 0, 12, 1), (20,), (1, 1, 1), (64, 3, 33)])
@pytest.mark.parametrize("device_backend", ["eager", "cpu"])
def test_recordings_in_a_row_are_as_alone(device_backend, lengths, table, options):
    """Frames before the first and behind the last recording are in none. The table of positions has all rows of the
    sequence, or those of the longest recording.
    """
    before = 3
    rows, longest = sum(lengths) + before + 5, max(lengths)
    double = {"dtype": torch.float64, "requires_grad": True}
    x = torch.randn(rows, 1, WIDTH, **double)
    value = torch.randn(rows, 1, HEADS * VALUE_DIM, **double)
    count = 2 * (rows if table == "row" else longest) - 1
    pos = None if table == "none" else torch.randn(1, count, HEADS * POS_DIM, **double)
    leaves = [t for t in (x, pos, value) if t is not None]
    given, bounds = OPTIONS[options](rows), [before, *accumulate(lengths, initial=before)][1:]
    sizes, starts = (HEADS, DIM), torch.tensor(bounds)[torch.randperm(len(bounds))]

    with backend(device_backend):
        y = zipformer_attention(x, pos, value, *sizes, starts=starts, **given)
        penalty = {"score_penalty": 0.3, "score_limit": 0.5}
        weights = zipformer_attention_weights(x, pos, *sizes, starts=starts, **penalty, **given)
        expected, expected_weights = torch.zeros_like(y), torch.zeros_like(weights)
        for first, end in pairwise(bounds):
            own, part = _cut(given, first, end), slice(first, end)
            if first == end:
                continue
            own_pos = _middle(pos, end - first)
            found = zipformer_attention(x[part], own_pos, value[part], *sizes, **own)
            expected = expected.index_copy(0, torch.arange(first, end), found)
            found = zipformer_attention_weights(x[part], own_pos, *sizes, **penalty, **own)
            expected_weights = torch.nn.functional.pad(found, (first, rows - end, first, rows - end)) + (
                expected_weights
            )
        for ours, alone in ((y, expected), (weights, expected_weights)):
            torch.testing.assert_close(ours, alone, rtol=1e-12, atol=1e-12)
            g = torch.randn_like(ours)
            found, wanted = (
                torch.autograd.grad(out, leaves, g, allow_unused=True, retain_graph=True)
                for out in (ours, alone)
            )
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_shorter_table_of_positions_limits_what_frames_see():
    x, pos = torch.randn(9, 1, WIDTH), torch.randn(1, 5, HEADS * POS_DIM)
    weights = zipformer_attention_weights(x, pos, HEADS, DIM, starts=torch.tensor([0, 9]))
    frame = torch.arange(9)
    assert ((weights > 0) == ((frame[:, None] - frame).abs() < 3)).all()


def test_tiles_of_other_recordings_are_not_read():
    """Values of NaN would spoil every sum that meets them, with a weight of 0 too."""
    x, pos = torch.randn(256, 1, WIDTH), torch.randn(1, 255, HEADS * POS_DIM)
    value = torch.randn(256, 1, HEADS * VALUE_DIM)
    starts = torch.tensor([64, 192, 256])  # 64 frames of no recording
    inputs = [t.requires_grad_() for t in (x, pos, value)]

    def run(sequence: Tensor) -> list[Tensor]:
        y = zipformer_attention(x, pos, sequence, HEADS, DIM, starts=starts)
        found = torch.autograd.grad(y[64:192].square().sum(), inputs[:2])
        return [y[64:192], found[0][64:192], found[1]]

    expected = run(value)
    with torch.no_grad():
        changed = value.clone()
        changed[:64], changed[192:] = torch.nan, torch.nan
    for found, wanted in zip(run(changed)[:2], expected[:2], strict=True):
        assert torch.equal(found, wanted)


def test_the_mean_of_equal_values_is_near_to_them():
    """Equal terms round alike: in one chain of 64 their errors add up to four units in the last place."""
    keys, heads, errors = 64, 16, []
    x, hidden = torch.randn(keys, 1, heads * 2), torch.ones(1, keys, dtype=torch.bool)
    for _ in range(8):
        value = torch.randn(heads).expand(keys, 1, heads)
        y = zipformer_attention(x, None, value, heads, 1, key_padding_mask=hidden)
        errors.append(((y - value) / value).abs())
    assert torch.stack(errors).mean() < 2.4 * torch.finfo(torch.float32).eps
