# SPDX-License-Identifier: Apache-2.0
"""Records the calls of a module on tapes."""

import torch
from steps import numbers

import fastasr
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
