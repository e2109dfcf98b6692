# SPDX-License-Identifier: Apache-2.0
"""Checks what every interpreted launch does to memory: a kernel touches only the tensors that it was given, itself or
in a table of jobs, and of two accesses to one address one is ordered before the other, unless both are loads or both
are atomics.

Within a program, what comes before a barrier is ordered before what follows it. Among programs, if an atomic acquires
what another one has released, all before the last barrier in front of the release is ordered before all behind the
next barrier after the acquisition. Beyond that, a load is ordered before a later store of the same program if both are
of the same element of tiles of one shape, since one thread does both. A tile with fewer elements than the program has
threads gives no such order, since several warps load an element and one stores it.

The check follows this order and not that in which the interpreter happens to run the programs, so it finds a race in
every run. ``test_detectors.py`` tells whether it still does.
"""

import math
from bisect import bisect_right
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from triton._C.libtriton import ir
from triton.runtime import interpreter

from fastasr.kernels import _jobs
from tests.kernels import job_tables
from tests.kernels.interpreter.turns import Turns

# A program loads these and then replaces them, without a barrier in between. Either what it stores comes out of a scan
# or reduction to which each thread brings what it has loaded, or a thread that loads late does nothing with it.
REPLACED = {
    "layer_norm_lstm": ("CELL", "DCELL"),
    "clamped_linear": ("Z", "Y"),
    "linear_activation": ("Z", "Y"),
    "rnnt_lattice": ("COLUMN",),
}

LOAD, STORE, ATOMIC = range(3)
VERBS = "loads", "stores", "updates"
ACQUIRE, RELEASE, BOTH = ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE


