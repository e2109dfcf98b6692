# SPDX-License-Identifier: Apache-2.0
"""Modules whose calls are recorded once per kind and replayed by one call each (``accelerate(graphs=True)``)."""

from fastasr.graphs.module import Graphs, Kind, graph_state

__all__ = ["Graphs", "Kind", "graph_state"]
