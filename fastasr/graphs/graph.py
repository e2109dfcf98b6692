# SPDX-License-Identifier: Apache-2.0
"""One kind of call of a module, recorded: a forward pass and, in training, the backward pass behind it.

A call copies its tensors to the buffers of the recording, lets the host decide (:mod:`fastasr.graphs.recording`),
replays, and returns copies of the outputs. In training it is one node of autograd, whose inputs are the call's tensors
and the module's parameters.
"""

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, compress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastasr._recording import recorded_by, storage_of
from fastasr._transforms import Function, transforms_active
from fastasr.graphs.casts import Casts, Uses
from fastasr.graphs.leaks import Made
from fastasr.graphs.recording import Recorder, Recording, Room, Unrecordable
from fastasr.ops._kept import counter
from fastasr.ops._runtime import is_batched


class Gradients:
    """The gradients of a module's parameters: views of one buffer of each dtype, which all graphs of the module write.

    autograd keeps the first gradient that it is given as ``parameter.grad``, and adds the next one to it. So a
    replay, which overwrites the buffer, first moves the gradients that lie in it. With ``clones`` each backward pass
    gets copies instead, which stay.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], clones: bool = False) -> None:
        self.parameters, self.clones = parameters, clones
        pieces: dict[int, tuple[int, int, int, torch.Size]] = {}  # buffer, first element, elements, shape
        self.buffers: list[Tensor] = []
        for dtype, device in {(p.dtype, p.device) for p in parameters}:
            begin = 0
            for i, p in enumerate(parameters):
                if (p.dtype, p.device) == (dtype, device):
                    pieces[i] = len(self.buffers), begin, p.numel(), p.shape
                    begin += -(-p.numel() // 64) * 64  # each piece begins at a multiple of 16 bytes
            self.buffers.append(torch.zeros(begin, dtype=dtype, device=device))
        self.pieces = [pieces[i] for i in range(len(parameters))]
        self.views = self._views(self.buffers)
        self.addresses = [view.data_ptr() for view in self.views]

    def _views(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        return [buffers[k][begin : begin + n].view(shape) for k, begin, n, shape in self.pieces]

    def fits(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Says whether these are the parameters, and as they were: ``model.to`` keeps a parameter and changes it."""
        return len(parameters) == len(self.parameters) and all(
            p is known and (p.shape, p.dtype, p.device) == (view.shape, view.dtype, view.device)
            for p, known, view in zip(parameters, self.parameters, self.views, strict=True)
        )

    @property
    def bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers)

    def given(self, found: Sequence[bool]) -> Iterable[Tensor]:
        """Returns the gradients for autograd as fresh views, because it keeps a gradient that nobody else holds, and
        copies others. ``found`` says which parameters have one; the rest is left out."""
        views = self._views([b.clone() for b in self.buffers]) if self.clones else self.views
        return map(torch.Tensor.detach, compress(views, found))

    def keep_accumulated(self) -> None:
        """Moves the gradients of earlier replays that are still some ``parameter.grad``: one copy for all of them."""
        kept = [
            (p, i)
            for i, (p, address) in enumerate(zip(self.parameters, self.addresses, strict=True))
            if p.grad is not None and p.grad.data_ptr() == address
        ]
        if kept:
            moved = self._views([b.clone() for b in self.buffers])
            for p, i in kept:
                p.grad = moved[i].detach()


class Owner(Protocol):
    """The ``ModuleGraphs`` whose graph runs: it knows the node of a replay whose backward pass is to come."""

    outstanding: "weakref.ref[Node] | None"


class Node:
    """Lives as long as the autograd node of a replayed forward pass."""


