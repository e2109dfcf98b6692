# SPDX-License-Identifier: Apache-2.0
"""Saves and restores everything that a run changes: a model, random states and torch's global modes."""

import ctypes
import functools
import random
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.backends import ContextProp
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_flatten

from fastasr.swap.reach import TENSOR_HOOKS, Reach, np
from fastasr.swap.rule import upstream_class

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MT19937_BYTES = 624 * 4 + 4  # NumPy's generator: 624 words, and the number of used ones


class RandomState:
    """Python's, NumPy's and torch's random states, torch's on every device."""

    def __init__(self) -> None:
        self.python = random.getstate()
        self.numpy = _numpy_state()
        self.cpu = torch.get_rng_state()
        initialised = torch.cuda.is_available() and torch.cuda.is_initialized()
        self.cuda = torch.cuda.get_rng_state_all() if initialised else []

    def restore(self) -> None:
        random.setstate(self.python)
        if _numpy_state() is not self.numpy:
            _forget_numpy_state()
            np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RandomState)
            and self.python == other.python
            and _same_numpy_state(self.numpy, other.numpy)
            and torch.equal(self.cpu, other.cpu)
            and len(self.cuda) == len(other.cuda)
            and all(torch.equal(a, b) for a, b in zip(self.cuda, other.cuda, strict=True))
        )


# NumPy takes 45 us to return the state of its global generator, and 40 to set it, which is longer than many a module
# runs. Reading its memory takes 1 us and shows whether the generator was used in between. Only a normal number that was
# drawn in advance is not in that memory.
_numpy_read: tuple[bytes | None, Any] = None, None  # the memory when the state was last read, and the state


def _numpy_state() -> Any:
    """Returns the state of NumPy's global generator: the same object again if it has not been used since."""
    global _numpy_read
    if np is None:
        return None
    generator = np.random.mtrand._rand._bit_generator
    memory = None
    if isinstance(generator, np.random.MT19937):
        memory = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
    if memory is None or memory != _numpy_read[0] or _numpy_read[1]["has_gauss"]:
        _numpy_read = memory, np.random.get_state(legacy=False)
    return _numpy_read[1]


def _forget_numpy_state() -> None:
    global _numpy_read
    _numpy_read = None, None


def _same_numpy_state(a: Any, b: Any) -> bool:
    if a is b:
        return True
    mine, theirs = tree_flatten(a)[0], tree_flatten(b)[0]
    return len(mine) == len(theirs) and all(np.array_equal(x, y) for x, y in zip(mine, theirs, strict=True))


class TorchModes:
    """Torch's global modes. A module whose forward raises an error may leave one set."""

    def __init__(self) -> None:
        self.saved = [(get, put, get()) for get, put in _modes()]

    def restore(self) -> None:
        for get, put, value in self.saved:
            if get() != value:
                put(value)


@functools.cache
def _modes() -> tuple[tuple[Callable, Callable], ...]:
    """Returns pairs of functions (get, put), one pair per mode."""
    return tuple(_pairs())


def _pairs() -> Iterator[tuple[Callable, Callable]]:
    yield torch.is_grad_enabled, torch._C._set_grad_enabled
    yield torch.get_default_dtype, torch.set_default_dtype
    yield _default_device, torch.set_default_device
    yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield torch.get_num_threads, torch.set_num_threads
    yield torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
    accelerator = torch.accelerator.current_accelerator()
    for device in {"cpu", "cpu" if accelerator is None else accelerator.type}:
        for get, put in (
            (torch.is_autocast_enabled, torch.set_autocast_enabled),
            (torch.get_autocast_dtype, torch.set_autocast_dtype),
        ):
            yield functools.partial(get, device), functools.partial(put, device)
    yield (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda value: torch.set_anomaly_enabled(*value),
    )
    yield (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    )
    for backend in list(vars(torch.backends).values()):
        for name, flag in vars(type(backend)).items() if isinstance(backend, types.ModuleType) else ():
            # Reading allow_tf32 raises an error where fp32_precision was set in its place.
            if isinstance(flag, ContextProp) and name != "allow_tf32":
                yield functools.partial(getattr, backend, name), functools.partial(setattr, backend, name)


def _default_device() -> torch.device | None:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


