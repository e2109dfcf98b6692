# SPDX-License-Identifier: Apache-2.0
"""How often the loops of a Triton kernel run for given arguments: its scalar arithmetic in Triton's IR is executed.

Tensors are left out. Scalars that a program loads are read from the arguments; where a program reduces a tensor to a
flag, or a condition depends on a tensor, the answer is taken to be yes.
"""

import operator
import random
import re
from collections import Counter
from dataclasses import dataclass, field

PROGRAMS = 24  # sampled from a grid
BINARY = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "divsi": lambda a, b: int(a / b),
    "divui": operator.floordiv,
    "ceildivsi": lambda a, b: -(-a // b),
    "remsi": lambda a, b: a - b * int(a / b),
    "remui": operator.mod,
    "minsi": min,
    "minui": min,
    "maxsi": max,
    "maxui": max,
    "andi": operator.and_,
    "ori": operator.or_,
    "xori": operator.xor,
    "shli": operator.lshift,
    "shrsi": operator.rshift,
}
COMPARE = {"eq": operator.eq, "ne": operator.ne}
COMPARE |= {f"{sign}{name}": getattr(operator, name) for sign in "su" for name in ("lt", "le", "gt", "ge")}


@dataclass
class Operation:
    name: str
    results: list[str]
    text: str
    line: int
    blocks: list["Block"] = field(default_factory=list)


@dataclass
class Block:
    operations: list[Operation] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)


def _results(text: str) -> list[str]:
    """Returns the names that a line defines; ``%x:3`` defines ``%x#0`` to ``%x#2``."""
    name, _, count = text.partition(":")
    return [f"{name}#{i}" for i in range(int(count))] if count else [name]


def parse(ttir: str) -> Block:
    """Returns the body of the kernel."""
    stack, body = [], None
    for number, line in enumerate(ttir.splitlines()):
        line = re.sub(r" loc\((?:[^()]|\([^()]*(?:\([^()]*\))?[^()]*\))*\)", "", line).strip()
        if line.startswith("tt.func"):
            body = Block()
            stack = [body]
        elif not stack or not line or line.startswith(("#", "//")):
            continue
        elif line.startswith("^"):
            stack[-1].arguments = re.findall(r"(%[\w-]+):", line)
        elif line.startswith("}"):
            stack.pop()
            if not stack:
                break
            if line.endswith("{"):  # } else {, } do {
                stack.append(Block())
                stack[-2].operations[-1].blocks.append(stack[-1])
        else:
            found = re.match(r"(?:(%[\w:-]+) = )?\"?([\w.]+)\"?(.*)", line)
            operation = Operation(found[2], _results(found[1]) if found[1] else [], found[3], number)
            stack[-1].operations.append(operation)
            if line.endswith("{"):
                operation.blocks.append(Block())
                stack.append(operation.blocks[0])
    return body


def loops(block: Block) -> list[Operation]:
    """Returns the loops in the order of their first lines."""
    found = []
    for operation in block.operations:
        found += [operation] if operation.name in ("scf.for", "scf.while") else []
        found += [inner for b in operation.blocks for inner in loops(b)]
    return found


