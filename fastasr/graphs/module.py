# SPDX-License-Identifier: Apache-2.0
"""The graphs of a module: which calls are replayed, which run as they are, and why.

The first calls of a kind run as they are. Then the kind is recorded, and its calls are replays as long as nothing
changes on which the recording depends. A call that cannot be recorded runs as it is, with a reason for the user.
"""

import contextlib
import functools
import logging
import math
import operator
import random
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.hooks import RemovableHandle

from fastasr import _left
from fastasr._recording import recording
from fastasr._transforms import is_transformed
from fastasr.graphs.graph import Gradients, Graph, Node
from fastasr.graphs.recording import Phases, Recorder, Unrecordable, hold
from fastasr.models.common import attention_dropout
from fastasr.models.common.ragged import are_all_padded
from fastasr.models.common.row import RowCall
from fastasr.ops import _dispatch

LONGEST = 4096  # frames of a recording in a row, unless Graphs says otherwise: about 40 s
MAX_KINDS = 1024  # A module remembers at most this many.
MAX_DROPS = 2  # A kind whose graph was dropped this often, to make room for others, is not recorded again.
# A refused kind is tried again once it was seen this many times as often: the cause may be gone.
PATIENCE = 8
CALLS = 1000  # Then a module says if less than half of them were replayed.
_OUTSTANDING = "not replayed: the backward pass of an earlier call is still to come"
_NOT_RECORDED = "not recorded: "
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
_VALUES: Callable[[dict[str, Any]], Iterable[Any]] = dict.values
_REQUIRES_GRAD = operator.attrgetter("requires_grad")
# torch.backends asks these too, through lookups that take several times as long.
_FP32_PRECISION = torch._C._get_fp32_precision_getter
_CUDNN = torch._C._get_cudnn_enabled, torch._C._get_cudnn_benchmark, torch._C._get_cudnn_deterministic
_local = threading.local()
_log = logging.getLogger("fastasr")

Forward = Callable[..., Any]  # forward(module, *args, **kwargs)
# (module, name of an attribute) -> the value, and the identities of its elements
Attributes = dict[tuple[nn.Module, str], tuple[Any, list[int]]]


@contextlib.contextmanager
def _in_parts(wanted: bool) -> Iterator[None]:
    """Has the parts of an encoder record their own calls inside the block, or not."""
    before, _local.in_parts = getattr(_local, "in_parts", False), wanted
    try:
        yield
    finally:
        _local.in_parts = before


