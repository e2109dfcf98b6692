# SPDX-License-Identifier: Apache-2.0
"""Shapes as a declaration writes them: parsed once, then written as code or printed in a message.

T B 2*C          three dimensions; a name is bound where it first stands and must agree from there on
(T and 2*T-1) C  an expression with spaces stands in parentheses
C 1 K | C K      one shape or the other
*S C             any dimensions, then one more
C 1 K, K odd     with conditions: ``<name> odd``, or a comparison: C >= 1
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

Names = dict[str, Any]  # sizes by name; the size of *S is a tuple
_compiled = cache(compile)


@dataclass(frozen=True)
class Dim:
    """One dimension: a name, a number or an expression of them."""

    text: str

    @cached_property
    def names(self) -> frozenset[str]:
        if not re.fullmatch(r"([\w ()+*-]|//)+", self.text):
            raise ValueError(f"{self.text}: expected names and numbers with + - * // and")
        return frozenset(re.findall(r"[A-Za-z_]\w*", self.text)) - {"and"}

    def value(self, names: Names) -> int:
        return eval(_compiled(self.text, "<shape>", "eval"), {"__builtins__": {}}, names)

    def unknown(self, known: set[str]) -> tuple[str, str, str] | None:
        """Returns (name, a, b) where the one unknown name is (size − b) / a; None where all names are known."""
        missing = sorted(self.names - known)
        if not missing:
            return None
        if len(missing) > 1 or not self._linear(missing[0]):
            raise ValueError(f"{self.text}: {', '.join(missing)}: expected an earlier argument to bind it")
        b, more = (re.sub(rf"\b{missing[0]}\b", n, self.text) for n in "01")
        factor = re.fullmatch(r"(\w+)\*0|0\*(\w+)|0", b)
        if factor:
            return missing[0], factor[1] or factor[2] or "1", "0"
        if len(self.names) == 1:
            b = str(self.value({missing[0]: 0}))
        a = {self._step(missing[0], n) for n in (7, 11)}
        return missing[0], str(a.pop()) if len(a) == 1 else f"({more} - ({b}))", b

    def _step(self, name: str, others: int, size: int = 1) -> int:
        """Returns how much longer the dimension is with ``size`` of one name than with none of it."""
        names = dict.fromkeys(self.names, others)
        return self.value(names | {name: size}) - self.value(names | {name: 0})

    def _linear(self, name: str) -> bool:
        return 1 <= self._step(name, 7) == self._step(name, 7, 5) / 5


@dataclass(frozen=True)
class Shape:
    """Dimensions, the first of which may stand for any number of them: ``*S`` (bound) or ``...``."""

    rest: str  # "S", "..." or ""
    dims: tuple[Dim, ...]

    @classmethod
    def parse(cls, text: str) -> "Shape":
        first, *others = words(text) or [""]
        if first == "..." or first.startswith("*"):
            return cls(first.lstrip("*"), tuple(map(Dim, others)))
        return cls("", tuple(map(Dim, words(text))))

    def known(self, known: set[str]) -> bool:
        return self.rest != "..." and ({self.rest} - {""} | {n for d in self.dims for n in d.names}) <= known

    def anything(self, known: set[str]) -> bool:
        """Says whether every shape fits."""
        return not self.dims and (self.rest == "..." or self.rest not in known | {""})

    def listed_code(self, known: set[str]) -> str:
        """Returns code for the shape in an error message, with the sizes that are known."""
        rest = [f"*{self.rest}" if self.rest in known else '"..."'] if self.rest else []
        dims = (d.text if d.names <= known else _text_code(d.text, known) for d in self.dims)
        return f"listed({', '.join((*rest, *dims))})"

    def tuple_code(self) -> str:
        parts = [f"*{self.rest}"] * bool(self.rest) + [d.text for d in self.dims]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"

    def solve(self, known: set[str], shape: str) -> tuple[str, list[str], list[str]]:
        """Returns (rank condition, conditions, bindings) as code over the variable ``shape``, and adds to ``known``."""
        count = len(self.dims)
        rank = f"len({shape}) {'>=' if self.rest else '=='} {count}"
        conditions: list[str] = []
        bindings: list[str] = []
        if self.rest not in ("", "..."):
            rest = f"{shape}[:{-count}]" if count else shape
            (conditions if self.rest in known else bindings).append(
                f"{rest} == {self.rest}" if self.rest in known else f"{self.rest} = {rest}"
            )
            known.add(self.rest)
        for i, dim in enumerate(self.dims):
            size = f"{shape}[{i - count if self.rest else i}]"
            solved = dim.unknown(known)
            if solved is None:
                conditions.append(f"{size} == {dim.text}")
                continue
            name, a, b = solved
            value = size if b == "0" else f"({size} - ({b}))"
            if a != "1":
                conditions.append(f"{value} % {a} == 0")
            if b != "0" and b[0] != "-":
                conditions.append(f"{value} >= 0")
            bindings.append(f"{name} = {value}{f' // {a}' if a != '1' else ''}")
            known.add(name)
        return rank, conditions, bindings


@dataclass(frozen=True)
class Pattern:
    """Alternative shapes with the conditions on their names."""

    alternatives: tuple[Shape, ...]
    conditions: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        shapes, *conditions = text.split(",")
        return cls(tuple(map(Shape.parse, shapes.split("|"))), tuple(c.strip() for c in conditions))

    @property
    def names(self) -> set[str]:
        dims = {n for shape in self.alternatives for d in shape.dims for n in d.names}
        return dims | {shape.rest for shape in self.alternatives} - {"", "..."}

    @property
    def whole(self) -> bool:
        """Says whether one name stands for the whole shape."""
        return len(self.alternatives) == 1 and not self.alternatives[0].dims

    def text_code(self, known: set[str], like: str) -> str:
        """Returns code for the text of an error message; ``like`` is another argument with the same pattern, or ""."""
        parts = [f"{{{shape.listed_code(known)}}}" for shape in self.alternatives]
        conditions = "".join(f", {_braced(c, known)}" for c in self.conditions)
        of = f" (that of {like})" if self.whole and like else ""
        if len(parts) == 1 and not conditions and not of:
            return parts[0][1:-1]
        quote = "'" if '"' in (text := f"{' or '.join(parts)}{conditions}{of}") else '"'
        return f"f{quote}{text}{quote}"

    def bind(self, known: set[str], tensor: str) -> Iterator[str]:
        """Returns lines that bind the names of a shape that fits."""
        before, shape = set(known), f"{tensor}.shape"
        if self.names <= before:
            return
        single = len(self.alternatives) == 1
        for i, alternative in enumerate(self.alternatives):
            found = set(before)
            rank, _, bindings = alternative.solve(found, shape)
            if not single:
                yield f"{'el' if i else ''}if {rank}:"
            yield from (bindings if single else (f"    {b}" for b in bindings or ["pass"]))
            known |= found

    def check(self, known: set[str], tensor: str, wrong: str) -> Iterator[str]:
        """Returns lines that bind the names, and run ``wrong`` where the shape does not fit."""
        before = set(known)
        conditions = [condition(c) for c in self.conditions]
        if not conditions and any(shape.anything(before) for shape in self.alternatives):
            yield from self.bind(known, tensor)
            return
        if all(shape.known(before) for shape in self.alternatives):
            differs = " and ".join(f"{tensor}.shape != {shape.tuple_code()}" for shape in self.alternatives)
            yield f"if {' or '.join([differs, *(f'not {c}' for c in conditions)])}:"
            yield f"    {wrong}"
            return
        yield f"shape, right = {tensor}.shape, False"
        for i, alternative in enumerate(self.alternatives):
            found = set(before)
            rank, needed, bindings = alternative.solve(found, "shape")
            yield f"{'el' if i else ''}if {rank}:"
            yield from (f"    {b}" for b in bindings)
            yield f"    right = {' and '.join((*needed, *conditions)) or True}"
            known |= found
        yield "if not right:"
        yield f"    {wrong}"


def _braced(text: str, known: set[str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda m: f"{{{m[0]}}}" if m[0] in known else m[0], text)


def _text_code(text: str, known: set[str]) -> str:
    braced = _braced(text, known)
    return f'f"{braced}"' if braced != text else f'"{text}"'


def words(text: str) -> list[str]:
    """Splits at spaces outside parentheses."""
    return re.findall(r"(?:\([^()]*\)|\S)+", text)


def condition(text: str) -> str:
    return re.sub(r"^(\w+) odd$", r"\1 % 2 == 1", text)
