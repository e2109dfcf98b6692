# SPDX-License-Identifier: Apache-2.0
"""Writes the C++ side of an op: for each pass a struct of the arguments, which checks them.

A file in ``csrc/bindings`` asks for it by including ``bindings/written/<op>.h``. The checks guard memory, so they
repeat in C++ what the annotations say of ranks, sizes, dtypes and strides.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fastasr.testing.declared import Declared
from fastasr.testing.declared.shapes import Pattern, Shape, condition
from fastasr.testing.declared.signature import Argument, Output

HEAD = """// SPDX-License-Identifier: Apache-2.0
// `make op OP={name}` writes this file from {source}: change that one.
#pragma once

#include "bindings/arguments.h"

namespace fastasr::bindings::{name} {{
"""
SIZES = """
// Finds the sizes {names}, which other arguments give. The binding defines it.
template <typename A>
void find_sizes(A& a);
"""
# kind of an argument -> its type on the stack, and as a member
TYPES = {
    "tensor": ("Tensor", "const Tensor&"),
    "tensor or none": ("Optional", "const Optional&"),
    "int": ("int64_t", "int64_t"),
    "float": ("double", "double"),
    "bool": ("bool", "bool"),
    "pair": ("int64_t, int64_t", "std::array<int64_t, 2>"),
}

_SHAPE = re.compile(r"(\w+)\.shape\[(\d)\]")


def write(op: Declared) -> str:
    """Returns the header of an op, not yet formatted."""
    source = f"fastasr/ops/{Path(op.op.definition.__code__.co_filename).name}"
    parts = [HEAD.format(name=op.name, source=source)]
    if op.sizes:
        parts.append(SIZES.format(names=", ".join(_given(op))))
    parts.append(_Call(op, "forward", op.forward).struct())
    if op.differentiable and (op.op.backward or op.op.gradients is None or op.op.fast is not False):
        parts.append(_Call(op, "backward", op.backward).struct())
    return "\n".join([*parts, f"}}  // namespace fastasr::bindings::{op.name}\n"])


def formatted(text: str, root: Path) -> str:
    """Returns a header as clang-format lays it out."""
    command = [Path(sys.executable).with_name("clang-format"), f"--style=file:{root / '.clang-format'}"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def _given(op: Declared) -> list[str]:
    return [name for names in op.sizes for name in names.split()]


class _Call:
    """One pass: its arguments in the kernels' order."""

    def __init__(self, op: Declared, which: str, tokens: list[str]):
        self.op = op
        self.name = f"{op.name}_{which}"
        self.tokens = tokens
        # a token ``x.shape[1]`` -> the name of this size
        self.numbers = {
            found[0]: self._size(*found.groups()) for found in map(_SHAPE.fullmatch, tokens) if found
        }
        self.members = [self._member(token) for token in tokens]
        self.given = {name for name, _ in self.members}
        self.sizes: list[tuple[str, str]] = []  # (type, name) of the sizes that checks bind

    def _member(self, token: str) -> tuple[str, str]:
        """Returns (name, kind) of the argument that a token of the declaration stands for."""
        op, token = self.op, re.sub(r"\((\w+) or \w+\)", r"\1", token)
        members = {f"needs.{a.name}": (f"needs_{a.name}", "bool") for a in op.differentiable}
        members |= {"*" * (a.kind == "pair") + a.name: (a.name, _kind(a)) for a in op.arguments}
        members |= {token: (name, "int") for token, name in self.numbers.items()}
        for o in op.found:
            grad = "tensor or none" if self._may_be_none(o) else "tensor"
            members |= {o.name: (o.name, "tensor"), f"grad_{o.name}": (f"grad_{o.name}", grad)}
        members["keep"] = "keep", "bool"
        if token not in members:
            raise ValueError(f"{op.name}: {token}: expected a name in the calls that C++ kernels serve")
        return members[token]

    def _size(self, name: str, place: str) -> str:
        return self.op.argument(name).pattern.alternatives[0].dims[int(place)].text

    def _may_be_none(self, o: Output) -> bool:
        """Says whether an output may have no gradient. Outputs that are gradients need none either."""
        return bool(o.flag) or not self.op.materialize or any(other.constant for other in self.op.outputs)

    # ----------------------------------------------------------------------- the struct
    def struct(self) -> str:
        checks = "\n".join(self._checks())
        members = (f"{TYPES[kind][1]} {member};" for member, kind in self.members)
        sizes = [f"{type_} {size}{{}};" for type_, size in self.sizes]
        note = ["", "// The sizes, once the arguments are checked."] * bool(sizes)
        lines = [
            f"struct {self.name.title().replace('_', '')} {{",
            f'static constexpr const char* kName = "{self.name}";',
            f"using Types = ArgumentTypes<{', '.join(TYPES[kind][0] for _, kind in self.members)}>;",
            "",
            *members,
            *note,
            *sizes,
            "",
            "// Declines the call if an argument does not fit the declaration.",
            f"void check(const char* op = kName) {{\n{checks}\n}}",
            "};",
        ]
        return "\n".join(["", *lines, ""])