class Graph:
    """The recording of one kind of call. ``forward`` takes the call's leaves, tensors and constants, and returns the
    module's result.
    """

    def __init__(
        self,
        recorder: Recorder,
        forward: Callable[[Sequence[Any]], Any],
        leaves: Sequence[Any],
        gradients: Gradients,
        module: nn.Module,
        others: Sequence["Graph"] = (),
    ) -> None:
        """``others``: the graphs of the module that there are, with which it shares casts."""
        self.forward = forward
        self.key: Hashable = None  # of the kind of its calls
        self.casts: Casts | None = None
        self.static = [_buffer(a) for a in leaves]
        self.tensors = [t for t in self.static if isinstance(t, torch.Tensor)]
        self.device = self.tensors[0].device
        self.gradients = gradients
        self.addresses: list[int] = []  # of the module's tensors when it was recorded
        self.outside: list[Tensor] = []  # that it reads, besides the module's own
        # the parameters whose gradients may come at the end of the backward pass
        self.late: list[Tensor] = []
        rooms = self._rehearse(recorder, module, others)
        self.back = Recording(self.device, room=rooms[1])
        self.back.allow_late([*self.late, *(() if self.casts is None else self.casts.leaves)])
        self.ahead = Recording(self.device, self.back, room=rooms[0])
        self.replay_forward, (outputs, self.form) = recorder.record(self._forward, self.ahead)
        differentiable = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
        self.trains = bool(differentiable)
        self.trained: list[nn.Parameter] = []  # those that have a gradient
        if self.trains:
            self.incoming = [torch.zeros_like(t) for t in differentiable]
            self.replay_backward, (self.inputs, self.found) = recorder.record(
                lambda: self._backward(differentiable, self.incoming), self.back
            )
            self.back.bring_tables()
            pairs = zip(gradients.parameters, self.found, strict=True)
            self.trained = [p for p, has in pairs if has]
        self.wanted = [t.requires_grad for t in outputs if isinstance(t, torch.Tensor)]
        self.outputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in outputs]

    def _forward(self) -> tuple[list[Any], TreeSpec]:
        kind = self.device.type
        # A cast that autocast keeps for later calls would be older than the optimizer's step.
        cast = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, torch.get_autocast_dtype(kind), cast, cache_enabled=False):
            if self.casts is None:
                return tree_flatten(self.forward(self.static))
            self.casts.make()
            with self.casts.in_place():
                return tree_flatten(self.forward(self.static))

    def _backward(
        self, outputs: Sequence[Tensor], incoming: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[bool]]:
        """Returns the inputs' gradients, and which parameters have one; these lie in ``self.gradients``."""
        inputs = [t for t in self.tensors if t.requires_grad]
        found = self._differentiated(self.back, outputs, inputs, incoming)
        ours = found[len(inputs) :]
        for dtype in {g.dtype for g in ours if g is not None}:
            pairs = [
                (view, g)
                for view, g in zip(self.gradients.views, ours, strict=True)
                if g is not None and g.dtype is dtype
            ]
            torch._foreach_copy_([view for view, _ in pairs], [g for _, g in pairs])
        return list(found[: len(inputs)]), [g is not None for g in ours]

    def _differentiated(
        self, back: Recording, outputs: Sequence[Tensor], inputs: Sequence[Tensor], incoming: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        # the call that is recorded may be inside autocast, while users call backward() outside
        of = {} if self.casts is None else self.casts.of
        parameters = [of.get(id(p), p) for p in self.gradients.parameters]
        with torch.autocast(self.device.type, enabled=False):
            back.begin()
            found = torch.autograd.grad(outputs, [*inputs, *parameters], incoming, allow_unused=True)
            late = [*back.came_late(parameters, found[len(inputs) :])]
            if back.runs:
                self.late = [leaf for leaf, well in late if well]
            elif not all(well for _, well in late):
                back.refuse("a parameter has two gradients")
            back.end()
        return found

    def _rehearse(
        self, recorder: Recorder, module: nn.Module, others: Sequence["Graph"], again: bool = False
    ) -> list[Room]:
        """Runs both passes once in the form in which they are recorded, and puts the module's buffers back. In this run
        libraries choose kernels and allocate workspaces, and it shows which parameters are only cast, whether the call
        keeps tensors, and which others it reads, such as tables of positions: the graph keeps these, because their
        owner may make longer ones. Returns the rooms that the passes take.
        """
        buffers = list(module.buffers())
        before = [b.clone() for b in buffers]
        kind = self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        parameters = [p for p in module.parameters() if p.dtype is not dtype and p.is_floating_point()]
        uses, made = None if dtype is None else Uses(parameters, dtype), Made()
        rooms: list[Room] = []

        def both() -> None:
            back = Recording(self.device, runs=True)
            ahead = Recording(self.device, back, runs=True)
            with made, uses or contextlib.nullcontext():
                with recorded_by(ahead):
                    outputs, _ = self._forward()
                outputs = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
                if outputs:
                    inputs = [t for t in self.tensors if t.requires_grad]
                    self._differentiated(back, outputs, inputs, [torch.zeros_like(t) for t in outputs])
            rooms.extend((ahead.room, back.room))

        try:
            recorder.rehearse(both)
        finally:
            with torch.no_grad():
                for b, saved in zip(buffers, before, strict=True):
                    b.copy_(saved)
        for t in self.tensors:  # masks.seen keeps its answer with the mask
            vars(t).clear()
        if not again and made.left():  # The first call makes a table that later ones read.
            return self._rehearse(recorder, module, others, again=True)
        made.check()
        own = set(map(storage_of, chain(module.parameters(), buffers, self.tensors)))
        self.outside = [t for key, t in made.outside.items() if key not in own]
        if uses is not None:
            castable = uses.castable(parameters)
            if castable:
                shared = (other.casts for other in others if other.casts is not None)
                self.casts = Casts(module, castable, uses.dtype, shared)
                recorder.rehearse(self.casts.make)
        return rooms

    @property
    def bytes(self) -> int:
        """Returns the bytes of the buffers and outputs, which no other graph shares."""
        tensors = [*self.tensors, *(t for t in self.outputs if isinstance(t, torch.Tensor))]
        tensors += [*self.incoming, *(t for t in self.inputs if t is not None)] if self.trains else []
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def shared_bytes(self) -> dict[int, int]:
        """Returns the bytes of each buffer of casts by its address."""
        return {} if self.casts is None else self.casts.bytes

    def holds(self) -> bool:
        return self.ahead.holds() and self.back.holds()

    def run(self, leaves: Sequence[Any], owner: Owner) -> Any:
        given = [a for a in leaves if isinstance(a, torch.Tensor)]
        if self.trains:
            found = iter(_Replayed.apply(self, owner, *given, *self.trained))
        else:
            with contextlib.nullcontext() if self.casts is None else self.casts.noticing():
                self._replay(given)
            found = (t.clone() for t in self.outputs if isinstance(t, torch.Tensor))
        return tree_unflatten(
            [next(found) if isinstance(t, torch.Tensor) else t for t in self.outputs], self.form
        )

    def _replay(self, given: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for buffer, t in zip(self.tensors, given, strict=True):
                _distinct(buffer.detach()).copy_(_distinct(t), non_blocking=True)
        self.ahead.decide()
        self.replay_forward()


class _Replayed(Function):
    repeats = False

    @staticmethod
    def forward(ctx: Any, graph: Graph, owner: Owner, *tensors: Tensor) -> tuple[Tensor, ...]:
        graph._replay(tensors[: len(graph.tensors)])
        ctx.graph, ctx.node = graph, Node()
        ctx.versions = [*map(counter, graph.trained)]
        owner.outstanding = weakref.ref(ctx.node)
        found = [t.clone() for t in graph.outputs if isinstance(t, torch.Tensor)]
        ctx.mark_non_differentiable(*(t for t, wanted in zip(found, graph.wanted, strict=True) if not wanted))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        graph = ctx.graph
        if transforms_active() or any(g is not None and is_batched(g) for g in grads):
            raise RuntimeError(
                "fastasr.graphs: a replayed call has one backward pass, and is_grads_batched=True or torch.func.vmap "
                "asks for several: make the call inside fastasr.eager_mode(model)"
            )
        if ctx.node is None:  # The memory of what a pass has read serves the rest of it, and later calls.
            raise RuntimeError(
                "fastasr.graphs: a replayed call has one backward pass: for a second one make the call inside "
                "fastasr.eager_mode(model)"
            )
        if ctx.versions != [*map(counter, graph.trained)]:
            raise RuntimeError(
                "fastasr.graphs: a parameter has changed since the forward pass of this backward pass"
            )
        used = (g for g, wanted in zip(grads, graph.wanted, strict=True) if wanted)
        for buffer, g in zip(graph.incoming, used, strict=True):
            buffer.copy_(g)
        graph.gradients.keep_accumulated()
        graph.back.decide()
        graph.replay_backward()
        graph.back.tell()
        ctx.node = None
        inputs = iter(graph.inputs)
        found = [next(inputs) if t.requires_grad else None for t in graph.tensors]
        ours = graph.gradients.given(graph.found)
        return None, None, *(g if g is None else g.clone() for g in found), *ours


def _buffer(a: Any) -> Any:
    """Returns a tensor like ``a`` with the same values: a dimension that repeats one element stays such a dimension."""
    if not isinstance(a, torch.Tensor):
        return a
    if a.layout is not torch.strided or type(a) not in (torch.Tensor, torch.nn.Parameter):
        raise Unrecordable(f"an argument is a {type(a).__name__} of layout {a.layout}")
    t = _distinct(a.detach())
    made = torch.empty_like(t, memory_format=torch.preserve_format).copy_(t)
    return made.expand(a.shape).requires_grad_(a.requires_grad)


def _distinct(t: Tensor) -> Tensor:
    """Returns the view of ``t`` without the repetitions of its elements."""
    for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if stride == 0 and size > 1:
            t = t.narrow(dim, 0, 1)
    return t