class Program:
    """One program of a grid: its scalars by name, and the passes of each loop by the loop's line."""

    def __init__(self, arguments: dict, place: tuple[int, ...], grid: tuple[int, ...]):
        self.arguments, self.place, self.grid = arguments, place, grid
        self.passes: Counter = Counter()
        self.values = {f"%{name}": value for name, value in arguments.items()}

    def run(self, block: Block) -> list:
        """Executes a block and returns what it yields."""
        for operation in block.operations:
            if operation.name in ("scf.yield", "scf.condition", "tt.return"):
                return [self.values.get(name) for name in self._names(operation.text)]
            found = self._execute(operation)
            self.values.update(zip(operation.results, found, strict=False))
        return []

    @staticmethod
    def _names(text: str) -> list[str]:
        return re.findall(r"%[\w#-]+", text)

    def _execute(self, operation: Operation) -> list:
        kind = operation.name.rpartition(".")[2]
        if operation.name in ("scf.for", "scf.while"):
            return getattr(self, f"_{kind}")(operation)
        if operation.name == "scf.if":
            condition = self.values.get(self._names(operation.text)[0])
            chosen = operation.blocks[:1] if condition is None or condition else operation.blocks[1:]
            return self.run(chosen[0]) if chosen else []
        if operation.name == "tt.reduce":
            flag = any(o.name == "arith.maxsi" for o in operation.blocks[0].operations)
            return [1 if flag and operation.results else None] * len(operation.results)
        given = [self.values.get(name) for name in self._names(operation.text)]
        if kind == "constant":
            number = re.match(r" (-?\d+|true|false) ?", operation.text)
            return (
                [{"true": 1, "false": 0}.get(number[1]) if number[1].isalpha() else int(number[1])]
                if number
                else [None]
            )
        if kind in ("get_program_id", "get_num_programs"):
            axis = "xyz".index(operation.text.split()[0])
            return [(self.place if kind == "get_program_id" else self.grid)[axis]]
        if "tensor<" in operation.text or None in given:
            return [None]
        if kind in BINARY:
            return [BINARY[kind](*given)]
        if kind == "cmpi":
            return [int(COMPARE[operation.text.split(",")[0].strip()](*given))]
        if kind == "select":
            return [given[1] if given[0] else given[2]]
        if kind in ("extsi", "extui", "trunci", "index_cast"):
            return given
        if kind == "addptr":
            tensor, offset = given[0] if isinstance(given[0], tuple) else (given[0], 0)
            return [(tensor, offset + given[1])]
        if kind == "load":
            if given[1:] and not given[1]:  # its mask hides it
                return given[2:] or [None]
            tensor, offset = given[0] if isinstance(given[0], tuple) else (given[0], 0)
            flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
            return [int(flat[tensor.storage_offset() + offset])] if not tensor.is_floating_point() else [None]
        return [None]

    def _for(self, operation: Operation) -> list:
        head = re.match(
            r" (%[\w-]+) = (%[\w#-]+) to (%[\w#-]+) step (%[\w#-]+)(?: iter_args\((.*?)\))?", operation.text
        )
        variable, low, high, step = head[1], *(self.values.get(head[i]) for i in (2, 3, 4))
        carried = re.findall(r"(%[\w-]+) = (%[\w#-]+)", head[5] or "")
        state = [self.values.get(initial) for _, initial in carried]
        if None in (low, high, step):
            raise LookupError(f"the loop in line {operation.line} depends on values in memory")
        count = max(0, -(-(high - low) // step))
        body = operation.blocks[0]
        self.passes[operation.line] += count
        each = range(low, high, step) if loops(body) or any(isinstance(s, int) for s in state) else ()
        for value in each:
            self.values |= {variable: value} | dict(zip((name for name, _ in carried), state, strict=True))
            state = self.run(body)
        return state

    def _while(self, operation: Operation) -> list:
        carried = re.findall(r"(%[\w-]+) = (%[\w#-]+)", operation.text.split(" : ")[0])
        state = [self.values.get(initial) for _, initial in carried]
        before, after = operation.blocks
        while True:
            self.values |= dict(zip((name for name, _ in carried), state, strict=True))
            condition, *passed = self.run(before)
            if not condition:  # a program that waits for another is taken to wait for one pass
                if condition is None:
                    self.passes[operation.line] += 1
                return passed
            self.passes[operation.line] += 1
            self.values |= dict(zip(after.arguments, passed, strict=True))
            state = self.run(after)


def trips(body: Block, arguments: dict, grid: tuple[int, ...]) -> list[float]:
    """Returns the passes of each loop in order, over the whole run of a program, averaged over programs of the grid.

    Raises LookupError where a loop's bounds are not known.
    """
    found = loops(body)
    if not found:
        return []
    draw = random.Random(0)
    places = [tuple(draw.randrange(n) for n in grid) for _ in range(PROGRAMS)]
    total: Counter = Counter()
    for place in places:
        program = Program(arguments, place, grid)
        program.run(body)
        total += program.passes
    return [total[loop.line] / PROGRAMS for loop in found]
