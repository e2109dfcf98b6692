# SPDX-License-Identifier: Apache-2.0
"""The predicted time of a kernel's launch: its instructions by pipe, the latency of a warp, and its bytes.

A multiprocessor runs as many programs at once as registers and shared memory allow. Their time is that of the busiest
pipe or the latency of a warp, whichever is longer, and more where they are alike; a grid runs in waves of them. No
launch is faster than a copy of its arguments' bytes.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget

from fastasr.benchmarks.studies.predict import cuda, sass, torch_ops, trips
from fastasr.benchmarks.studies.predict.cards import Card
from fastasr.testing.fake_gpu import Launch

NORM = 4  # exponent with which the times of pipes and of the latency add up
UNROLLED = 32  # passes of a loop that the compiler may have unrolled altogether
FEATURES = {
    "mma": r"mma\.sync|wgmma\.mma_async|tcgen05\.mma",
    "load": r"ld\.global|cp\.async\.c[ga]",
    "store": r"st\.global",
    "exp": r"(?:ex2|lg2|rcp)\.approx",
    "barrier": r"bar(?:rier)?\.sync",
    "float": r"(?:fma|add|mul|sub)(?:\.rn)?(?:\.ftz)?\.(?:f32|f16|bf16)",
}
IN_TTIR = {"mma": "tt.dot", "load": "tt.load", "store": "tt.store", "exp": "math.exp2"}


def _ptx_loops(ptx: str) -> list[dict[str, int]]:
    """Returns what the loops are recognised by, in order, without the loops in them."""
    lines = ptx.splitlines()
    labels = {line.partition(":")[0]: n for n, line in enumerate(lines) if line.startswith("$L__BB")}
    ends: dict[int, int] = {}
    for n, line in enumerate(lines):
        if (found := re.search(r"bra(?:\.uni)?\s+(\$L__BB\d+_\d+);", line)) and labels.get(found[1], n) < n:
            ends[labels[found[1]]] = n
    bodies: dict[int, list[str]] = {first: [] for first in sorted(ends)}
    for n, line in enumerate(lines):
        inside = [first for first, last in ends.items() if first <= n <= last]
        if inside:
            bodies[min(inside, key=lambda first: ends[first] - first)].append(line)
    return [
        {name: len(re.findall(pattern, "\n".join(body))) for name, pattern in FEATURES.items()}
        for body in bodies.values()
    ]


def _ttir_loop(loop: trips.Operation) -> dict[str, int]:
    def own(block):
        for operation in block.operations:
            yield operation.name
            if operation.name not in ("scf.for", "scf.while"):
                for inner in operation.blocks:
                    yield from own(inner)

    names = Counter(name for block in loop.blocks for name in own(block))
    return {feature: names[name] for feature, name in IN_TTIR.items()}


def _pairs(first: list[dict], second: list[dict]) -> list[tuple[int, int]]:
    """Pairs loops of two stages of the compiler, in order, so that they are most alike."""

    def apart(a: dict, b: dict) -> float:
        both = a.keys() & b.keys()
        return sum(abs(math.log((a[n] + 1) / (b[n] + 1))) + 3 * (bool(a[n]) != bool(b[n])) for n in both)

    few, many = sorted((range(len(first)), range(len(second))), key=len)
    swapped = len(first) > len(second)
    best, chosen = math.inf, []
    for taken in itertools.combinations(many, len(few)):
        pairs = list(zip(taken, few, strict=True)) if swapped else list(zip(few, taken, strict=True))
        distance = sum(apart(first[a], second[b]) for a, b in pairs)
        if distance < best:
            best, chosen = distance, pairs
    return chosen


@dataclass
class Compiled:
    """A kernel's loops in Triton's IR, in PTX and in SASS, and what a program takes of a multiprocessor."""

    ttir: str
    body: trips.Block
    ptx: list[dict[str, int]]
    loops: list[sass.Loop]
    registers: int
    shared: int
    threads: int


_known: dict[tuple, Compiled] = {}


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compiles the kernel of a launch ahead of time."""
    key = launch.source.hash(), capability, repr(sorted(launch.options.items(), key=str))
    if key not in _known:
        code = triton.compile(launch.source, target=GPUTarget("cuda", capability, 32), options=launch.options)
        cubin = code.asm["cubin"]
        _known[key] = Compiled(
            code.asm["ttir"],
            trips.parse(code.asm["ttir"]),
            _ptx_loops(code.asm["ptx"]),
            sass.disassemble(cubin),
            sass.registers(cubin),
            code.metadata.shared,
            32 * code.metadata.num_warps,
        )
    return _known[key]


