# SPDX-License-Identifier: Apache-2.0
"""Modules whose forward and backward pass are recorded once per shape and replayed by one call each."""

from fastasr.graphs.graphed import Graphs, graphed
from fastasr.graphs.recording import CudaRecorder, Recording

__all__ = ["CudaRecorder", "Graphs", "Recording", "graphed"]
