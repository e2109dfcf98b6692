# SPDX-License-Identifier: Apache-2.0
"""One pass under construction: what the host decides before each replay, and which part of it runs.

A *plan* is a function without arguments that returns numbers: it draws the random numbers and reads the schedules that
the ungraphed call would draw and read at this place. Recording calls no plan. Before each replay all plans run in the
order in which they were recorded, and one copy takes their numbers to the device.
"""

import contextlib

import torch

# Whether kernels that can read a number on the device decide by it in each replay. If not, their nodes are switched as
# those of other parts are.
KERNELS_DECIDE = False

CAPACITY = 1 << 14  # numbers of one pass: a Zipformer-M has about 2,500


class Recording:
    """The numbers of one pass, ``values`` on the device and ``now`` on the host.

    ``back`` is the Recording of the backward pass, for which nodes of autograd ask here: it runs in autograd's own
    thread, where ``recording()`` is None.
    """

    def __init__(self, device, back=None):
        self.device, self.back = device, back
        self.values = torch.zeros(CAPACITY, device=device)
        self.now = [0.0] * CAPACITY
        self.plans, self.used = [], 0
        self.phases = []  # (schedule, whether it was 0): a replay is valid while this holds
        self.part = None  # (Recording, place): the operations recorded now run where this number is not 0
        self.noted = lambda numbers, begins: (
            None
        )  # a recorder may want to know where such parts begin and end
        self.verdicts = []  # (module with min_prob and max_prob, bool tensor, its Numbers)

    def numbers(self, plan, count):
        """Returns a view of ``values`` that holds what ``plan`` returns before each replay."""
        begin, self.used = self.used, self.used + count
        if self.used > CAPACITY:
            raise RuntimeError(f"fastasr.graphs: more than {CAPACITY} numbers in one pass")
        self.plans.append((plan, begin, self.used))
        return Numbers(self, begin, self.values[begin : self.used])

    def holds(self):
        """Says whether every schedule is 0 exactly where it was when this was recorded."""
        return all((peek(schedule) == 0.0) == zero for schedule, zero in self.phases)

    def decide(self):
        """Runs the plans and brings their numbers to the device."""
        for plan, begin, end in self.plans:
            found = plan()
            if end > begin:
                self.now[begin:end] = found
        if self.used:
            numbers = torch.tensor(self.now[: self.used], pin_memory=self.device.type == "cuda")
            self.values[: self.used].copy_(numbers, non_blocking=True)

    def tell(self):
        """Tells the modules that acted what the replay found. On CUDA: one copy of all verdicts to pinned memory, one
        event, and the modules' next plan waits for the event."""
        for module, verdict, acts in self.verdicts:
            if acts.on:
                module.prob = module.min_prob if bool(verdict) else module.max_prob

    @contextlib.contextmanager
    def only_if(self, numbers):
        """What is recorded inside the block runs in replays where the first of ``numbers`` is not 0. It may write only
        to tensors that were made outside.
        """
        if self.part is not None:
            raise RuntimeError("fastasr.graphs: conditions inside conditions are not recorded")
        self.part = numbers.recording, numbers.place
        self.noted(numbers, True)
        try:
            yield
            self.noted(numbers, False)
        finally:
            self.part = None

    @contextlib.contextmanager
    def changing(self, numbers):
        """The same around kernels that can decide by themselves: yields the number that they shall read, or None."""
        if KERNELS_DECIDE:
            yield numbers.values[:1]
            return
        with self.only_if(numbers):
            yield None


class Numbers:
    """A plan's numbers: ``values`` (count,) on the device, ``on`` (its first is not 0) on the host after ``decide``."""

    def __init__(self, recording, place, values):
        self.recording, self.place, self.values = recording, place, values

    @property
    def on(self):
        return self.recording.now[self.place] != 0.0


def peek(x):
    """Returns float(x) of a number or a schedule, without the random number that reading a schedule draws."""
    if isinstance(x, (int, float)):
        return float(x)
    if x.batch_count is None or not x.training:
        return float(x.default)
    return float(x.schedule(x.batch_count))


class CudaRecorder:
    """Records passes as CUDA graphs whose memory is one pool. (Written without a GPU, and run on none so far.)

    What is recorded in ``only_if`` are nodes of the graph that are switched on or off before a replay
    (``cudaGraphNodeSetEnabled``): a node that is off costs no kernel. This needs ``cuda.bindings``, which torch's CUDA
    wheels bring, and one stream: the nodes are then a chain.
    """

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def record(self, function, recording):
        """Returns a function that replays ``function()``, and what it returned. Nothing has run on the device, and
        torch's generators are where they were."""
        from fastasr.models.common.graph_capture import recorded_by

        graph, parts = torch.cuda.CUDAGraph(keep_graph=True), []
        recording.noted = lambda numbers, begins: parts.append((numbers, begins, _last_node(self.stream)))
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            with recorded_by(recording if recording.back is not None else None):
                found = function()
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

        for node in self.nodes:
            _checked(runtime.cudaGraphNodeSetEnabled(self.graph.raw_cuda_graph_exec(), node, int(wanted)))
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
    if len(nodes) > 1:
        raise RuntimeError("fastasr.graphs: a condition begins or ends where several streams meet")
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
