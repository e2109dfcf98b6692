# SPDX-License-Identifier: Apache-2.0
"""Calls of a module by replays: one recorded pair of passes for each kind of call, one node of autograd for a call.

The first calls of a kind run as they are, so that libraries have chosen their kernels. Then the forward pass is
recorded on buffers of its own, and in training the backward pass behind it. A call copies its tensors to the buffers, lets the
host decide (:mod:`fastasr.graphs.recording`), replays, and returns copies of the outputs.
"""

import operator
import random
import threading
import types
import weakref
from collections import OrderedDict

import torch
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastasr._transforms import Function
from fastasr.graphs.recording import Recording
from fastasr.models.common.graph_capture import recording
from fastasr.ops import _dispatch


class Graphs:
    """The graphs of one module. ``forward(module, *arguments)`` is what is recorded; arguments are tensors, None or
    constants. ``after`` calls of a kind run as they are before it is recorded; the ``most`` graphs used last are kept.
    ``recorder.record(function, recording)`` returns what replays the function and what the function returned.
    """

    def __init__(self, module, forward, recorder, after=2, most=8):
        self._module = weakref.ref(module)  # which lives on without its graphs
        self.forward, self.recorder = forward, recorder
        self.after, self.most = after, most
        self.graphs, self.seen = OrderedDict(), {}
        self.reasons = {}  # kind of call -> why it is not recorded
        self.outstanding = (
            None  # weak reference to the node of a replayed forward pass whose backward pass may follow
        )
        # a walk over a model's modules takes longer than all the rest of a call: a module that is changed must be
        # graphed again
        # (The module's own dict holds its bound forward, and so the module.)
        self._modes = [vars(m) for m in module.modules() if m is not module]
        self._parameters, self._state = list(module.parameters()), _state(module)
        self._lock = threading.Lock()

    @property
    def module(self):
        return self._module()

    def __call__(self, *arguments):
        if recording() is not None or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.forward(self.module, *arguments)
        with self._lock:
            graph = self._graph(arguments)
        if graph is None:
            return self.forward(self.module, *arguments)
        return graph.run(arguments)

    def _graph(self, arguments):
        if self.outstanding is not None and self.outstanding() is not None:
            return None  # its saved tensors are still needed
        kind = self._kind(arguments)
        graph = self.graphs.get(kind)
        if graph is not None and graph.valid():
            self.graphs.move_to_end(kind)
            return graph
        if graph is not None:
            del self.graphs[kind]
        if kind in self.reasons:
            return None
        self.seen[kind] = self.seen.get(kind, 0) + 1
        if self.seen[kind] <= self.after:
            return None
        state = random.getstate()
        try:
            graph = Graph(self, arguments)
            if random.getstate() != state:
                raise RuntimeError("it draws from Python's random outside of a plan")
        except Exception as error:
            self.reasons[kind] = f"{type(error).__name__}: {error}"
            return None
        finally:
            random.setstate(state)
        self.graphs[kind] = graph
        while len(self.graphs) > self.most:
            self.graphs.popitem(last=False)
        return graph

    def _kind(self, arguments):
        """Returns all that selects the code of a call."""
        shapes = tuple(
            (a.shape, a.dtype, a.device, a.requires_grad) if isinstance(a, torch.Tensor) else a
            for a in arguments
        )
        device = next(a.device.type for a in arguments if isinstance(a, torch.Tensor))
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        modes = self.module.training, *map(operator.itemgetter("training"), self._modes)
        wanted = torch.is_grad_enabled() and tuple(p.requires_grad for p in self._parameters)
        return (
            shapes,
            cast,
            modes,
            wanted,
            _dispatch.forced_backend(),
            torch.are_deterministic_algorithms_enabled(),
        )