class Access(NamedTuple):
    kind: int
    program: int
    epoch: int  # how many barriers of the program came before
    seen: np.ndarray | None  # by program, its last epoch that is ordered before this access
    pointers: np.ndarray
    mask: np.ndarray | None  # None if it hides nothing
    size: int  # bytes of an element

    def places(self, begin: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places of a storage, in ``unit`` bytes, that are touched, and the elements that touch them."""
        elements = np.arange(self.pointers.size) if self.mask is None else np.flatnonzero(self.mask)
        places = (self.pointers.reshape(-1)[elements] - np.uint64(begin)).astype(np.int64) // unit
        parts = self.size // unit
        if parts > 1:
            places, elements = (places[:, None] + np.arange(parts)).reshape(-1), elements.repeat(parts)
        return places, elements


class Launch:
    """The accesses of one launch to the storages of the tensors that it was given."""

    def __init__(self, kernel, tensors: dict[str, torch.Tensor], warps: int):
        self.kernel, self.tensors, self.warps = kernel.__name__, tensors, warps
        self.replaced = REPLACED.get(kernel.__module__.rpartition(".")[2], ())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
        self.begins = sorted(begin for begin, size in storages.items() if size)
        self.ends = [begin + storages[begin] for begin in self.begins]
        self.accesses = [[] for _ in self.begins]
        self.written = set()  # numbers of storages
        self.turns: Turns | None = None  # if programs run at the same time
        # By program: its barriers so far, what is ordered before its accesses, and before those after its next barrier.
        self.epochs, self.seen, self.acquired = {}, {}, {}
        self.released = {}  # by address of an atomic
        self.polled = {}  # by program: address and result of its last atomic, if it has touched nothing since

    def touch(self, kind: int, pointers: np.ndarray, mask: np.ndarray, size: int, program: int) -> None:
        whole = mask.all()
        addresses = pointers if whole else pointers[mask.astype(bool, copy=False)]
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        number = bisect_right(self.begins, low) - 1
        if number < 0 or high + size > self.ends[number]:
            raise AssertionError(f"{self.kernel} {VERBS[kind]} outside of the tensors that it was given")
        epoch, seen = self.epochs.get(program, 0), self.seen.get(program)
        self.accesses[number].append(
            Access(kind, program, epoch, seen, pointers, None if whole else mask, size)
        )
        if kind != LOAD:
            self.written.add(number)
        if kind != ATOMIC:
            self.polled.pop(program, None)

    def barrier(self, program: int) -> None:
        self.epochs[program] = self.epochs.get(program, 0) + 1
        if program in self.acquired:
            self.seen[program] = self.acquired.pop(program)

    def atomic(self, address: int, order, result, changed: bool, program: int, programs: int) -> None:
        """Notes what an atomic on one element orders, and lets other programs go on. A program that does nothing but
        repeat an atomic with the same result waits until another program's atomic changes memory.
        """
        nothing = np.full(programs, -1)
        before = self.acquired.get(program, self.seen.get(program, nothing))
        there = self.released.get(address, nothing)
        if order in (RELEASE, BOTH):
            self.released[address] = np.maximum(there, before)
            self.released[address][program] = self.epochs.get(program, 0) - 1
        if order in (ACQUIRE, BOTH):
            self.acquired[program] = np.maximum(there, before)
        waits = not changed and self.polled.get(program) == (address, result)
        self.polled[program] = address, result
        if self.turns is not None:
            self.turns.hand_over(waits, changed)
        elif waits:
            raise AssertionError(
                f"{self.kernel}: program {program} waits for programs that may not be running"
            )

    def finish(self) -> None:
        for number in self.written:
            accesses, begin = self.accesses[number], self.begins[number]
            unit = min(access.size for access in accesses)
            if all(access.kind == STORE for access in accesses):  # most outputs
                places = np.sort(np.concatenate([access.places(begin, unit)[0] for access in accesses]))
                if (places[1:] != places[:-1]).all():
                    continue
            self._check(accesses, begin, unit)

    def _check(self, accesses: list[Access], begin: int, unit: int) -> None:
        """Compares each access to a place with the last store to it, and each load with the next store. If they are
        ordered, so are all others.
        """
        found = [access.places(begin, unit) for access in accesses]
        kinds = np.array([access.kind for access in accesses])
        index = np.arange(len(accesses)).repeat([places.size for places, _ in found])
        places, elements = (np.concatenate(parts) for parts in zip(*found, strict=True))
        stored = np.zeros(int(places.max()) + 1, dtype=bool)
        stored[places[kinds[index] != LOAD]] = True
        kept = np.flatnonzero(stored[places])
        kept = kept[np.argsort(places[kept], kind="stable")]
        index, places, elements = index[kept], places[kept], elements[kept]
        here, writes = np.arange(kept.size), kinds[index] != LOAD
        last = np.maximum.accumulate(np.where(writes, here, -1))[:-1]
        after = np.minimum.accumulate(np.where(writes, here, kept.size - 1)[::-1])[::-1]
        a, b = np.concatenate((last, here)), np.concatenate((here[1:], after))
        pairs = np.flatnonzero((a >= 0) & (a < b) & (places[a] == places[b]) & (writes[a] | writes[b]))
        a, b = a[pairs], b[pairs]
        names = [name for name, t in self.tensors.items() if t.untyped_storage().data_ptr() == begin]
        replaced = all(name in self.replaced for name in names)
        races = np.flatnonzero(
            self._unordered(accesses, index[a], index[b], elements[a] == elements[b], replaced)
        )
        if races.size:
            first = races[np.argmin(index[b[races]])]
            one, other = accesses[index[a[first]]], accesses[index[b[first]]]
            address = begin + int(places[a[first]]) * unit
            start, name = max((p, n) for n in names if (p := self.tensors[n].data_ptr()) <= address)
            raise AssertionError(
                f"{self.kernel}: nothing orders two accesses to {name}[{(address - start) // one.size}]: "
                f"program {one.program} {VERBS[one.kind]}, then program {other.program} {VERBS[other.kind]} "
                f"({races.size} such pairs)"
            )

    def _unordered(self, accesses, a, b, same_element, replaced: bool) -> np.ndarray:
        """Says which accesses a are not ordered before the accesses b, which ran later."""
        kind, program, epoch = (np.array([access[i] for access in accesses]) for i in range(3))
        shapes = {}
        tile = np.array([shapes.setdefault(access.pointers.shape, len(shapes)) for access in accesses])
        least = 32 * self.warps if self.warps > 1 else 0
        wide = np.array([access.pointers.size >= least for access in accesses])
        same = program[a] == program[b]
        unordered = ~same | (epoch[a] == epoch[b])
        unordered &= (kind[a] != ATOMIC) | (kind[b] != ATOMIC)
        one_thread = same_element & (tile[a] == tile[b]) & wide[a]
        unordered &= ~(same & (kind[a] == LOAD) & (kind[b] == STORE) & (replaced | one_thread))
        seen = [access.seen for access in accesses]
        if any(row is not None for row in seen):
            nothing = np.full(max(row.size for row in seen if row is not None), -1)
            table = np.stack([nothing if row is None else row for row in seen])
            unordered &= same | (epoch[a] > table[b, program[a]])
        return unordered


_launch: Launch | None = None


def _watch(builder: type, executor: type) -> None:
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    barrier, update, exchange = builder.create_barrier, builder.create_atomic_rmw, builder.create_atomic_cas

    def watched_load(self, pointers, mask, *rest):
        if _launch is not None:
            _launch.touch(LOAD, pointers.data, mask.data, _size(pointers), _program(self))
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        if _launch is not None:
            _launch.touch(STORE, pointers.data, mask.data, _size(pointers), _program(self))
        return store(self, pointers, value, mask, *rest)

    def watched_barrier(self):
        if _launch is not None:
            _launch.barrier(_program(self))
        return barrier(self)

    def watched_atomic(self, act, pointers, mask, order, scope):
        if _launch is None:
            return act()
        program = _program(self)
        _launch.touch(ATOMIC, pointers.data, mask, _size(pointers), program)
        before = _values(pointers, mask)
        result = act()
        after = _values(pointers, mask)
        if scope == ir.MEM_SYNC_SCOPE.CTA or mask.size > 1:
            order = ir.MEM_SEMANTIC.RELAXED
        changed = bool((before != after).any())
        address, programs = int(pointers.data.flat[0]), math.prod(self.grid_dim)
        _launch.atomic(address, order, result.data.tobytes(), changed, program, programs)
        return result

    def watched_update(self, operation, pointers, value, mask, order, scope):
        act = partial(update, self, operation, pointers, value, mask, order, scope)
        return watched_atomic(self, act, pointers, mask.data, order, scope)

    def watched_exchange(self, pointers, compared, value, order, scope):
        act = partial(exchange, self, pointers, compared, value, order, scope)
        return watched_atomic(self, act, pointers, np.ones_like(pointers.data, dtype=bool), order, scope)

    def watched_launch(self, *arguments, **options):
        global _launch
        given = dict(zip(self.arg_names, arguments, strict=False)) | options
        tensors = {n: t for n, t in given.items() if isinstance(t, torch.Tensor)}
        if "JOBS" in tensors:
            tensors |= job_tables.tensors(given["JOBS"])
        _launch = Launch(self.fn, tensors, options.get("num_warps", 4))
        try:
            if options.get("launch_cooperative_grid"):
                _launch.turns = Turns(self, arguments, options)
                _launch.turns.run()
            else:
                launch(self, *arguments, **options)
            _launch.finish()
        finally:
            _launch = None

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_atomic_rmw, builder.create_atomic_cas = watched_update, watched_exchange
    builder.create_barrier = watched_barrier
    executor.__call__ = watched_launch


def _values(pointers, mask: np.ndarray) -> np.ndarray:
    """Returns what is in memory: an interpreter's own load takes other arguments in each version of Triton."""
    dtype = interpreter._get_np_dtype(pointers.get_element_ty())
    return interpreter._interpreter.load(
        pointers.data, mask, np.zeros_like(pointers.data, dtype=dtype), dtype
    )


def _program(builder) -> int:
    (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
    return (x * height + y) * depth + z


def _size(pointers) -> int:
    return pointers.get_element_ty().primitive_bitwidth // 8 or 1


@cache
def install() -> None:
    _watch(interpreter.InterpreterBuilder, interpreter.GridExecutor)
    _jobs.row = partial(job_tables.row, make=_jobs.row)