def _passes(code: Compiled, counts: list[float]) -> list[float]:
    """Returns how often a program runs each loop of the SASS."""
    ours = trips.loops(code.body)
    outer = dict(_pairs([_ttir_loop(loop) for loop in ours], code.ptx))
    for n, count in enumerate(counts):
        if n not in outer and count > UNROLLED:
            raise LookupError(f"the loop in line {ours[n].line} of Triton's IR is not found in PTX")
    inner = dict(_pairs(code.ptx, [loop.features() for loop in code.loops[1:]]))
    found = {}
    for n, in_ptx in outer.items():
        if in_ptx not in inner:
            if counts[n] > UNROLLED:
                raise LookupError(f"the loop in line {ours[n].line} of Triton's IR is not found in SASS")
            continue
        loop = code.loops[1 + inner[in_ptx]]
        before, after = code.ptx[in_ptx], loop.features()
        name = next((n for n in ("mma", "load", "exp", "float") if before[n]), None)
        unrolled = max(1, round(after[name] / before[name])) if name else 1
        if name == "mma" and any("UTC" in i.head for i in loop.own):
            unrolled = 1
        found[1 + inner[in_ptx]] = counts[n] / unrolled
    passes = [1.0]
    for index, loop in enumerate(
        code.loops[1:], 1
    ):  # one that is in no other stage runs once in the one around it
        around = [
            n for n, o in enumerate(code.loops[:index]) if o.first <= loop.first and loop.last <= o.last
        ]
        passes.append(found.get(index, passes[around[-1]]))
    return passes


def _tcgen05_cycles(code: Compiled, counts: list[float], card: Card) -> float:
    """Returns the cycles of a program's products on tcgen05, whose instructions do not tell their sizes."""
    if not any(i.head.startswith("UTC") and "MMA" in i.head for loop in code.loops for i in loop.own):
        return 0.0

    def flops(block, times: float) -> float:
        total = 0.0
        for operation in block.operations:
            if operation.name == "tt.dot":
                m, k, n = re.search(r"tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", operation.text).groups()
                total += times * 2 * int(m) * int(k) * int(n)
            inner = by_line.get(operation.line, times)
            total += sum(flops(b, inner) for b in operation.blocks)
        return total

    by_line = {loop.line: count for loop, count in zip(trips.loops(code.body), counts, strict=True)}
    return flops(code.body, 1.0) / card.wide_product


@dataclass
class Prediction:
    """``bound`` is what takes most of the time: a pipe, "latency", "memory bandwidth" or "cache bandwidth"."""

    microseconds: float
    bound: str
    resident: int


def size(t: torch.Tensor) -> int:
    """Returns the bytes that a tensor covers; what is expanded counts once."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


@dataclass
class Program:
    """What a launch runs. ``products`` are a program's cycles on tcgen05, ``cached`` the bytes that it copies to shared
    memory; ``bytes`` are those of the launch's memory.
    """

    parts: list[sass.Part]
    registers: int
    shared: int
    threads: int
    bytes: int
    products: float = 0.0
    cached: float = 0.0


def _in_triton(launch: Launch, card: Card) -> Program:
    code = compiled(launch, card.capability)
    arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
    counts = trips.trips(code.body, arguments, launch.grid)
    parts = [sass.Part(loop.own, n, n) for loop, n in zip(code.loops, _passes(code, counts), strict=True)]
    tensors = {id(t): t for t in arguments.values() if isinstance(t, torch.Tensor)}
    cached = sum(
        part.mean * code.threads * 4 * i.pieces for part in parts for i in part.own if i.head == "LDGSTS"
    )
    return Program(
        parts,
        code.registers,
        code.shared,
        code.threads,
        sum(map(size, tensors.values())),
        _tcgen05_cycles(code, counts, card),
        cached,
    )


def _in_cuda(launch: cuda.Launch, card: Card) -> Program:
    parts, registers, bytes_ = cuda.run(launch, card.capability)
    return Program(parts, registers, launch.shared, launch.threads, bytes_)


def predict(launch: Launch | cuda.Launch, card: Card) -> Prediction:
    """Predicts the time of a launch that :func:`fake_gpu` or :func:`cuda.recording` recorded. Raises LookupError where
    the passes of a loop are not known.
    """
    program = (_in_cuda if isinstance(launch, cuda.Launch) else _in_triton)(launch, card)
    warps = program.threads // 32
    busy, delay = Counter({"tensor": program.products}), 0.0
    for n, part in enumerate(program.parts):
        costs = Counter()
        for i in part.own:
            pipe, cycles, _ = i.cost(card)
            costs[pipe] += cycles
            costs["issue"] += 1
        for pipe, cycles in costs.items():
            busy[pipe] += part.mean * cycles * warps / 4
        delay += part.longest * sass.latency(part.own, card, 1 if n == 0 else 4)
    grid = math.prod(launch.grid)
    most = sass.occupancy(program.registers, program.threads, program.shared, card)

    def cycles(resident: int) -> float:
        return sum(t**NORM for t in (delay, *(resident * t for t in busy.values()))) ** (1 / NORM)

    full, rest = divmod(grid, most * card.processors)
    total = full * cycles(most) + (cycles(math.ceil(rest / card.processors)) if rest else 0)
    resident = most if full else math.ceil(rest / card.processors)
    pipe, most_busy = max(busy.items(), key=lambda item: item[1])
    times = {
        pipe if resident * most_busy > delay else "latency": total / card.ghz / 1e3,
        "memory bandwidth": program.bytes / card.memory / 1e3,
        "cache bandwidth": program.cached * grid / card.cache / 1e3,
    }
    bound = max(times, key=times.get)
    return Prediction(torch_ops.START + times[bound], bound, resident)
