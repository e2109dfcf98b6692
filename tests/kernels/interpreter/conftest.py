# SPDX-License-Identifier: Apache-2.0
"""These tests need Triton in interpreter mode, which is fixed when triton is imported: test_interpreter.py, one folder
up, runs them in a process with TRITON_INTERPRET=1. Other processes collect none of them.
"""

import ctypes
import importlib.util
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None

if INTERPRETING:
    sys.path.insert(0, str(Path(__file__).parent))
    import repair
    from triton.runtime import interpreter
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """Silences numpy: NaN and infinity are inputs here, not accidents."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def rounding():
    """Returns the repaired conversions, for tests of the repair itself."""
    return repair


def _guard(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy whose last byte is the last before a page that faults when touched."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    room = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + room), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    buffer = (ctypes.c_uint8 * size).from_address(start + room - size)
    copy = torch.frombuffer(buffer, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    copy.memory = memory  # lives as long as the tensor
    return copy


@pytest.fixture
def guarded():
    return _guard


class Writes:
    """Records the addresses stored to, by program; ``clashes`` counts those stored twice, by one program
    or by two.
    """

    def __init__(self):
        self.launches: list[list[np.ndarray]] = [[]]

    def record(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        self.launches[-1].append(np.asarray(pointers)[np.asarray(mask, dtype=bool)].reshape(-1))

    @property
    def clashes(self) -> int:
        total = 0
        for stores in self.launches:
            addresses = np.concatenate(stores) if stores else np.zeros(0, np.uint64)
            total += addresses.size - np.unique(addresses).size
        return total

    @property
    def count(self) -> int:
        return sum(store.size for stores in self.launches for store in stores)


@pytest.fixture
def writes(monkeypatch):
    """Records every store of the kernels that a test launches; all stores of a launch must go to
    different addresses.
    """
    found = Writes()
    store, launch = interpreter.InterpreterBuilder.create_masked_store, interpreter.GridExecutor.__call__

    def recording_store(self, pointers, value, mask, *options):
        found.record(*np.broadcast_arrays(pointers.data, mask.data))
        return store(self, pointers, value, mask, *options)

    def recording_launch(self, *arguments, **options):
        found.launches.append([])
        return launch(self, *arguments, **options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", recording_store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recording_launch)
    return found