class Graph:
    """One kind of call, recorded."""

    def __init__(self, owner, arguments):
        self.owner, self.generation = weakref.proxy(owner), 0
        module = owner.module
        self.addresses = [t.data_ptr() for t in owner._state]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.static = [_buffer(a) for a in arguments]
        self.tensors = [t for t in self.static if isinstance(t, torch.Tensor)]
        device = self.tensors[0].device
        self.back = Recording(device)
        self.ahead = Recording(device, self.back)
        cast = torch.is_autocast_enabled(device.type)

        def forward():
            # a cast that autocast keeps for later calls would be one from before the optimizer's step
            with torch.autocast(
                device.type, torch.get_autocast_dtype(device.type), cast, cache_enabled=False
            ):
                return tree_flatten(owner.forward(module, *self.static))

        self.replay_forward, (self.outputs, self.form) = owner.recorder.record(forward, self.ahead)
        differentiable = [t for t in self.outputs if isinstance(t, torch.Tensor) and t.requires_grad]
        self.gradients = None
        if differentiable:
            self.sources = [t for t in self.tensors if t.requires_grad] + self.parameters
            self.incoming = [torch.zeros_like(t) for t in differentiable]

            def backward():
                return torch.autograd.grad(differentiable, self.sources, self.incoming, allow_unused=True)

            self.replay_backward, self.gradients = owner.recorder.record(backward, self.back)
        self.outputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in self.outputs]
        self.differentiable = [isinstance(t, torch.Tensor) and any(t.data_ptr() == d.data_ptr() for d in differentiable)
                               for t in self.outputs]  # fmt: skip

    def valid(self):
        """Says whether the parameters lie where they lay, and every rate is 0 where it was."""
        return (
            [*map(torch.Tensor.data_ptr, self.owner._state)] == self.addresses
            and self.ahead.holds()
            and self.back.holds()
        )

    def load(self, arguments):
        given = [a for a in arguments if isinstance(a, torch.Tensor)]
        with torch.no_grad():
            for buffer, t in zip(self.tensors, given, strict=True):
                if buffer.data_ptr() != t.data_ptr():
                    buffer.detach().copy_(t, non_blocking=True)

    def run(self, arguments):
        given = [a for a in arguments if isinstance(a, torch.Tensor)]
        if self.gradients is None:
            self.load(arguments)
            self.ahead.decide()
            self.replay_forward()
            found = [t.clone() if isinstance(t, torch.Tensor) else t for t in self.outputs]
        else:
            found = iter(_Replayed.apply(self, *given, *self.parameters))
            found = [next(found) if isinstance(t, torch.Tensor) else t for t in self.outputs]
        return tree_unflatten(found, self.form)

    def keep_accumulated(self):
        """Copies gradients that lie in this graph's memory, which a replay overwrites: autograd keeps a gradient that
        it is given first, and adds the next to it."""
        for p, g in zip(self.sources, self.gradients, strict=True):
            if g is not None and p.grad is not None and p.grad.data_ptr() == g.data_ptr():
                p.grad = p.grad.clone()


class _Node:
    """Lives as long as the autograd node of a replayed forward pass."""


class _Replayed(Function):
    @staticmethod
    def forward(ctx, graph, *tensors):
        graph.load(tensors[: len(graph.tensors)])
        graph.ahead.decide()
        graph.replay_forward()
        graph.generation += 1
        ctx.graph, ctx.generation, ctx.node = graph, graph.generation, _Node()
        graph.owner.outstanding = weakref.ref(ctx.node)
        ctx.count = len(tensors)
        found = [t.clone() for t in graph.outputs if isinstance(t, torch.Tensor)]
        tensors_out = [
            d for t, d in zip(graph.outputs, graph.differentiable, strict=True) if isinstance(t, torch.Tensor)
        ]
        ctx.mark_non_differentiable(*(t for t, d in zip(found, tensors_out, strict=True) if not d))
        ctx.wanted = tensors_out
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        graph = ctx.graph
        if graph.generation != ctx.generation:
            raise RuntimeError("fastasr.graphs: a later call has replaced what this backward pass needs")
        grads = [g for g, wanted in zip(grads, ctx.wanted, strict=True) if wanted]
        for buffer, g in zip(graph.incoming, grads, strict=True):
            buffer.copy_(g)
        graph.keep_accumulated()
        graph.back.decide()
        graph.replay_backward()
        graph.back.tell()
        ctx.node = None
        found = iter(g if g is None else g.detach() for g in graph.gradients)
        inputs = [next(found).clone() if t.requires_grad else None for t in graph.tensors]
        return None, *inputs, *found


def _state(module):
    return [*module.parameters(), *module.buffers()]


def _buffer(a):
    if not isinstance(a, torch.Tensor):
        return a
    return (
        torch.empty_like(a, memory_format=torch.contiguous_format)
        .copy_(a.detach())
        .requires_grad_(a.requires_grad)
    )


_GRAPHS = weakref.WeakKeyDictionary()  # module -> its Graphs: a copy of the module has none


def graphed(module, recorder=None, **options):
    """Binds a forward to ``module`` that replays the one that it has; returns its :class:`Graphs`."""
    from fastasr.graphs.recording import CudaRecorder

    bound = vars(module).get("forward")
    forward = type(module).forward if bound is None else bound.__func__
    graphs = _GRAPHS[module] = Graphs(module, forward, recorder or CudaRecorder(), **options)
    vars(module)["forward"] = types.MethodType(_replayed, module)
    return graphs


def _replayed(self, *arguments, **named):
    graphs = _GRAPHS.get(self)
    if graphs is None:
        return type(self).forward(self, *arguments, **named)
    return graphs.forward(self, *arguments, **named) if named else graphs(*arguments)
