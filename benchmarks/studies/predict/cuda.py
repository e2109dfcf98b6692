# SPDX-License-Identifier: Apache-2.0
"""The kernels in CUDA C++: their launches, recorded from the launchers that nvcc compiles, and how often a warp runs
each of their instructions.

The line numbers that ptxas notes are made those of the blocks of the PTX (ptx.py), so every instruction of the SASS
tells its block. One thread stands for its warp.
"""

import bisect
import ctypes
import random
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastasr.benchmarks.studies.predict import ptx, sass
from fastasr.benchmarks.studies.predict.sass import Part
from fastasr.ops._dispatch import backend
from fastasr.testing import cuda_launchers

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
SOURCE = CSRC / "cuda" / "ema_scan.cu"
BUILT = {89: 80}  # of which architecture the library's code runs on a GPU that it is not compiled for
PROGRAMS = 2  # sampled from a grid, the last one and others
CALLED = ("_s64", "_u64")  # ends of subroutines that are always called; the others are slow paths
Listener = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
)


@dataclass
class Launch:
    """``memory`` has the first and last addresses of the tensors; ``cuts`` addresses at which pieces of them begin."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    parameters: bytes
    source: Path
    memory: list[tuple[int, int]] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)


def compiler() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _nvcc(*arguments: str | Path) -> None:
    if compiler() is None or not SOURCE.exists():
        raise LookupError("it takes nvcc and csrc/cuda")
    subprocess.run([compiler(), "-O3", "-std=c++17", f"-I{CSRC}", *map(str, arguments)], check=True)


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def build(source: Path) -> Path:
    """Compiles launchers so that :func:`listening` hears them."""
    target = Path(_folder().name) / f"{source.stem}.so"
    host = ("-arch=compute_80", "-code=compute_80", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC")
    _nvcc(*host, source, HERE / "recorder.cpp", "-o", target)
    return target


@cache
def _library() -> ctypes.CDLL:
    return cuda_launchers.load(build(SOURCE))


class _Memory(TorchDispatchMode):
    """Keeps the tensors of all operations inside the ``with`` block."""

    def __init__(self):
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.tensors += [t for t in tree_leaves((arguments, options, result)) if isinstance(t, torch.Tensor)]
        return result


@contextmanager
def listening(library: ctypes.CDLL, source: Path) -> Iterator[list[Launch]]:
    """Collects what a library launches inside the ``with`` block."""
    launches = []
    sizes = dict(re.findall(r"\b(\w+)_param_0\[(\d+)\]", _ptx(source, 80)))

    def listen(name: bytes, blocks: int, threads: int, shared: int, parameters: int) -> None:
        given = ctypes.string_at(parameters, int(sizes[name.decode()]))
        launches.append(Launch(name.decode(), (blocks, 1, 1), threads, shared, given, source))

    listener = Listener(listen)
    ctypes.c_void_p.in_dll(library, "fastasr_listener").value = ctypes.cast(listener, ctypes.c_void_p).value
    yield launches


def place(launches: list[Launch], tensors: list[torch.Tensor]) -> None:
    """Tells launches where the tensors lie that they may use."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    ranges = sorted((first, first + size) for first, size in found.items() if size)
    words = {w for launch in launches for w in _words(launch.parameters)} | {first for first, _ in ranges}
    cuts = sorted(w for w in words if any(first <= w < last for first, last in ranges))
    for launch in launches:
        launch.memory, launch.cuts = ranges, cuts


@contextmanager
def recording(op: str) -> Iterator[list[Launch]]:
    """Makes the op record its launches, on CPU tensors, inside the ``with`` block."""
    library = _library()
    with (
        listening(library, SOURCE) as launches,
        cuda_launchers.serving(library, op),
        backend("cuda"),
        _Memory() as memory,
    ):
        yield launches
    place(launches, memory.tensors)


def _words(parameters: bytes) -> tuple[int, ...]:
    return struct.unpack_from(f"<{len(parameters) // 8}Q", parameters)


