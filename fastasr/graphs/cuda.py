# SPDX-License-Identifier: Apache-2.0
"""Passes as CUDA graphs.

What is recorded in ``only_if`` are nodes of the graph that are switched on or off before a replay
(``cudaGraphNodeSetEnabled``): a kernel whose node is off is not launched. This needs ``cuda.bindings``, which torch's
CUDA wheels bring, and one stream, on which the nodes are a chain.
"""

import torch

from fastasr._recording import recorded_by
from fastasr.graphs.recording import Unrecordable


class CudaRecorder:
    """Records the passes of one module as CUDA graphs whose memory is one pool."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def rehearse(self, function):
        """Runs ``function()`` on the stream of the captures, with its kernels, and puts torch's generators back."""
        state = torch.get_rng_state(), torch.cuda.get_rng_state()
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                function()
        finally:
            torch.cuda.current_stream().wait_stream(self.stream)
            torch.set_rng_state(state[0])
            torch.cuda.set_rng_state(state[1])

    def record(self, function, recording):
        """Returns what replays ``function()``, and what it returned. Nothing has run on the device, and torch's
        generators are where they were.
        """
        graph, parts, state = torch.cuda.CUDAGraph(keep_graph=True), [], torch.get_rng_state()
        recording.noted = lambda numbers, begins: parts.append((numbers, begins, _last_node(self.stream)))
        capture = torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        )
        try:
            with capture, recorded_by(recording if recording.back is not None else None):
                found = function()
        finally:
            recording.noted = lambda numbers, begins: None
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
            raise Unrecordable("it draws from torch's generator of the CPU")
        graph.instantiate()
        switches = _switches(graph, parts) if parts else []

        def replay():
            for switch in switches:
                switch.turn()
            graph.replay()

        return replay, found


class _Switch:
    """The nodes of one part, which are all on or all off."""

    def __init__(self, graph, numbers, nodes):
        self.graph, self.numbers, self.nodes, self.on = graph, numbers, nodes, True

    def turn(self):
        wanted = self.numbers.on
        if wanted == self.on:
            return
        from cuda.bindings import runtime

        executable = self.graph.raw_cuda_graph_exec()
        for node in self.nodes:
            _checked(runtime.cudaGraphNodeSetEnabled(executable, node, int(wanted)))
        self.on = wanted


def _checked(found):
    error, *rest = found
    if int(error):
        raise RuntimeError(f"fastasr.graphs: CUDA says {error}")
    return rest


def _last_node(stream):
    """Returns the node behind which the capture of ``stream`` goes on, or None at its beginning."""
    from cuda.bindings import runtime

    _, _, _, nodes, *_ = _checked(runtime.cudaStreamGetCaptureInfo(stream.cuda_stream))
    if nodes is not None and len(nodes) > 1:
        raise Unrecordable("a condition begins or ends where several streams meet")
    return int(nodes[0]) if nodes else None


def _switches(graph, parts):
    from cuda.bindings import runtime

    raw = graph.raw_cuda_graph()
    count = _checked(runtime.cudaGraphGetEdges(raw, 0))[-1]
    before, after, *_ = _checked(runtime.cudaGraphGetEdges(raw, count))
    following = {int(a): b for a, b in zip(before, after, strict=True)}
    found = []
    for (numbers, begins, first), (_, _, last) in zip(parts[::2], parts[1::2], strict=True):
        assert begins
        nodes, node = [], first
        while node != last:
            nodes.append(following[node])
            node = int(nodes[-1])
        found.append(_Switch(graph, numbers, nodes))
    return found
