# SPDX-License-Identifier: Apache-2.0
"""Checks what every interpreted launch does to memory: a kernel touches only the tensors it was given, stores to no
address twice, and loads nothing that it has stored before its next barrier, because another thread may have stored it.
``test_detectors.py`` tells whether it still notices.
"""

from bisect import bisect_right
from functools import cache

import numpy as np
import torch
from triton.runtime import interpreter

# A program may store to these again, in the order of its own stores; two programs may not.
AGAIN = {
    # the state after a step replaces that before it, where one program computes all steps
    "layer_norm_lstm": ("RECURRENT", "HIDDEN", "CELL", "DHIDDEN", "DCELL"),
    # the last column of a block of frames replaces that of the block before
    "rnnt_lattice": ("COLUMN",),
}


class Launch:
    """The memory of one launch: the storages of the tensors that it was given."""

    def __init__(self, kernel, tensors: dict[str, torch.Tensor]):
        self.kernel = kernel.__name__
        may = AGAIN.get(kernel.__module__.rpartition(".")[2], ())
        spans = {}
        for name, t in tensors.items():
            storage = t.untyped_storage()
            if storage.nbytes():
                again = spans.get(storage.data_ptr(), (0, True))[1] and name in may
                spans[storage.data_ptr()] = storage.data_ptr() + storage.nbytes(), again
        self.begins = sorted(spans)
        self.ends = [spans[begin][0] for begin in self.begins]
        self.again = [spans[begin][1] for begin in self.begins]
        self.stores, self.twice = 0, 0
        self.stored = {}  # number of a storage: by byte, 1 + the program that stored an element there
        self.program, self.recent = (
            -1,
            {},
        )  # number of a storage: what this program has stored since its last barrier

    def _touched(self, what: str, pointers: np.ndarray, mask: np.ndarray, size: int):
        """Returns (number of the storage, addresses) of one load or store; None if the mask leaves nothing."""
        addresses = pointers if mask.all() else pointers[mask.astype(bool, copy=False)]
        if not addresses.size:
            return None
        low, high = int(addresses.min()), int(addresses.max())
        number = bisect_right(self.begins, low) - 1
        if number < 0 or high + size > self.ends[number]:
            raise AssertionError(f"{self.kernel} {what} outside of the tensors that it was given")
        return number, addresses

    def load(self, pointers: np.ndarray, mask: np.ndarray, size: int, program: int) -> None:
        touched = self._touched("loads", pointers, mask, size)
        if touched is None or program != self.program or touched[0] not in self.recent:
            return
        if np.isin(touched[1], np.concatenate(self.recent[touched[0]])).any():
            raise AssertionError(f"{self.kernel} loads what it has stored, without a barrier in between")

    def barrier(self) -> None:
        self.recent = {}

    def store(self, pointers: np.ndarray, mask: np.ndarray, size: int, program: int) -> None:
        touched = self._touched("stores", pointers, mask, size)
        if touched is None:
            return
        number, addresses = touched
        if program != self.program:
            self.program, self.recent = program, {}
        self.recent.setdefault(number, []).append(addresses)
        begin = self.begins[number]
        if number not in self.stored:
            self.stored[number] = np.zeros(self.ends[number] - begin, dtype=np.int32)
        stored, places = self.stored[number], (addresses - np.uint64(begin)).astype(np.int64)
        if self.again[number]:
            before = stored[places]
            self.twice += int(((before != 0) & (before != program + 1)).sum())
        else:
            self.stores += places.size
        stored[places] = program + 1

    def finish(self) -> None:
        once = [places for number, places in self.stored.items() if not self.again[number]]
        self.twice += self.stores - sum(int(np.count_nonzero(places)) for places in once)
        if self.twice:
            raise AssertionError(
                f"{self.kernel} stores to {self.twice} addresses that it has stored to before"
            )


_launch: Launch | None = None


def _watch(builder: type, executor: type) -> None:
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    barrier = builder.create_barrier

    def watched_load(self, pointers, mask, *rest):
        if _launch is not None:
            _launch.load(pointers.data, mask.data, _size(pointers), _program(self))
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        if _launch is not None:
            _launch.store(pointers.data, mask.data, _size(pointers), _program(self))
        return store(self, pointers, value, mask, *rest)

    def watched_barrier(self):
        if _launch is not None:
            _launch.barrier()
        return barrier(self)

    def watched_launch(self, *arguments, **options):
        global _launch
        given = dict(zip(self.arg_names, arguments, strict=False)) | options
        _launch = Launch(self.fn, {n: t for n, t in given.items() if isinstance(t, torch.Tensor)})
        try:
            launch(self, *arguments, **options)
            _launch.finish()
        finally:
            _launch = None

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_barrier = watched_barrier
    executor.__call__ = watched_launch


def _program(builder) -> int:
    (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
    return (x * height + y) * depth + z


def _size(pointers) -> int:
    return pointers.get_element_ty().primitive_bitwidth // 8 or 1


@cache
def install() -> None:
    _watch(interpreter.InterpreterBuilder, interpreter.GridExecutor)
