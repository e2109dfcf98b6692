# SPDX-License-Identifier: Apache-2.0
"""The memories of an emulated GPU: the tensors of a launch, and the shared memory of its programs."""

import ctypes

import numpy as np

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON = 0xFF  # bytes that nobody has written: NaN in every float format


class Fault(AssertionError):
    """What a GPU would answer with an illegal address, a misaligned address, or garbage."""


def _check_aligned(addresses: np.ndarray, width: int, access: str) -> None:
    if (addresses & addresses.dtype.type(width - 1)).any():
        raise Fault(f"{access} of {width} bytes is not aligned")


class Global:
    """Storages, as (address, bytes), that a launch may touch."""

    def __init__(self, storages: list[tuple[int, int]]):
        storages = sorted({s for s in storages if s[1]})
        self.begins = np.array([begin for begin, _ in storages], dtype=np.uint64)
        self.ends = [begin + size for begin, size in storages]
        self.bytes = [
            np.frombuffer((ctypes.c_uint8 * size).from_address(begin), np.uint8) for begin, size in storages
        ]
        for array in self.bytes:
            array.flags.writeable = True
        self.views = {}

    def _parts(self, addresses: np.ndarray, width: int):
        """Yields (storage, which of the addresses) for 1-d addresses."""
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        number = int(np.searchsorted(self.begins, np.uint64(low), "right")) - 1
        if number >= 0 and high + width <= self.ends[number]:
            yield number, slice(None)
            return
        numbers = np.searchsorted(self.begins, addresses, "right").astype(np.int64) - 1
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            if number < 0 or int(addresses[here].max()) + width > self.ends[number]:
                far = int(addresses[here].max()) - (self.ends[number] if number >= 0 else 0)
                raise Fault(f"an access of {width} bytes ends {far + width} bytes behind a tensor")
            yield number, here

    def _view(self, number: int, size: int) -> np.ndarray:
        found = self.views.get((number, size))
        if found is None:
            whole = self.bytes[number]
            begin = int(self.begins[number])
            if begin % size:
                raise Fault(f"a storage begins at {begin % size} behind a multiple of {size}")
            found = self.views[number, size] = whole[: whole.size // size * size].view(WORDS[size])
        return found

    def load(self, addresses: np.ndarray, size: int, count: int) -> np.ndarray:
        """Returns [count, n] words of ``size`` bytes from n addresses."""
        width = size * count
        _check_aligned(addresses, width, "a load")
        out = np.empty((count, addresses.size), WORDS[size])
        for number, here in self._parts(addresses, width):
            view = self._view(number, size)
            places = (addresses[here] - self.begins[number]) // np.uint64(size)
            for i in range(count):
                out[i, here] = view[places + np.uint64(i)]
        return out

    def store(self, addresses: np.ndarray, values: list[np.ndarray], size: int) -> None:
        width = size * len(values)
        _check_aligned(addresses, width, "a store")
        for number, here in self._parts(addresses, width):
            view = self._view(number, size)
            places = (addresses[here] - self.begins[number]) // np.uint64(size)
            for i, value in enumerate(values):
                view[places + np.uint64(i)] = value[here]


class Shared:
    """The shared memory of ``programs`` programs, ``size`` bytes each."""

    def __init__(self, programs: int, size: int):
        self.size = size
        self.bytes = np.full((programs, -(-size // 16) * 16), POISON, np.uint8)
        self.views = {n: self.bytes.view(WORDS[n]) for n in WORDS}

    def load(self, programs: np.ndarray, addresses: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        self._check(addresses, size * count)
        view, places = self.views[size], addresses // np.uint32(size)
        return [view[programs, places + np.uint32(i)] for i in range(count)]

    def store(self, programs: np.ndarray, addresses: np.ndarray, values: list[np.ndarray], size: int) -> None:
        self._check(addresses, size * len(values))
        view, places = self.views[size], addresses // np.uint32(size)
        for i, value in enumerate(values):
            view[programs, places + np.uint32(i)] = value

    def _check(self, addresses: np.ndarray, width: int) -> None:
        _check_aligned(addresses, width, "an access to shared memory")
        if addresses.size and int(addresses.max()) + width > self.size:
            raise Fault("an access outside of shared memory")
