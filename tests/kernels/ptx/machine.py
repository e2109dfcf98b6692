# SPDX-License-Identifier: Apache-2.0
"""Runs a kernel's PTX on the CPU: all threads of many programs at once, an instruction at a time.

A register is an array of bits [programs or 1, threads or 1], so that what threads share is held once. Threads that
branch apart go on as fragments, of which the one furthest behind runs first: so they meet again. All threads of a
program take an instruction together, which hides races between its warps (the interpreter finds those), but nothing is
there before a kernel may count on it: shared memory that nobody wrote is NaN, and so is what ``cp.async`` brings, until
the kernel waits for it.
"""

import struct
from collections.abc import Callable

import numpy as np

from .arithmetic import BITS, UNSIGNED
from .memory import Fault, Global, Shared
from .program import Instruction, Program

THREADS = 1 << 16  # run at once
SHARED = 1 << 28  # bytes of shared memory at once

# runs an instruction on the threads of a mask, None for all
Step = Callable[["Machine", np.ndarray | None], None]
MAKERS: dict[str, Callable[["Machine", tuple, tuple], Step]] = {}


def maker(*names: str):
    """Registers a function that makes the step of instructions of these names from their modifiers and operands."""

    def register(function):
        MAKERS.update(dict.fromkeys(names, function))
        return function

    return register