    # ----------------------------------------------------------------------- checks
    def _checks(self) -> Iterator[str]:
        op, known = self.op, self.op.known_sizes() | set(self.numbers.values())
        for a in op.options:
            yield from self._option(a)
        yield from (f'fastasr::check({size} >= 0, op, "{size}");' for size in self.numbers.values())
        self.sizes += [("int64_t", name) for name in _given(op)]
        led = op.leader.name in self.given
        if not led:
            yield from self._outputs(known, True)
        for a in op.in_binding_order():
            if a.name in self.given:
                yield from self._tensor(a.name, a.optional, a.pattern, self._dtype(a), known, a is op.leader)
            if a is op.leader and op.sizes:
                yield "find_sizes(*this);"
        if led:
            yield from self._outputs(known)

    def _outputs(self, known: set[str], lead: bool = False) -> Iterator[str]:
        """Yields the checks of outputs and of their gradients. If they ``lead``, the first one has the dtype."""
        for o in self.op.found:
            grad = f"grad_{o.name}"
            if o.name in self.given:
                yield from self._tensor(o.name, False, o.pattern, self._output_dtype(o), known, lead)
                lead = False
            if grad in self.given:
                yield from self._tensor(grad, self._may_be_none(o), o.pattern, self._output_dtype(o), known)

    def _option(self, a: Argument) -> Iterator[str]:
        if a.name not in self.given or a.dimension_of:
            return
        values = sorted(a.codes.values())
        if a.codes and values == list(range(len(values))) and not isinstance(values[0], bool):
            yield f'fastasr::check({a.name} >= 0 && {a.name} < {len(values)}, op, "{a.name}");'
        elif a.constraint:
            none = f"{a.name} == 0 or " * (a.kind == "int" and a.name in self.tokens and a.optional)
            text = f"{a.name}: expected {a.expected}"
            yield f'fastasr::check({code(none + a.condition)}, op, "{text}");'

    def _dtype(self, a: Argument) -> str:
        """Returns code for the dtype in which a tensor arrives, or "" where that is its own."""
        op = self.op
        if a.kind is bool:
            return "ScalarType::Bool"
        if not isinstance(a.kind, str):
            if a.kind is int and op.strides.get(a.name) != "int64":
                raise ValueError(f"{op.name}: {a.name}: C++ kernels read int64 alone: expected strides int64")
            return "ScalarType::Long"
        if a.name in op.wide:
            return "compute_type(dtype)"
        converted = op.op.launch is None or a.name in (op.one_dtype or op.dtype_names(op.outputs[0]))
        return "dtype" if a.kind == "floating" and converted else ""

    def _output_dtype(self, o: Output) -> str:
        if not isinstance(o.dtype, tuple):
            raise ValueError(f"{self.op.name}: {o.name}: expected the dtype of arguments")
        return "compute_type(dtype)" if o.wide else "dtype"

    def _tensor(
        self, name: str, optional: bool, pattern, dtype: str, known: set[str], leader: bool = False
    ) -> Iterator[str]:
        tensor = f"*{name}" if optional else name
        read = f"{name}->" if optional else f"{name}."
        lines = []
        if leader:
            lines.append(f'const ScalarType dtype = floating_dtype({tensor}, op, "{name}");')
        elif dtype:
            lines.append(f'check_dtype({tensor}, {dtype}, op, "{name}");')
        if isinstance(pattern, Pattern):
            lines += self._shape(name, tensor, read, pattern, known)
        lines += self._layout(name, tensor)
        yield from [f"if ({name}) {{", *lines, "}"] if optional else lines

    def _layout(self, name: str, tensor: str) -> Iterator[str]:
        layout = self.op.layout(name)
        if callable(layout) or layout in ("channels", "rows"):
            yield f'check_dense_channels({tensor}, op, "{name}");'
        elif layout != "any":
            yield f'check_contiguous({tensor}, op, "{name}");'

    def _shape(self, name: str, tensor: str, read: str, pattern: Pattern, known: set[str]) -> Iterator[str]:
        """Yields code that checks a shape and binds the names in it."""
        before, conditions = set(known), [code(condition(c), 4) for c in pattern.conditions]
        shapes = pattern.alternatives
        if not conditions and any(s.rest == "..." and not s.dims for s in shapes):
            return
        wrong = f'op, "{name} is not {_text(pattern)}"'
        if pattern.whole and not conditions and shapes[0].rest not in before:
            self._bind("Sizes", shapes[0].rest, known)
            yield f"{shapes[0].rest} = {read}sizes();"
            return
        if all(shape.known(before) for shape in shapes):
            fits = " || ".join(_has_sizes(tensor, shape) for shape in shapes)
            fits = f"({fits})" if conditions and len(shapes) > 1 else fits
            yield f"fastasr::check({' && '.join([fits, *conditions])}, {wrong});"
            return
        found = [self._solve(shape, before) for shape in shapes]
        for _, _, _, names in found:
            known |= names
        yield f"{{\nconst Sizes shape = {read}sizes();"
        yield "bool right = false;"
        for i, (rank, needed, bindings, _) in enumerate(found):
            yield f"{'else ' * bool(i)}if ({rank}) {{"
            yield from bindings
            yield f"right = {' && '.join([*needed, *conditions]) or 'true'};\n}}"
        yield f"fastasr::check(right, {wrong});"
        yield "}"

