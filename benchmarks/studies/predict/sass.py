# SPDX-License-Identifier: Apache-2.0
"""What the assembler made of a kernel: instructions by loop, the pipes they occupy, and the latency of a warp.

Stall counts and the six scoreboards come from the control bits of each instruction. Branches that go forward fall
through, so both sides of a condition count.
"""

import math
import re
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

from fastasr.benchmarks.studies.predict.cards import Card

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RESERVED = 1 << 10  # bytes of shared memory that the system keeps for each program
FLOAT = ("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "FADD2", "FMUL2", "FFMA2", "FSWZADD")
DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
SPECIAL = ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO")
SHARED = ("LDS", "LDSM", "STS", "STSM", "SHFL", "ATOMS", "LDTM", "STTM")
GLOBAL = ("LDG", "STG", "LD", "ST", "ATOMG", "ATOM", "RED", "REDG", "LDGSTS", "LDL", "STL")
CONTROL = (
    *(
        "BRA",
        "EXIT",
        "BAR",
        "DEPBAR",
        "LDGDEPBAR",
        "WARPGROUP",
        "MEMBAR",
        "FENCE",
        "WARPSYNC",
        "NOP",
        "BSSY",
        "BSYNC",
    ),
    *("ERRBAR", "CCTL", "CALL", "RET", "SYNCS", "ELECT", "YIELD", "NANOSLEEP"),
)


@dataclass
class Instruction:
    """``write`` and ``read`` are scoreboards, 7 for none; ``wait`` is a mask of them. ``place`` is the line that the
    compiler noted, or the name of the subroutine; ``straight`` numbers the runs between labels and branches.
    """

    name: str
    text: str
    stall: int
    write: int
    read: int
    wait: int
    target: str | None = None
    place: int | str = 0
    straight: int = 0

    @property
    def head(self) -> str:
        return self.name.partition(".")[0]

    @property
    def pieces(self) -> int:
        """Returns how often 128 bytes an access of a warp moves."""
        if self.head in ("LDSM", "STSM"):
            return int(self.name[-1]) if self.name[-1] in "24" else 1
        width = re.search(r"\.(64|128)\b", self.name)
        return int(width[1]) // 32 if width else 1

    def cost(self, card: Card) -> tuple[str, float, float]:
        """Returns the pipe, the cycles for which it is taken, and the cycles until the result is there."""
        head = self.head
        if head == "HGMMA":
            m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", self.name).groups())
            registers = re.search(r"HGMMA\.\S+ R\d+, R\d+", self.text)
            operands = 2 * k * (n if registers else n + m) / 128  # cycles of reading them from shared memory
            return "tensor", max(2 * m * n * k / card.wide_product, operands), 60
        if head == "HMMA":
            return "tensor", card.product / (1 if "16816" in self.name else 2), 33
        if head in SHARED:
            return "load/store", 4 * self.pieces, 24 + 2 * self.pieces
        if head in GLOBAL:
            local = head in ("LDL", "STL")
            return "load/store", (8 if head == "LDGSTS" else 4) * self.pieces, 40 if local else card.latency
        if head in DOUBLE or (head in SPECIAL and "F64" in self.name):
            return "double", card.double, 16 + card.double
        if head in SPECIAL:
            return "special", 8, 22
        if head in FLOAT:
            return "float", card.fma * (2 if head in ("FADD2", "FMUL2", "FFMA2") else 1), 4
        if head == "IMAD":
            return "float", 2, 4
        if head in CONTROL:
            return "control", 1, 20
        if head.startswith(("U", "R2UR", "S2", "LDC", "VOTE", "CS2")):
            return "uniform", 1, 20
        return "integer", 2, 4


@dataclass
class Loop:
    """Instructions ``first`` to ``last`` of a program; ``own`` are those in no loop within."""

    first: int
    last: int
    own: list[Instruction] = field(default_factory=list)

    def features(self) -> dict[str, int]:
        """Counts what a loop is recognised by in PTX too."""
        heads = Counter(i.head for i in self.own)
        return {
            "mma": heads["HMMA"]
            + heads["HGMMA"]
            + sum(heads[h] for h in heads if h.startswith("UTC") and "MMA" in h),
            "load": heads["LDG"] + heads["LDGSTS"],
            "store": heads["STG"],
            "exp": sum(i.name.startswith(("MUFU.EX2", "MUFU.LG2", "MUFU.RCP")) for i in self.own),
            "barrier": heads["BAR"],
            "float": sum(heads[h] for h in FLOAT),
        }


@dataclass
class Part:
    """Instructions that run equally often: in a warp on average, and in the one with most to do."""

    own: list[Instruction]
    mean: float
    longest: float


def _controls(cubin: bytes) -> dict[int, tuple[int, int, int, int]]:
    """Returns stall, write, read and wait by address."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", cubin, 0x28)
    sections = [struct.unpack_from("<II8x8xQQ", cubin, table + size * i) for i in range(count)]
    labels, found = sections[names][2], {}
    for label, _, offset, length in sections:
        if cubin[labels + label :].startswith(b".text."):
            for at in range(0, length, 16):
                high = struct.unpack_from("<Q", cubin, offset + at + 8)[0]
                found[at] = (high >> 41 & 15, high >> 46 & 7, high >> 49 & 7, high >> 52 & 63)
    return found


def _tool(cubin: bytes, name: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> list[Loop]:
    """Returns the program's loops in order of their first instructions; the first one is the program itself."""
    text = _tool(cubin, "nvdisasm", "-c", "-g")
    controls, code, labels, place, straight = _controls(cubin), [], {}, 0, 0
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+|\$[\w$]+):", line.strip()):
            labels[label[1]] = len(code)
            straight += 1
            place = label[1] if label[1][0] == "$" else place
        elif (noted := re.match(r'\s*//## File ".*?", line (\d+)', line)) and isinstance(place, int):
            place = int(noted[1])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            at, name, rest = found.groups()
            target = re.search(r"`\((\.L_x_\d+|\$[\w$]+)\)", rest)
            controls_of = controls[int(at, 16)]
            code.append(Instruction(name, name + rest, *controls_of, target and target[1], place, straight))
            straight += name.startswith("BRA")
    ends: dict[int, int] = {}
    for index, instruction in enumerate(code):
        first = labels.get(instruction.target, index)
        if instruction.head == "BRA" and index - first >= 3:  # the last branch, to itself, is no loop
            ends[first] = index
    loops = [Loop(0, len(code) - 1), *(Loop(first, ends[first]) for first in sorted(ends))]
    for index, instruction in enumerate(code):
        inside = [loop for loop in loops if loop.first <= index <= loop.last]
        min(inside, key=lambda loop: loop.last - loop.first).own.append(instruction)
    return loops