class ModelState:
    """The state of the world in which a model runs, as it was when this object was made. ``restore`` brings it back any
    number of times, and so does the end of the context.

    The state is everything that :class:`Reach` finds from ``roots``, such as a model and its inputs; for each tensor
    its values to the bit, memory, ``requires_grad``, ``grad`` and hooks; random states; and torch's modes. A module may
    change any of them in its forward, and in ``train`` and ``eval``, where adapters write to the weights. Tensors that
    have not changed are not written, so their versions, by which autograd and copies of weights know them, stay.

    whole: the state of the model of which ``roots`` are parts. Values that have not changed from it share its copies,
        so that there is one copy of every parameter, and it restores the modules of other parts of the model.
    """

    def __init__(self, *roots: object, whole: "ModelState | None" = None) -> None:
        own = {id(part) for root in roots if isinstance(root, torch.nn.Module) for part in root.modules()}
        self.registered: set[int] = own if whole is None else whole.registered
        # A module that FSDP2 wraps has whole parameters while it runs and later, until something shards them again.
        running = None if own == self.registered else roots[0]
        self.sharded = [m for m in _fsdp_modules(roots) if m is not running]
        self._shard()
        hooks = [held for name, held in vars(torch_module).items() if name.startswith("_global_")]
        known = {} if whole is None else whole.tensors
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            self.reach = Reach((*roots, *hooks), self.registered - own)
            self.tensors: dict[int, _TensorState] = {
                id(t): _TensorState(t, known.get(id(t))) for t in self.reach.tensors
            }
        self.modes, self.random = TorchModes(), RandomState()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.restore()
        except BaseException:  # a KeyboardInterrupt, for example, must leave nothing half restored
            self.restore()
            raise

    def restore(self) -> None:
        self._shard()
        self.reach.restore()
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            for state in self.tensors.values():
                state.restore()
        self.modes.restore()
        self.random.restore()

    def _shard(self) -> None:
        for module in self.sharded:
            module.reshard()


def _fsdp_modules(roots: Iterable[object]) -> list[Any]:
    parts = (part for root in roots if isinstance(root, torch.nn.Module) for part in root.modules())
    return [part for part in parts if upstream_class(part) is not type(part)]


class _TensorState:
    """One tensor. ``known``: its state at an earlier time, whose copy serves here too if the values are the same."""

    __slots__ = ("bits", "data", "grad", "hooks", "leaf", "requires_grad", "saved", "tensor", "version")

    def __init__(self, tensor: Tensor, known: "_TensorState | None") -> None:
        self.tensor, self.data, self.leaf = tensor, tensor.data, tensor.is_leaf
        self.requires_grad = tensor.requires_grad
        self.grad = tensor.grad if self.leaf else None
        self.hooks = [getattr(tensor, name) for name in TENSOR_HOOKS]
        self.version = None if tensor.is_inference() else tensor._version
        self.bits = _bits(self.data)
        self.saved: Any = None
        if self.bits is not None:
            if known is not None and _same(self.bits, known.saved):
                self.saved = known.saved
            else:
                self.saved = self.bits.clone()

    def restore(self) -> None:
        tensor, data = self.tensor, self.data
        if self.bits is not None and not _is_freed(self.bits):
            moved = tensor.dtype is not data.dtype or tensor.device != data.device
            if moved or not tensor.is_set_to(data):
                tensor.data = data
            if not torch.equal(self.bits, self.saved):
                with torch.inference_mode(self.bits.is_inference()):
                    self.bits.copy_(self.saved)
                # Code that saw the change by the version must see its end, and no other code.
                if self.version is not None and tensor._version != self.version:
                    increment_version(tensor)
        if not self.leaf:
            return
        if not tensor.is_leaf:
            tensor.detach_()
        if tensor.requires_grad is not self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if tensor.grad is not self.grad:
            tensor.grad = self.grad
        for name, hooks in zip(TENSOR_HOOKS, self.hooks, strict=True):
            if getattr(tensor, name) is not hooks:
                setattr(tensor, name, hooks)


def _bits(data: Tensor) -> Tensor | None:
    """Returns the tensor's memory as integers, which are equal to the bit even where values are NaN, or None if it has
    no memory of its own."""
    if (
        type(data) is not torch.Tensor
        or data.layout is not torch.strided
        or data.is_meta
        or data.is_quantized
    ):
        return None
    if _is_freed(data):
        return None
    if 0 in data.stride():  # Of an expanded tensor, take each element once.
        sizes = [1 if step == 0 else size for size, step in zip(data.shape, data.stride(), strict=True)]
        data = data.as_strided(sizes, data.stride()) if data.numel() else data
    if data.is_complex():
        data = torch.view_as_real(data.conj() if data.is_conj() else data)
    size, offset = data.element_size(), data.storage_offset()
    if data.is_contiguous() and not (data.numel() * size % 8 or offset * size % 8):
        return data.view(-1).view(torch.int64)  # Comparing 64-bit integers takes half of the time.
    return data.view(_INTEGERS[size])


def _is_freed(data: Tensor) -> bool:
    """Says whether FSDP has given the memory back, which it fills anew when the parameter is whole."""
    return not data.untyped_storage().nbytes() and data.numel() > 0


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.dtype is b.dtype and a.device == b.device and torch.equal(a, b)
