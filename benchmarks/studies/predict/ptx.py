# SPDX-License-Identifier: Apache-2.0
"""How often the blocks of a CUDA kernel's PTX run for given arguments: its integers and predicates are executed.

A block ends before a label or behind a branch. Only what branches and the addresses of global memory depend on is
executed. Floating point numbers and what lies in memory are not known: a branch that depends on them falls through
where it goes forward, so what it may skip counts.
"""

import math
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

MOST = 1 << 20  # blocks that a thread may run
BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "rem": lambda a, b: int(math.fmod(a, b)),
    "min": min,
    "max": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": operator.lshift,
    "shr": operator.rshift,
}
COMPARE = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


@dataclass
class Instruction:
    """Operands are registers, numbers and addresses, as they are written."""

    parts: list[str]  # of the name
    results: list[str]
    operands: list[str]
    predicate: str  # with ! where it is negated; empty where there is none

    def __post_init__(self) -> None:
        # kinds and bits, such as ("u", 32)
        self.types = [(p[0], int(p[1:])) for p in self.parts[1:] if re.fullmatch(r"[usbf](8|16|32|64)", p)]
        self.is_global = self.parts[0] in ("ld", "st") and "global" in self.parts


@dataclass
class Kernel:
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    text: str = ""  # of the kernel; its instructions have the line numbers of their blocks, from 1


def _instruction(text: str) -> Instruction:
    predicate, name, rest = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.]+)\s*(.*);.*", text).groups()
    operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s|]+", rest)
    no_result = name.startswith(("st", "bra", "ret", "bar", "exit"))
    results = re.findall(r"%\w+", operands.pop(0)) if operands and not no_result else []
    return Instruction(name.split("."), results, operands, predicate or "")


def parse(ptx: str, name: str) -> Kernel:
    """Returns the kernel of that name."""
    kernel, lines, inside = Kernel(), [], False
    pieces = re.split(r"^(\.visible \.entry (\w+)\([\s\S]*?^\})", ptx, flags=re.MULTILINE)
    for line in "".join(
        part for n, part in enumerate(pieces) if n % 3 == 0 or (n % 3 == 1 and pieces[n + 1] == name)
    ).splitlines():
        inside = inside or line == "{"
        if inside and (label := re.match(r"(\$\w+):", line)):
            kernel.blocks.append([])
            kernel.labels[label[1]] = len(kernel.blocks) - 1
        elif inside and re.match(r"\s+[a-z@].*;", line):
            lines.append(f".loc 1 {len(kernel.blocks)} 0")
            kernel.blocks[-1].append(_instruction(line.strip()))
            if kernel.blocks[-1][-1].parts[0] in ("bra", "ret"):
                kernel.blocks.append([])
        lines.append(line)
    kernel.text = "\n".join([*lines, '.file 1 "blocks"', ""])
    return kernel


def _operand(text: str) -> tuple[str, int]:
    """Returns a register and what is added to it: a number, or an address. The parameters begin at address 0; what is
    not known stands in no register.
    """
    base, _, offset = text.strip("[]").partition("+")
    if base[0] == "%":
        return base, int(offset or 0)
    if base.endswith("_param_0"):
        return "zero", int(offset or 0)
    return ("zero", int(base, 0)) if re.match(r"-?\d+$|0x", base) else ("unknown", 0)


def _as(kind: str, bits: int, value: int) -> int:
    value &= (1 << bits) - 1
    return value - (value >> bits - 1 << bits) if kind == "s" else value


def _meaning(i: Instruction) -> Callable[..., int | None] | None:
    """Returns the function of an instruction's operands, None for a branch."""
    head, types = i.parts[0], i.types
    if head in ("bra", "ret"):
        return None
    if any(kind == "f" for kind, _ in types) or head in ("ld", "st") or "{" in "".join(i.operands):
        return lambda *_: None
    if "pred" in i.parts:  # of which one operand may decide
        decides = {"and": 0, "or": 1}.get(head)
        function = {"not": lambda a: 1 - a, "mov": lambda a: a} | {k: BINARY[k] for k in ("and", "or", "xor")}
        return lambda *v: decides if decides in v else None if None in v else function[head](*v)
    if head == "selp":
        return lambda a, b, p: None if p is None and a != b else a if p else b
    if head == "vote":
        return lambda p, _: None if p is None else 0xFFFFFFFF * p
    if not types:
        return lambda *_: None
    kind, bits = types[-1]
    to = 2 * bits if "wide" in i.parts else types[0][1]
    function = {
        "setp": COMPARE.get(i.parts[1]),
        "mad": lambda a, b, c: a * b + c,
        "neg": operator.neg,
        "not": operator.invert,
        "abs": abs,
        "brev": lambda a: int(f"{a:0{bits}b}"[::-1], 2),
        **dict.fromkeys(("mov", "cvt", "cvta"), lambda a: a),
        **BINARY,
    }.get(head)
    if function is None or ("hi" in i.parts and head != "setp"):
        return lambda *_: None
    return lambda *v: None if None in v else _as("u", to, int(function(*(_as(kind, bits, a) for a in v))))


class Program:
    """What of a kernel is executed."""

    def __init__(self, kernel: Kernel):
        self.labels = kernel.labels
        every = [i for block in kernel.blocks for i in block]
        if odd := [i for i in every if i.predicate and i.parts[0] not in ("bra", "ret")]:
            raise LookupError(f"a predicate of {'.'.join(odd[0].parts)}, not of a branch")
        wanted = {i.predicate.strip("!") for i in every if i.predicate}
        wanted |= {name for i in every if i.is_global for name in re.findall(r"%\w+", i.operands[0])}
        before = -1
        while len(wanted) > before:
            before = len(wanted)
            for i in every:
                if wanted.intersection(i.results):
                    wanted.update(re.findall(r"%[\w.]+", " ".join(i.operands)))
        self.blocks = [
            [
                (i, _meaning(i), [_operand(o) for o in i.operands])
                for i in block
                if i.parts[0] in ("bra", "ret") or i.is_global or wanted.intersection(i.results)
            ]
            for block in kernel.blocks
        ]

    def run(self, parameters: bytes, special: dict[str, int]) -> tuple[Counter, set[int]]:
        """Runs a thread, whose special registers are given, such as %tid.x. Returns how often it runs each block, and
        addresses of global memory that it uses.
        """
        registers: dict[str, int | None] = special | {"zero": 0}
        counts, addresses, here = Counter(), set(), 0
        while True:
            counts[here] += 1
            if counts[here] > MOST:
                raise LookupError("a loop depends on values in memory")
            here, this = here + 1, here
            for i, meaning, operands in self.blocks[this]:
                if meaning is None:
                    holds = registers.get(i.predicate.strip("!")) if i.predicate else 1
                    to = self.labels[i.operands[0]] if i.operands else None
                    if holds is None and to is not None and to <= this:
                        raise LookupError("a loop depends on values in memory")
                    if holds is not None and holds != i.predicate.startswith("!"):
                        if to is None:
                            return counts, addresses
                        here = to
                    continue
                values = [
                    None if (value := registers.get(base)) is None else value + offset
                    for base, offset in operands
                ]
                if i.is_global:
                    addresses.add(values[0])
                if i.parts[:2] == ["ld", "param"]:
                    size = i.types[-1][1] // 8
                    for n, name in enumerate(i.results):
                        at = (values[0] & (1 << 64) - 1) + n * size
                        registers[name] = int.from_bytes(parameters[at : at + size], "little")
                else:
                    registers.update(dict.fromkeys(i.results, meaning(*values)))