def latency(instructions: list[Instruction], card: Card, passes: int = 4) -> float:
    """Returns the cycles of a pass of a warp that is alone, once the copies of earlier passes are under way."""
    ready, boards, groups, pending, products = 0.0, [0.0] * 6, [], 0.0, 0.0
    free: Counter = Counter()
    ends = []
    for _ in range(passes):
        for i in instructions:
            pipe, busy, delay = i.cost(card)
            now = max([ready, *(boards[n] for n in range(6) if i.wait >> n & 1)])
            if i.head == "DEPBAR" and (kept := re.search(r"SB0, (0x[0-9a-f]+)", i.text)):
                kept = int(kept[1], 16)
                now = max(now, groups[-kept - 1] if len(groups) > kept else 0.0)
            if i.head == "WARPGROUP" and "DEPBAR" in i.name:
                now = max(now, products)
            if i.head == "HGMMA":
                products = free[pipe] = max(now, free[pipe]) + busy
                products += delay
                done = now + 4
            else:
                now = max(
                    now, free[pipe] - (32 if pipe == "load/store" else 0)
                )  # the unit has a queue before it
                free[pipe] = max(now, free[pipe]) + busy
                done = free[pipe] + delay
            if i.head == "LDGSTS":
                pending = done
            elif i.head == "LDGDEPBAR":
                groups.append(pending)
            if i.write != 7:
                boards[i.write] = max(boards[i.write], done)
            if i.read != 7:
                boards[i.read] = max(boards[i.read], free[pipe] + 10)
            ready = now + max(1, i.stall) + (14 if i.head == "BAR" and "SYNC" in i.name else 0)
        ends.append(ready)
    return (ends[-1] - ends[0]) / (passes - 1) if passes > 1 else ends[0]


def registers(cubin: bytes) -> int:
    """Returns the registers of a thread."""
    return int(re.search(r"REG:(\d+)", _tool(cubin, "cuobjdump", "--dump-resource-usage"))[1])


def occupancy(registers: int, threads: int, shared: int, card: Card) -> int:
    """Returns how many programs a multiprocessor holds at once."""
    warps = threads // 32
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256 * math.ceil(warps / 4) * 4)
    by_memory = card.shared // (shared + RESERVED) if shared else card.programs
    return max(1, min(by_registers, by_memory, card.warps // warps, card.programs))