@cache
def _ptx(source: Path, architecture: int) -> str:
    target = Path(_folder().name) / f"{source.stem}_{architecture}.ptx"
    _nvcc("-ptx", f"-arch=compute_{architecture}", source, "-o", target)
    return target.read_text()


@cache
def kernel(source: Path, architecture: int, name: str) -> ptx.Kernel:
    return ptx.parse(_ptx(source, architecture), name)


@cache
def cubin(source: Path, architecture: int, name: str) -> bytes:
    file = Path(_folder().name) / "kernel.ptx"
    file.write_text(kernel(source, architecture, name).text)
    _nvcc("-cubin", f"-arch=sm_{architecture}", "-lineinfo", file, "-o", file.with_suffix(".cubin"))
    return file.with_suffix(".cubin").read_bytes()


@cache
def _assembled(source: Path, architecture: int, name: str):
    """Returns the loops of the SASS, how many copies ptxas has made of each block, and the registers. Copies show by
    accesses to memory, which ptxas neither adds nor leaves out.
    """
    code = cubin(source, architecture, name)
    loops = sass.disassemble(code)
    accesses = Counter(i.place for loop in loops for i in loop.own if i.head in ("LDG", "STG", "LDS", "STS"))
    copies = {}
    for n, block in enumerate(kernel(source, architecture, name).blocks, 1):
        known = sum(i.parts[0] in ("ld", "st") and i.parts[1] in ("global", "shared") for i in block)
        copies[n] = max(1, round(accesses[n] / known)) if known else 1
    return loops, copies, sass.registers(code)


@cache
def _program(source: Path, architecture: int, name: str) -> ptx.Program:
    return ptx.Program(kernel(source, architecture, name))


def _pieces(launch: Launch, addresses: set[int]) -> int:
    """Returns the bytes of the pieces of memory with these addresses."""
    found = {}
    for at in addresses:
        last = next((last for first, last in launch.memory if at is not None and first <= at < last), None)
        if last is not None:
            n = bisect.bisect(launch.cuts, at)
            found[launch.cuts[n - 1]] = min([last, *launch.cuts[n : n + 1]]) - launch.cuts[n - 1]
    return sum(found.values())


def run(launch: Launch, architecture: int) -> tuple[list[Part], int, int]:
    """Returns the parts of a launch's program, its registers, and the bytes of the memory that it uses."""
    key = launch.source, BUILT.get(architecture, architecture), launch.name
    loops, copies, registers = _assembled(*key)
    draw = random.Random(0)
    places = {launch.grid[0] - 1, *(draw.randrange(launch.grid[0]) for _ in range(PROGRAMS - 1))}
    runs, addresses = [], set()
    for place in places:
        for first in range(0, launch.threads, 32):
            special = {"%tid.x": first, "%ntid.x": launch.threads}
            special |= {"%ctaid.x": place, "%nctaid.x": launch.grid[0]}
            counts, used = _program(*key).run(launch.parameters, special)
            runs.append({n: counts[n - 1] / copies[n] for n in copies})
            addresses |= used
    sizes = Counter(i.place for loop in loops for i in loop.own)
    longest = max(runs, key=lambda counts: sum(counts[n] * sizes[n] for n in counts))
    mean = {n: sum(counts[n] for counts in runs) / len(runs) for n in copies}
    calls = [i for loop in loops for i in loop.own if i.head == "CALL" and i.target.endswith(CALLED)]
    for counts in (mean, longest):
        for i in calls:  # a subroutine runs as often as the blocks that call it
            counts[i.target] = counts.get(i.target, 0) + counts[i.place]
    parts: dict[tuple, Part] = {}
    slow = {i.straight for loop in loops for i in loop.own if i.head == "CALL"} - {i.straight for i in calls}
    for n, loop in enumerate(loops):  # what runs equally often in a loop is one sequence
        for i in (i for i in loop.own if i.straight not in slow):
            part = parts.setdefault(
                (n, longest.get(i.place, 0), mean.get(i.place, 0)),
                Part([], mean.get(i.place, 0), longest.get(i.place, 0)),
            )
            part.own.append(i)
    return [part for part in parts.values() if part.mean], registers, _pieces(launch, addresses)