class Machine:
    """A kernel, ready to run with these arguments on a memory."""

    def __init__(self, program: Program, threads: int, shared: int, memory: Global, arguments: list):
        self.program, self.threads, self.memory = program, threads, memory
        self.shared_size = max(shared, 16)
        self.slots: dict[str, int] = {}  # of registers and constants
        self.fixed: dict[int, np.ndarray] = {}  # constants by slot
        self.parameters, self.places = _packed(program, arguments)
        self.steps = [self._compile(i) for i in program.instructions]
        targets = {i.operands[0] for i in program.instructions if i.operation[0] == "bra"}
        self.labels = {label: place for label, place in program.labels.items() if label in targets}
        self.stops = set(self.labels.values())
        self.trace = None

    # ------------------------------------------------------------------ registers
    def slot(self, name: str) -> int:
        return self.slots.setdefault(name, len(self.slots))

    def source(self, operand: str, kind: str) -> int:
        """Returns the slot of a register, number or symbol that is read as this type."""
        if operand[0] not in "-0123456789" and operand != "global_smem" and operand not in self.places:
            return self.slot(operand)
        width = BITS[kind]
        slot = self.slot(f"{operand}:{width}")
        if operand == "global_smem":
            value = 0
        elif operand in self.places:
            value = self.places[operand]
        else:  # 0f and 0d come before the digits of floats
            value = int(operand[2:], 16) if operand[:2] in ("0f", "0d") else int(operand.rstrip("U"), 0)
        self.fixed[slot] = np.array([[value & ((1 << width) - 1)]], UNSIGNED[width])
        return slot

    def get(self, slot: int) -> np.ndarray:
        found = self.registers[slot]
        if found is None:
            name = next(n for n, s in self.slots.items() if s == slot)
            raise Fault(f"{name} is read before it is written")
        return found

    def put(self, slot: int, value: np.ndarray, mask: np.ndarray | None) -> None:
        if mask is not None:
            old = self.registers[slot]
            value = np.where(mask, value, value.dtype.type(0) if old is None else old.astype(value.dtype))
        self.registers[slot] = value

    def whole(self, value: np.ndarray) -> np.ndarray:
        """Returns [programs, threads]."""
        return np.broadcast_to(value, (self.programs, self.threads))

    def warps(self, value: np.ndarray) -> np.ndarray:
        """Returns [programs, warps, 32]."""
        return np.ascontiguousarray(self.whole(value)).reshape(self.programs, -1, 32)

    def whole_programs(self, mask: np.ndarray | None) -> np.ndarray:
        """Returns which programs take part, all threads of each."""
        if mask is None:
            return np.ones(self.programs, bool)
        whole = self.whole(mask)
        active = whole.any(1)
        if (whole.all(1) != active).any():
            raise Fault("some threads of a program are elsewhere")
        return active

    def whole_warps(self, mask: np.ndarray | None) -> None:
        if mask is not None:
            whole = self.warps(mask)
            if (whole.any(-1) != whole.all(-1)).any():
                raise Fault("some threads of a warp are elsewhere")

    def watch(self, there: bool, address: np.ndarray, mask: np.ndarray | None, width: int) -> None:
        """Counts an access of ``width`` bytes to global memory, if ``there``, or to shared memory."""
        if self.trace is not None:
            self.trace.access(there, self.warps(address), None if mask is None else self.warps(mask), width)

    # ------------------------------------------------------------------ control
    def run(self, grid: tuple[int, int, int], programs: np.ndarray | None = None) -> None:
        """Runs all programs of a grid, or those of these numbers."""
        numbers = np.arange(grid[0] * grid[1] * grid[2]) if programs is None else programs
        most = max(1, min(THREADS // self.threads, SHARED // self.shared_size))
        for first in range(0, len(numbers), most):
            self._start(numbers[first : first + most], grid)
            self._run()

    def _start(self, numbers: np.ndarray, grid: tuple[int, int, int]) -> None:
        self.programs = len(numbers)
        self.registers = [self.fixed.get(slot) for slot in range(len(self.slots))]
        x, y, _ = grid
        lane = np.arange(self.threads, dtype=np.uint32)[None]
        special = {
            "tid.x": lane,
            "laneid": lane % np.uint32(32),
            "ntid.x": np.array([[self.threads]], np.uint32),
        }
        for axis, size, place in zip(
            "xyz", grid, (numbers % x, numbers // x % y, numbers // x // y), strict=True
        ):
            special[f"ctaid.{axis}"] = place.astype(np.uint32)[:, None]
            special[f"nctaid.{axis}"] = np.array([[size]], np.uint32)
        for name, value in special.items():
            if f"%{name}" in self.slots:
                self.registers[self.slots[f"%{name}"]] = value
        self.shared = Shared(self.programs, self.shared_size)
        self.committed = np.zeros(self.programs, np.int64)  # groups of copies
        self.copies = []  # group, program, address and words of each copy under way
        self.fragments = {0: np.ones((1, 1), bool)}  # masks of threads by their next instruction

    def _run(self) -> None:
        while self.fragments:
            self.place = min(self.fragments)
            mask = self.fragments.pop(self.place)
            mask = None if mask.all() else mask
            self.jumped = False
            while not self.jumped:
                if self.trace is not None:
                    self.trace.step(mask)
                try:
                    self.steps[self.place](self, mask)
                except Fault as fault:
                    instruction = self.program.instructions[self.place].text
                    raise Fault(f"{self.program.name}: {fault}: {instruction}") from None
                self.place += 1
                if not self.jumped and self.place in self.stops and self.fragments:
                    self.add(self.place, mask)
                    break
        if self.copies:
            raise Fault(f"{self.program.name} ends before its copies do")

    def add(self, place: int, mask: np.ndarray | None) -> None:
        """Lets threads go on at an instruction."""
        mask = np.ones((1, 1), bool) if mask is None else mask
        self.fragments[place] = self.fragments[place] | mask if place in self.fragments else mask

    def _compile(self, instruction: Instruction) -> Step:
        operation, operands = instruction.operation, instruction.operands
        if operation[0] == "bra":
            return _branch(self, instruction)
        if operation[0] not in MAKERS:
            raise Fault(f"unknown instruction {instruction.text}")
        step = MAKERS[operation[0]](self, operation, operands)
        if instruction.guard is None:
            return step
        guard, unless = self.slot(instruction.guard), instruction.unless

        def guarded(machine: Machine, mask: np.ndarray | None) -> None:
            chosen = machine.get(guard) != unless
            if mask is not None:
                chosen = chosen & mask
            if chosen.all():
                step(machine, None)
            elif chosen.any():
                step(machine, chosen)

        return guarded


def _branch(machine: Machine, instruction: Instruction) -> Step:
    target = instruction.operands[0]
    guard = None if instruction.guard is None else machine.slot(instruction.guard)

    def branch(m: Machine, mask: np.ndarray | None) -> None:
        here = np.ones((1, 1), bool) if mask is None else mask
        chosen = here if guard is None else (m.get(guard) != instruction.unless) & here
        if chosen.any():
            rest = ~chosen & here
            m.add(m.labels[target], chosen)
            if rest.any():
                m.add(m.place + 1, rest)
            m.jumped = True

    return branch


@maker("ret")
def _return(machine, operation, operands):
    def step(m, mask):
        m.jumped = True

    return step


@maker("bar")
def _barrier(machine, operation, operands):
    of_warp = operation[1] == "warp"
    return lambda m, mask: m.whole_warps(mask) if of_warp else m.whole_programs(mask)


@maker("fence")
def _fence(machine, operation, operands):
    return lambda m, mask: None


def _packed(program: Program, arguments: list) -> tuple[np.ndarray, dict[str, int]]:
    """Returns the memory of a kernel's parameters, and where each begins."""
    memory, places = bytearray(), {}
    for (kind, name), value in zip(program.parameters, arguments, strict=True):
        size = BITS[kind] // 8
        memory += bytes(-len(memory) % size)
        places[name] = len(memory)
        if kind in ("f32", "f64"):
            memory += struct.pack({"f32": "<f", "f64": "<d"}[kind], value)
        else:
            memory += (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return np.frombuffer(bytes(memory), np.uint8), places
