# SPDX-License-Identifier: Apache-2.0
"""Records the calls of a module on tapes."""

import math

import torch
from steps import close, cotangent, gradients_by_name, numbers, same_gradients

import fastasr
from fastasr import PackedFrames
from fastasr.graphs import module as graphs
from fastasr.swap import binding
from fastasr.testing.tape import TapeRecorder


def graphed(module, choice=None, tapes=None, **options):
    """Binds a forward to ``module`` that replays the one that it has. Returns its ``ModuleGraphs``."""
    forward = binding.bound_forward(module) or type(module).forward
    tapes = tapes or TapeRecorder()
    binding.bind(module, graphs.replaying(forward))
    found = graphs.keep(module, forward, graphs.Graphs(recorder=lambda: tapes, **options), choice)
    found.tapes = tapes.tapes
    return found


def reasons(graphs):
    """Returns why kinds of calls are not recorded."""
    return [kind.reason for kind in graphs.kinds.values() if kind.reason]


def without_padding(model):
    """Returns the model, which leaves padding out."""
    if hasattr(model, "ragged"):
        model.ragged = True
    fastasr.accelerate(model, ragged=True)
    return model


def on_rows(model, **options):
    """Returns the model, which leaves padding out on recorded rows, and its graphs."""
    if hasattr(model, "ragged"):
        model.ragged = True
    tapes = TapeRecorder()
    options = fastasr.Graphs(recorder=lambda: tapes, **options)
    report = fastasr.accelerate(model, ragged=True, graphs=options)
    assert report.graphs == {"": None}
    return model, graphs.of(model)


def lengths_on_a_row(count, row, first=(), recordings=None, least=0):
    """Yields lengths of batches that fit a row of (frames, recordings, longest): the first and random ones, of random
    or this number of recordings. They are 20 where the longest would have less frames than the least.
    """
    frames, most, longest = row
    yield from first
    generator = numbers(0)
    for _ in range(count - len(first)):
        left, lengths = frames, []
        for _ in range(recordings or int(torch.randint(1, most + 1, (), generator=generator))):
            lengths.append(int(torch.randint(0, min(left, longest) + 1, (), generator=generator)))
            left -= lengths[-1]
        yield lengths if max(lengths) >= least else [20] * len(lengths)


def packed_frames(x, lengths, frames=None):
    """Returns the PackedFrames of a batch (B, T, bins), with NaN in frames of nobody."""
    rows = torch.cat([one[:n] for one, n in zip(x, lengths.tolist(), strict=True)])
    more = 0 if frames is None else frames - len(rows)
    return PackedFrames(torch.cat([rows, rows.new_full((more, *rows.shape[1:]), math.nan)]), lengths)


def gradients(model, hidden, x):
    """Returns the gradients by name of the hidden states of recordings, a list of (T, D)."""
    loss = sum((y * cotangent(y.cpu(), f"{i}").to(y)).sum() for i, y in enumerate(hidden) if len(y))
    return gradients_by_name(model, loss, x)


def padded_step(call, model, x, lengths):
    """Returns the hidden states of the recordings of a padded batch, a list of (T, D), in training gradients by name,
    and whether anything but 0 is behind a recording's end. ``call(model, x, lengths)`` returns (B, T, D), lengths."""
    x = x.clone().requires_grad_(model.training)
    with torch.set_grad_enabled(model.training):
        y, after = call(model, x, lengths)
    hidden = [one[:n] for one, n in zip(y, after.tolist(), strict=True)]
    behind = any(one[n:].any() for one, n in zip(y, after.tolist(), strict=True))
    return hidden, gradients(model, hidden, x) if model.training else {}, behind


def packed_step(call, model, x, lengths, frames=None):
    """Does the same with PackedFrames: ``call(model, given)`` returns such. The last result is their number."""
    given = packed_frames(x, lengths, frames)
    given.frames.requires_grad_(model.training)
    with torch.set_grad_enabled(model.training):
        found = call(model, given)
    assert isinstance(found, PackedFrames)
    used = int(found.lengths.sum())
    assert not found.frames[used:].any()
    hidden, leaves = list(found.frames[:used].split(found.lengths.tolist())), {}
    if model.training:
        leaves = gradients(model, hidden, given.frames)
        leaves["x"] = PackedFrames(leaves["x"], lengths).unpacked(x.shape[1])
    return hidden, leaves, len(found.frames)


def same_steps(found, expected):
    close(found[0], expected[0], 1e-10)
    assert found[1].keys() == expected[1].keys()
    if expected[1]:
        same_gradients(found[1], expected[1])
