# SPDX-License-Identifier: Apache-2.0
"""A recorder without a GPU: a tape of torch's operator calls stands for the CUDA graph.

As in a graph, no Python runs in a replay: every call of an operator is repeated on the tensors of the recording, and
what it gives is written to the tensors that it gave then. So whatever the recorded code read from Python is frozen, and
whatever it read from tensors is read again. Recording raises :class:`Waits` where a GPU would have to wait for the host
to see a value, and notes each tensor from outside that was read. As in a capture, nothing has changed afterwards:
generators and tensors that were written to are put back. A graph keeps no tensor from outside, and a replay fails if
nothing but the tape keeps one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fastasr._recording import Recording, recorded_by, storage_of, tensors_in

_WAITS = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::is_nonzero", "aten::unique_dim", "aten::_unique2", "aten::unique_consecutive", "aten::count_nonzero.none",
    "aten::repeat_interleave.Tensor", "aten::_assert_async",
}  # fmt: skip
_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
# operator -> the arguments that it writes to, which its schema does not mark
_STATISTICS = {"native_batch_norm": (3, 4), "_native_batch_norm_legit": (3, 4)}


T = TypeVar("T")


class Waits(RuntimeError):
    """A GPU would wait for the host here, which a CUDA graph cannot record."""


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[OpOverload, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        # storage -> a tensor that has it; and in the last one also the values that it had
        self.made: dict[int, Tensor] = {}
        self.read: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: Counter[int] = Counter()  # storage -> how many tensors of the tape have it

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        if name in _WAITS or str(function) in _WAITS:
            raise Waits(f"{name} shows a value to the host")
        if name == "aten::_to_copy" and _to_other_device(args[0], kwargs):
            raise Waits(f"a copy from {args[0].device} to {kwargs['device']}")
        taken = {storage_of(t): t for t in tensors_in((args, kwargs))}
        written = self._written(function, args, kwargs)
        self.read |= {
            key: _same(t) for key, t in taken.items() if key not in self.made and key not in self.read
        }
        for t in written:
            if storage_of(t) not in self.made and storage_of(t) not in self._before:
                self._before[storage_of(t)] = (
                    _same(t),
                    torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).clone(),
                )
        found = function(*args, **kwargs)
        results = tensors_in(found)
        new = [t for t in results if storage_of(t) not in taken]
        self.made |= {storage_of(t): _same(t) for t in new}
        short = name.split("::")[1]
        if short in _EMPTY:
            return found
        if new or written:
            self.calls.append((function, _kept(args), _kept(kwargs), _kept(results)))
        return found

    def _written(self, function: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        schema = function._schema
        found = [
            a for a, s in zip(args, schema.arguments, strict=False) if s.alias_info and s.alias_info.is_write
        ]
        found += [
            kwargs[s.name]
            for s in schema.arguments
            if s.alias_info and s.alias_info.is_write and s.name in kwargs
        ]
        places = _STATISTICS.get(schema.name.split("::")[1], ())
        found += [args[i] for i in places if i < len(args) and args[i] is not None]
        return tensors_in(found)

    def _alone(self, key: int) -> bool:
        """Says whether the tape alone keeps a storage, beside the Python object that ``storage_of`` made of it."""
        return torch._C._storage_Use_Count(key) <= self._own[key] + 1

    def undo(self) -> None:
        """Puts tensors from outside back. Tensors made while recording become NaN, because a capture computes
        nothing."""
        with torch.no_grad():
            for t in self.made.values():
                if t.is_floating_point():
                    torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage()).fill_(
                        float("nan")
                    )
            for t, before in self._before.values():
                torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).copy_(before)
        kept = [(args, kwargs, results) for _, args, kwargs, results in self.calls]
        self._own.update(map(storage_of, tensors_in([kept, self.made, self.read, [*self._before.values()]])))

    @torch.no_grad()
    def replay(self) -> None:
        # A number of Python is a tensor without dimensions here, which a launch takes by its value.
        lost = [t.shape for key, t in self.read.items() if t.dim() and self._alone(key)]
        if lost:
            raise AssertionError(f"a graph reads tensors that nothing keeps: {lost}")
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, results in self.calls:
                for t, again in zip(results, tensors_in(function(*args, **kwargs)), strict=True):
                    if t.numel() and t.data_ptr() != again.data_ptr():
                        t.copy_(again)


def _same(t: Tensor) -> Tensor:
    """Returns a tensor of the same memory. A graph knows addresses alone: it keeps neither views nor their bases."""
    return torch.ops.aten.detach.default(t)


def _kept(value: Any) -> Any:
    """Returns a copy of an operator's arguments or results, with tensors of the same memory."""
    if isinstance(value, Tensor):
        return _same(value)
    if isinstance(value, dict):
        return {name: _kept(part) for name, part in value.items()}
    return type(value)(map(_kept, value)) if isinstance(value, (list, tuple)) else value


def _to_other_device(t: Tensor, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type != t.device.type


class TapeRecorder:
    """Records passes as tapes; ``tapes`` holds them."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def rehearse(self, function: Callable[[], object]) -> None:
        state = torch.get_rng_state()
        try:
            function()
        finally:
            torch.set_rng_state(state)

    def record(self, function: Callable[[], T], recording: Recording) -> tuple[Callable[[], None], T]:
        tape, state = Tape(), torch.get_rng_state()
        try:
            with recorded_by(recording if recording.back is not None else None), tape:
                found = function()
        finally:
            tape.undo()
            torch.set_rng_state(state)
        self.tapes.append(tape)
        return tape.replay, found