    def _solve(self, shape: Shape, before: set[str]) -> tuple[str, list[str], list[str], set[str]]:
        """Returns (rank condition, conditions, bindings, known names): what Python checks, in C++."""
        if shape.rest == "...":
            raise ValueError(f"{self.op.name}: expected a name for the dimensions before others")
        known = set(before)
        rank, conditions, bindings = shape.solve(known, "shape")
        lines = []
        for name, _, value in (binding.partition(" = ") for binding in bindings):
            self._bind("Sizes" if name == shape.rest else "int64_t", name, known)
            lines.append(f"{name} = {code(value)};")
        return code(rank), [code(c, 4) for c in conditions], lines, known

    def _bind(self, type_: str, name: str, known: set[str]) -> None:
        known.add(name)
        if (type_, name) not in self.sizes:
            self.sizes.append((type_, name))


def _kind(a: Argument) -> str:
    if a.pattern:
        return "tensor or none" if a.optional else "tensor"
    if a.codes:
        return "bool" if isinstance(next(iter(a.codes.values())), bool) else "int"
    return "bool" if a.kind == "flag" else a.kind


def _has_sizes(tensor: str, shape: Shape) -> str:
    rest = f"{shape.rest}, " if shape.rest else ""
    return f"has_sizes({tensor}, {rest}{{{', '.join(code(d.text) for d in shape.dims)}}})"


def _text(pattern: Pattern) -> str:
    shapes = (
        f"({', '.join([f'*{s.rest}'] * bool(s.rest) + [d.text for d in s.dims])})"
        for s in pattern.alternatives
    )
    return ", ".join((" or ".join(shapes), *pattern.conditions))


# --------------------------------------------------------------------------- expressions
SIGNS = {
    ast.Add: ("+", 6), ast.Sub: ("-", 6), ast.Mult: ("*", 7), ast.FloorDiv: ("/", 7), ast.Mod: ("%", 7),
    ast.Eq: ("==", 4), ast.GtE: (">=", 5), ast.LtE: ("<=", 5), ast.Gt: (">", 5), ast.Lt: ("<", 5),
    ast.And: ("&&", 3), ast.Or: ("||", 2),
}  # fmt: skip


def code(text: str, least: int = 0) -> str:
    """Returns an expression of the declarations in C++, in parentheses if it binds less tightly than ``least``.

    ``a and b`` of sizes is b, or 0 where a is 0. ``//`` becomes ``/``, which is the same from 0 on.
    """
    return _code(ast.parse(text.strip(), mode="eval").body, least)


def _code(node: ast.expr, least: int) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant):
        return "std::numeric_limits<double>::infinity()" if node.value == float("inf") else str(node.value)
    if isinstance(node, ast.Call):  # len(shape)
        return f"{_code(node.args[0], 9)}.size()"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and node.slice.upper:
        return f"shape.slice(0, shape.size() {_code(node.slice.upper, 7)})"
    if isinstance(node, ast.Subscript):
        place = _code(node.slice, 7)
        return f"shape[{f'shape.size() {place}' if place[0] == '-' else place}]"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return f"-{_code(node.operand, 8)}"
    if isinstance(node, ast.BoolOp) and not all(isinstance(v, ast.Compare | ast.BoolOp) for v in node.values):
        first, second = node.values
        return f"({_code(first, 4)} ? {_code(second, 3)} : 0)"
    if isinstance(node, ast.BoolOp):
        sign, level = SIGNS[type(node.op)]
        text = f" {sign} ".join(_code(value, level + 1) for value in node.values)
    elif isinstance(node, ast.Compare):
        pairs = zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)
        level = 5 if len(node.ops) == 1 else 3
        text = " && ".join(f"{_code(a, 6)} {SIGNS[type(o)][0]} {_code(b, 6)}" for a, o, b in pairs)
    elif isinstance(node, ast.BinOp) and not any(isinstance(n, ast.Name) for n in ast.walk(node)):
        return str(eval(compile(ast.Expression(node), "<shape>", "eval")))
    elif isinstance(node, ast.BinOp):
        sign, level = SIGNS[type(node.op)]
        left, right = _code(node.left, level), _code(node.right, level + 1)
        if right == "0" and sign in "+-":
            return _code(node.left, least)
        text = f"{left} + {right[1:]}" if sign == "-" and right[0] == "-" else f"{left} {sign} {right}"
    else:
        raise ValueError(f"{ast.unparse(node)}: expected names, numbers and arithmetic")
    return f"({text})" if level < least else text