@dataclass(frozen=True)
class Graphs:
    """The options of ``accelerate(model, graphs=...)``.

    after: calls of a kind that run as they are before it is recorded.
    most: graphs that a module keeps in training and in inference; the one used longest ago goes first.
    memory: bytes, or text such as "8GB", that the graphs of a module may hold beyond their pool and the gradients.
    parts: records the layers or stacks of an encoder one by one, so that the gradients of each are ready early, for
        DistributedDataParallel to send them while others are computed. If False, this happens only where an encoder
        drops layers at random, so that its calls as a whole cannot be recorded.
    clone_gradients: gives every backward pass its own gradients. If False, the next backward pass overwrites gradients
        that are not any parameter's ``grad``.
    recorder: makes the recorder of a module's calls; None for CUDA graphs.
    frames, recordings, longest: record one call for every batch: the recordings of a batch are put into a row with room
        for ``frames`` frames of features and so many ``recordings``, of which each may have, padded, ``longest`` frames
        (None: 4,096, or ``frames`` if fewer). Needs ``ragged=True``. Larger batches run unrecorded.
    """

    after: int = 2
    most: tuple[int, int] = (32, 32)
    memory: int | str = "8GB"
    parts: bool = False
    clone_gradients: bool = False
    recorder: Callable[[], Recorder] | None = None
    frames: int | None = None
    recordings: int | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        most = (self.most, self.most) if isinstance(self.most, int) else tuple(self.most)
        object.__setattr__(self, "most", most)
        if not isinstance(self.after, int) or self.after < 0:
            raise ValueError(f"Graphs: after: expected a number of calls, got {self.after!r}")
        if len(most) != 2 or not all(isinstance(n, int) and n > 0 for n in most):
            raise ValueError(f"Graphs: most: expected a number of graphs or two, got {self.most!r}")
        object.__setattr__(self, "memory", _bytes(self.memory))
        for name in ("frames", "recordings", "longest"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Graphs: {name}: expected a number of at least 1, got {value!r}")
        if (self.frames is None) != (self.recordings is None):
            raise ValueError("Graphs: frames and recordings: expected both or neither")
        if self.longest is None and self.frames is not None:
            object.__setattr__(self, "longest", min(self.frames, LONGEST))


def _bytes(memory: int | str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
    text = str(memory).strip().upper()
    number, unit = text.rstrip("KMGB"), text[len(text.rstrip("KMGB")) :]
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError):
        raise ValueError(f"Graphs: memory: expected bytes or text such as '8GB', got {memory!r}") from None


@dataclass
class Kind:
    """The record of a kind of call: how often it was seen, replayed, recorded, and dropped to make room for others;
    the bytes that its graph alone holds, and those of the weights' casts, which graphs of a module share; or why it is
    not recorded. ``filling``: the share of the room of ``Graphs(frames=...)`` that the replays used, as ``graph_state``
    found it.
    """

    call: str
    seen: int = 0
    replayed: int = 0
    recorded: int = 0
    dropped: int = 0
    bytes: int = 0
    casts: int = 0
    reason: str | None = None
    filling: float | None = None
    phases: Phases = field(default=(), repr=False)  # The reason stands while they last.
    again: float = field(default=math.inf, repr=False)  # It is tried again when it was seen so often.


@dataclass(frozen=True)
class OnRow:
    """How calls of an encoder become calls on a row of frames (:mod:`fastasr.models.common.row`): ``forward`` runs on
    the row and is recorded. ``why_not(module)`` returns the reason why all calls run as they are, or None. Then
    ``call(module, options, *args, **kwargs)`` returns the arguments for a call, a RowCall, or the reason against it.
    ``of(module)`` says whether this is the class that it knows, and not another of the same name. ``instead`` runs the
    calls that are not replayed; None: the forward that the module has without graphs.
    """

    forward: Forward
    call: Callable[..., RowCall | str]
    why_not: Callable[[Any], str | None]
    of: Callable[[Any], bool] = field(default=lambda module: True)
    instead: Forward | None = None


class _Structure:
    """The parts of a module on which a recording depends, except the values of its tensors. They are compared at every
    call, so it holds the dicts of all submodules and compares them by functions of C: a walk over the modules costs
    more than a replay.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        # The module's own dict is left out: it holds the bound forward, and so the module.
        self.own = [vars(m) for m in modules if m is not module]
        # Empty tables are left out: no recorded forward reads an entry that is added to one later.
        self.tables: list[dict[str, Any]] = [
            d for m in modules for d in (m._modules, m._parameters, m._buffers) if d and isinstance(d, dict)
        ]
        self.hooks = [
            d
            for m in modules
            for d in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            if m is not module
        ]
        self.hooks_known: int | None = None
        self.entries, self.forwards = self._entries(), self._forwards()
        self.parameters = list(module.parameters())
        self.state = [*self.parameters, *module.buffers()]

    def _entries(self) -> list[Any]:
        return [*chain.from_iterable(map(_VALUES, self.tables))]

    def _forwards(self) -> list[Any]:
        return [*map(dict.get, self.own, repeat("forward"))]

    def stays(self) -> bool:
        """Says whether the module has the same submodules, tensors and forwards. They are compared by identity."""
        entries = self._entries()
        return (
            len(entries) == len(self.entries)
            and all(map(operator.is_, entries, self.entries))
            and all(map(operator.is_, self._forwards(), self.forwards))
        )

    def has_hooks(self) -> bool:
        """Says whether a submodule has hooks. It looks again after any hook was registered anywhere."""
        if RemovableHandle.next_id != self.hooks_known:
            if any(self.hooks):
                return True
            self.hooks_known = RemovableHandle.next_id
        return False

    def training(self) -> tuple[bool | None, ...]:
        """Returns the modes of the submodules, None for those of torch.compile and TorchScript."""
        return tuple(map(dict.get, self.own, repeat("training")))


class ModuleGraphs:
    """The graphs of one module, and their replays. It records ``forward(module, *args, **kwargs)``.

    ``choice`` names a method of the module without arguments that draws how a call runs, such as the size of its
    chunks: calls for which it returns different values are of different kinds. If a part ``has_whole``, its calls are
    recorded only if the encoder around it cannot be. With ``on_row`` its forward is recorded in place of ``forward``.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        options: Graphs,
        choice: str | None = None,
        whole: bool = False,
        on_row: OnRow | None = None,
    ) -> None:
        self._module = weakref.ref(module)  # The graphs do not keep it alive.
        self.forward, self.options, self.choice, self.has_whole = forward, options, choice, whole
        self.on_row = on_row
        self.recorded = forward if on_row is None else on_row.forward
        self.kinds: OrderedDict[Hashable, Kind] = OrderedDict()
        self.graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self.used: dict[Hashable, Tensor] = {}  # frames () in the replays of each kind on a row
        # a weak reference to the node of a replayed forward pass whose backward pass may follow
        self.outstanding: weakref.ref[Node] | None = None
        self.calls = self.replays = 0
        self._lock = threading.Lock()
        # the backward pass of a recording may call the module too, in autograd's own thread
        self._records = False
        self._begin(module)

    def _begin(self, module: nn.Module) -> None:
        self.graphs.clear()
        self.structure = _Structure(module)
        self.suits: str | None = None  # why the module runs on no row, "" if it does
        self.recorder: Recorder | None = None
        self.gradients: Gradients | None = None

    def clear(self, module: nn.Module) -> None:
        """Forgets all recordings and reasons."""
        with self._lock:
            self.kinds.clear()
            self.used.clear()
            self._begin(module)

    def __call__(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        alone = self._records or (self.has_whole and not getattr(_local, "in_parts", False))
        reason = "" if alone else _why_not_now(module)
        if reason is not None:
            if reason:
                self._count(module, replayed=False)
                _left.note(module, reason, level=logging.INFO)
            return self.forward(module, *args, **kwargs)
        packed = None if self.on_row is None else self._packed(self.on_row, module, args, kwargs)
        if isinstance(packed, str):
            self._count(module, replayed=False)
            _left.note(module, f"not replayed: {packed}", level=logging.INFO)
            return self.forward(module, *args, **kwargs)
        if packed is not None and self.options.parts:
            return packed.unpack(self.recorded(module, *packed.arguments))
        leaves, form = tree_flatten((args, kwargs) if packed is None else (packed.arguments, {}))
        state = None if self.choice is None else random.getstate()
        chosen = None if self.choice is None else getattr(module, self.choice)()
        with self._lock:  # also while it replays: other threads would overwrite the buffers
            graph, reason = self._graph(module, leaves, form, chosen)
            found = None if graph is None else graph.run(leaves, self)
        refused = reason.startswith(_NOT_RECORDED)
        if not (refused and any(m in _GRAPHS for m in module.modules() if m is not module)):
            self._count(module, replayed=graph is not None)
        if graph is None:
            if state is not None:
                random.setstate(state)
            if reason:
                _left.note(module, reason, level=logging.INFO if reason == _OUTSTANDING else logging.WARNING)
            with _in_parts(refused):
                if packed is not None and refused:  # Its parts are recorded on rows.
                    return packed.unpack(self.recorded(module, *packed.arguments))
                return self.forward(module, *args, **kwargs)
        if not graph.trains and not self.structure.stays():  # This comparison runs while the GPU works.
            with self._lock:
                self._begin(module)
            return self(module, *args, **kwargs)
        if packed is None:
            return found
        self.used[graph.key] = self.used.get(graph.key, 0) + packed.used
        return packed.unpack(found)

    def _count(self, module: nn.Module, replayed: bool) -> None:
        """Counts the calls, and says once if few of many were replays."""
        self.calls += 1
        self.replays += replayed
        if self.calls != CALLS or 2 * self.replays >= CALLS:
            return
        _log.warning(
            "%s: only %d of %d calls were replayed, of %d of %d kinds of calls. %s, and see fastasr.graph_state(model)",
            type(module).__name__,
            self.replays,
            self.calls,
            sum(kind.replayed > 0 for kind in self.kinds.values()),
            len(self.kinds),
            "Use buckets of few shapes, or one recording for every batch, Graphs(frames=...)"
            if self.on_row is None
            else "Allow more frames, recordings or longest in Graphs",
        )

    def _packed(
        self, on_row: OnRow, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RowCall | str:
        tensors = (a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor))
        if self.options.recorder is None and all(t.is_cpu for t in tensors):
            return "its tensors are on a CPU"
        if are_all_padded():
            return "the call wants the padded batch"
        return self._unsuited(module) or on_row.call(module, self.options, *args, **kwargs)

    def _unsuited(self, module: nn.Module) -> str:
        """Returns why the module runs on no row, or "". All layers answer, so a module is asked once as long as it
        stays."""
        if self.suits and not self.structure.stays():
            self._begin(module)
        if self.suits is None:
            self.suits = "" if self.on_row is None else self.on_row.why_not(module) or ""
        return self.suits

    def _graph(
        self, module: nn.Module, leaves: list[Any], form: TreeSpec, chosen: Hashable
    ) -> tuple[Graph | None, str]:
        """Returns the graph of this call, or None and why there is none ("": not yet)."""
        reason = _unrecordable(leaves) or ("submodules have hooks" if self.structure.has_hooks() else "")
        if reason:
            return None, f"not replayed: {reason}"
        if self._looks_first(module) and not self.structure.stays():
            self._begin(module)
            if self._unsuited(module):
                return None, f"not replayed: {self.suits}"
        key = chosen, *self._key(module, leaves, form)
        kind = self.kinds.get(key)
        if kind is None:
            kind = self.kinds[key] = Kind(_spelled(module, leaves))
            if len(self.kinds) > MAX_KINDS:
                self.used.pop(self.kinds.popitem(last=False)[0], None)
        kind.seen += 1
        if self.outstanding is not None and self.outstanding() is not None:
            return None, _OUTSTANDING
        graph = self.graphs.get(key)
        if graph is not None and graph.holds() and graph.addresses == self._addresses():
            self.graphs.move_to_end(key)
            kind.replayed += 1
            return graph, ""
        if graph is not None:
            del self.graphs[key]
        if not hold(kind.phases) or kind.seen >= kind.again:
            kind.reason, kind.phases, kind.again = None, (), math.inf
        if kind.reason is not None:
            return None, _NOT_RECORDED + kind.reason
        if kind.seen <= self.options.after:
            return None, ""
        graph = self._recorded(module, leaves, form, kind, chosen)
        if graph is None:
            return None, f"{_NOT_RECORDED}{kind.reason}"
        self.graphs[key], graph.key = graph, key
        kind.replayed += 1
        self._make_room(module.training)
        return graph, ""

    def _looks_first(self, module: nn.Module) -> bool:
        """Says whether a changed module must be noticed before a replay, whose results could not be taken back."""
        return module.training or torch.is_grad_enabled() or not self.graphs

    def _addresses(self) -> list[int]:
        return [*map(torch.Tensor.data_ptr, self.structure.state)]

    def _recorded(
        self, module: nn.Module, leaves: list[Any], form: TreeSpec, kind: Kind, chosen: Hashable
    ) -> Graph | None:
        state, self._records, before = random.getstate(), True, _attributes(module)
        try:
            if reason := why_not_recordable(module):
                raise Unrecordable(reason)
            if self.recorder is None:
                self.recorder = (self.options.recorder or _cuda_recorder)()
            wanted = (
                [p for p in self.structure.parameters if p.requires_grad] if torch.is_grad_enabled() else []
            )
            recorded, of = self.recorded, self._module  # a graph must not keep its module alive

            def forward(static: Sequence[Any]) -> Any:
                args, kwargs = tree_unflatten(static, form)
                return recorded(of(), *args, **kwargs)

            if self.choice is not None:
                vars(module)[self.choice] = lambda: chosen
            try:
                others = [*self.graphs.values()]
                graph = Graph(self.recorder, forward, leaves, self._gradients(wanted), module, others)
            finally:
                if self.choice is not None:
                    vars(module).pop(self.choice, None)
                changed = _put_back(module, before)
            graph.addresses = self._addresses()
            if changed:  # a replay would not change it, and would overwrite new tensors
                raise Unrecordable(f"a call changes attributes of modules: {', '.join(changed)}")
            if random.getstate() != state:
                raise Unrecordable("it draws from Python's random outside of a plan")
        except Exception as error:  # the call runs as it is, and says why
            kind.reason, kind.again = f"{type(error).__name__}: {error}", PATIENCE * kind.seen
            if isinstance(error, Unrecordable):
                kind.reason, kind.phases = str(error), error.phases
            return None
        finally:
            self._records = False
            random.setstate(state)
        kind.recorded += 1
        kind.bytes, kind.casts = graph.bytes, sum(graph.shared_bytes.values())
        return graph

    def _gradients(self, wanted: Sequence[nn.Parameter]) -> Gradients:
        """Returns the gradients of these parameters, which all recordings with the same ones share."""
        if not wanted:
            return Gradients(wanted)
        if self.gradients is None or not self.gradients.fits(wanted):
            self.gradients = Gradients(wanted, self.options.clone_gradients)
        return self.gradients

    def _held(self) -> int:
        """Returns the bytes that the graphs hold beyond their pool and the gradients."""
        shared: dict[int, int] = {}
        for graph in self.graphs.values():
            shared |= graph.shared_bytes
        return sum(shared.values()) + sum(graph.bytes for graph in self.graphs.values())

    def _make_room(self, training: bool) -> None:
        most, memory = self.options.most[0 if training else 1], _bytes(self.options.memory)
        while len(self.graphs) > most or (len(self.graphs) > 1 and self._held() > memory):
            key, _ = self.graphs.popitem(last=False)
            kind = self.kinds.get(key)
            if kind is not None:
                kind.dropped += 1
                if kind.dropped == MAX_DROPS:  # recording costs more than the replays in between save
                    kind.reason = (
                        "it was dropped for other kinds: allow more graphs or memory, or use fewer shapes"
                    )

    def _key(self, module: nn.Module, leaves: list[Any], form: TreeSpec) -> tuple[Hashable, ...]:
        """Returns everything that selects the code of a call."""
        tensors = tuple(
            (a.shape, a.dtype, a.device, a.requires_grad, a.stride())
            if isinstance(a, torch.Tensor)
            else (type(a), a)  # 1 is not True
            for a in leaves
        )
        kind = next(a.device.type for a in leaves if isinstance(a, torch.Tensor))
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        wanted = torch.is_grad_enabled() and tuple(map(_REQUIRES_GRAD, self.structure.parameters))
        settings = (
            torch.is_inference_mode_enabled(),
            _dispatch.forced_backend(),
            attention_dropout.as_upstream(),
            torch.are_deterministic_algorithms_enabled(),
            *map(_FP32_PRECISION, ("cuda", "cuda"), ("matmul", "conv")),
            *(ask() for ask in _CUDNN),
            torch.get_default_dtype(),
        )
        return tensors, form, cast, module.training, self.structure.training(), wanted, settings


def why_not_recordable(module: nn.Module) -> str | None:
    """Returns why a recording could not find the module's parameters again, or None."""
    if any("_is_fsdp_managed_module" in vars(m) for m in module.modules()):
        return "its parameters are sharded by FSDP, which gathers them anew for each call"
    for t in chain(module.parameters(), module.buffers()):
        if type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return (
                f"it has a parameter or buffer that is a {type(t).__name__}, which has no memory of its own"
            )
    return None


def _attributes(module: nn.Module) -> Attributes:
    """Returns the attributes of all submodules, and the elements of those that are lists or dicts."""
    return {(m, name): (value, _elements(value)) for m in module.modules() for name, value in vars(m).items()}


def _elements(value: Any) -> list[int]:
    if isinstance(value, (dict, list)) and value:
        return [*map(id, value.values() if isinstance(value, dict) else value)]
    return []


def _put_back(module: nn.Module, before: Attributes) -> list[str]:
    """Gives changed attributes their values back, except elements of lists and dicts. Returns their names."""
    changed = []
    for (m, name), (value, elements) in _attributes(module).items():
        old, old_elements = before.get((m, name), (None, None))
        if value is not old or elements != old_elements:
            changed.append(f"{type(m).__name__}.{name}")
            if (m, name) in before:
                vars(m)[name] = old
            else:
                del vars(m)[name]
    return changed


def _why_not_now(module: nn.Module) -> str | None:
    """Returns why no call is replayed now, "" if that is no loss, or None. Under hooks of all modules and while
    torch.jit traces, a bound forward is not run (:mod:`fastasr.swap.binding`)."""
    if recording() is not None:
        return ""
    if _left.is_ignored():  # fastasr itself compares both ways
        return ""
    if is_transformed():
        return "not replayed: the call is under a transform"
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "not replayed: saved tensors have hooks, as in checkpointing"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return ""
    return None


def _unrecordable(leaves: Sequence[Any]) -> str:
    """Returns why calls with such arguments are not recorded, or ""."""
    tensors = [a for a in leaves if isinstance(a, torch.Tensor)]
    if not tensors:
        return "no argument is a tensor"
    others = {type(a).__name__ for a in leaves if not isinstance(a, (torch.Tensor, *_CONSTANTS))}
    if others:
        return f"arguments are {', '.join(sorted(others))}"
    if len({t.device for t in tensors}) > 1:
        return "arguments are on several devices"
    return ""


def _spelled(module: nn.Module, leaves: Sequence[Any]) -> str:
    shapes = [f"{tuple(a.shape)}" if isinstance(a, torch.Tensor) else repr(a) for a in leaves]
    return f"{'training' if module.training else 'inference'} {', '.join(shapes)}"


def _cuda_recorder() -> Recorder:
    if not torch.cuda.is_available():
        raise Unrecordable("there is no CUDA device")
    from fastasr.graphs.cuda import CudaRecorder

    return CudaRecorder()


# module -> its ModuleGraphs: a copy of the module has none
_GRAPHS: weakref.WeakKeyDictionary[nn.Module, "ModuleGraphs"] = weakref.WeakKeyDictionary()


def keep(module: nn.Module, forward: Forward, options: Graphs, *more: Any, **named: Any) -> ModuleGraphs:
    """Has the forward that ``replaying`` made of ``forward`` record the calls of ``module``. Returns the
    ``ModuleGraphs``, which gets the further arguments.
    """
    found = _GRAPHS[module] = ModuleGraphs(module, forward, options, *more, **named)
    return found


def release(module: nn.Module) -> ModuleGraphs | None:
    """Frees the graphs of a module."""
    return _GRAPHS.pop(module, None)


def of(module: nn.Module) -> ModuleGraphs | None:
    """Returns the ``ModuleGraphs`` of a module, or None."""
    return _GRAPHS.get(module)


def graph_state(model: nn.Module) -> dict[str, list[Kind]]:
    """Returns path -> list of :class:`Kind` for every module of ``model`` that has graphs: the calls seen, recorded and
    replayed, the bytes that it holds, or why it is not recorded.
    """
    found = {path: graphs for path, module in model.named_modules() if (graphs := of(module)) is not None}
    for graphs in found.values():
        for key, used in graphs.used.items():
            kind = graphs.kinds[key]
            kind.filling = int(used) / (kind.replayed * (graphs.options.frames or 1))
    return {path: list(graphs.kinds.values()) for path, graphs in found.items()}


@functools.cache
def replaying(forward: Forward, name: str = "") -> Forward:
    """Returns ``forward(module, *args, **kwargs)`` with its calls replayed where the module has graphs. There is one
    wrapper of a function and name, by which it is recognised.
    """

    @functools.wraps(forward)
    def replay(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # torch.compile would guard every key of _GRAPHS, of which some may be freed meanwhile.
        graphs = None if torch.compiler.is_compiling() else _GRAPHS.get(self)
        return forward(self, *args, **kwargs) if graphs is None else graphs(self, *args, **kwargs)

    return replay
