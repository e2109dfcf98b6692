# SPDX-License-Identifier: Apache-2.0
"""Records the calls of a module on tapes."""

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
