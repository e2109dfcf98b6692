# SPDX-License-Identifier: Apache-2.0
"""Reads the PTX of a kernel, as Triton and LLVM write it."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    guard: str | None  # the predicate that it asks first
    unless: bool  # the guard is negated
    operation: tuple[str, ...]  # "ld", "global", "v4", "b32"
    # registers, numbers, symbols; {a, b} is a tuple, [a + 4] a string
    operands: tuple[str | tuple[str, ...], ...]

    @property
    def text(self) -> str:
        return ".".join(self.operation) + " " + ", ".join(map(str, self.operands))


@dataclass
class Program:
    name: str
    parameters: list[tuple[str, str]]  # name and type
    instructions: list[Instruction]
    labels: dict[str, int]  # places in ``instructions``


def read(text: str) -> Program:
    """Returns the only kernel of a module."""
    text = re.sub(r"//[^\n]*", "", text)
    name, parameters = re.search(r"\.entry\s+(\w+)\(([^)]*)\)", text).groups()
    body = text[text.index("{", text.index(parameters) + len(parameters)) + 1 :]
    body = body[: body.find("\n}")]
    instructions, labels = [], {}
    for line in body.splitlines():
        line = line.strip()
        if line.startswith((".loc", ".reg", ".file")):
            continue
        if label := re.fullmatch(r"(\$?[\w$.]+):", line):
            labels[label[1]] = len(instructions)
            continue
        for statement in line.split(";"):
            statement = statement.strip().lstrip("{} \t")
            if statement and not statement.startswith("."):
                instructions.append(_instruction(statement))
    found = re.findall(r"\.param\s+\.(\w+)[^,\n]*?(\w+)(?=,|\s*$)", parameters, re.MULTILINE)
    return Program(name, found, instructions, labels)


def _instruction(statement: str) -> Instruction:
    guard = re.match(r"@(!?)\s*([%\w$]+)\s+", statement)
    if guard:
        statement = statement[guard.end() :]
    operation, *more = re.split(r"\s+", statement, maxsplit=1)
    rest = more[0] if more else ""
    operands = tuple(_operand(o) for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest))
    return Instruction(guard and guard[2], bool(guard and guard[1]), tuple(operation.split(".")), operands)


def _operand(text: str) -> str | tuple[str, ...]:
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    return re.sub(r"\s+", "", text)
