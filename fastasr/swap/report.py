# SPDX-License-Identifier: Apache-2.0
"""The report of a swap: which modules were replaced, which were not, and why."""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

REPLACED = "replaced"
SKIPPED = "skipped"
ROLLED_BACK = "rolled back"

WIDTH = 80  # columns of the printed report
_COUNT = 7  # "  12 x "
_ERRORS = len(" 1.2e-03 of 4.5e-06")
_NOTE = len(" [12]")
_CLASSES = 40
_DRAWS = (
    "`with fastasr.upstream_draws():` gives upstream's dropout; docs/swap.md has it under "
    '"Dropout of attention weights"'
)


@dataclass
class Row:
    """The result for one module. ``kernels`` are ops of ``fastasr.ops``. Verification fills ``errors``.

    An error is the largest one against an fp64 run of upstream's code, relative to the largest magnitude of the
    result. ``values`` and ``gradients`` are fastasr's errors, ``upstream_values`` and ``upstream_gradients`` those of
    upstream in the model's own precision. ``allowed`` holds the errors that pass, for ``values`` and ``gradients``.
    ``like`` is the path of a like module if that one's fp64 run served this one too: ``values`` and ``gradients`` are
    then sums of the measured difference from upstream and of upstream's error there.
    """

    path: str
    class_name: str
    rule: str | None
    kernels: tuple
    status: str
    reason: str
    errors: dict | None = None
    allowed: dict | None = None
    like: str | None = None


@dataclass
class SwapReport:
    """One row per module of the model, in the order of ``model.named_modules()``.

    ``dry_run`` is True for ``explain``: status "replaced" then means that accelerate would replace the module.
    ``ragged`` says of ``accelerate(ragged=True)``, and in ``explain`` after it, why an encoder runs on padding
    (path -> reason, None: it does not).
    ``graphs`` says of ``accelerate(graphs=True)`` why calls of an encoder are not recorded (path -> reason, None: they
    are).
    ``weights`` is the :class:`fastasr.swap.weights.ReducedReport` of ``accelerate(weights=...)``, or None.
    ``print(report)`` shows equal rows as one, in two lines of at most 80 columns; ``report.table(every=True)`` has a
    row per module and, after them, a line per weight.
    """

    model: str
    rows: list = field(default_factory=list)
    dry_run: bool = False
    verified: bool = False
    weights: Any = None  # a weights.ReducedReport
    ragged: dict | None = None
    graphs: dict | None = None

    def _with_status(self, status: str) -> list[Row]:
        return [row for row in self.rows if row.status == status]

    @property
    def replaced(self) -> list[Row]:
        return self._with_status(REPLACED)

    @property
    def skipped(self) -> list[Row]:
        return self._with_status(SKIPPED)

    @property
    def rolled_back(self) -> list[Row]:
        return self._with_status(ROLLED_BACK)

    @property
    def ok(self) -> bool:
        """Is False if verification rolled a module back."""
        return not self.rolled_back

    def __getitem__(self, path: str) -> Row:
        """Returns the row of the module at ``path``. Raises KeyError if the model has none there."""
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(path)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["kernels"] = list(row["kernels"])
        counts = {
            REPLACED: len(self.replaced),
            SKIPPED: len(self.skipped),
            ROLLED_BACK: len(self.rolled_back),
        }
        return {
            "model": self.model,
            "dry_run": self.dry_run,
            "verified": self.verified,
            "counts": counts,
            "rows": rows,
            "weights": None if self.weights is None else asdict(self.weights),
            "ragged": self.ragged,
            "graphs": self.graphs,
        }

    def to_json(self, **options: Any) -> str:
        """Returns ``to_dict()`` as JSON; ``options`` are passed to ``json.dumps``."""
        return json.dumps(self.to_dict(), **options)

    @property
    def summary(self) -> str:
        verb = "would be replaced" if self.dry_run else "replaced"
        parts = [f"{len(self.replaced)} {verb}", f"{len(self.skipped)} skipped"]
        if self.verified or self.rolled_back:
            parts.append(f"{len(self.rolled_back)} rolled back")
        checked = [row for row in self.replaced if row.errors]
        if self.verified:
            parts.append(f"{len(checked)} verified")
        lines = [f"{self.model}: {', '.join(parts)} ({len(self.rows)} modules)"]
        lines += _of_encoders(self.ragged, "without padding", "runs on padding")
        lines += _of_encoders(self.graphs, "recorded", "not recorded")
        if self.weights is not None:
            lines += [self.weights.summary, *self.weights.lines()]
        return "\n".join(map(wrapped, lines))

    def table(self, every: bool = False) -> str:
        """Returns the report as text, with two lines per module or, with ``every=False``, per group of equal rows."""
        rows = [(1, row) for row in self.rows] if every else _grouped(self.rows)
        lines: list[str] = []
        notes: dict[str, int] = {}
        for status in (REPLACED, ROLLED_BACK, SKIPPED):
            group = [item for item in rows if item[1].status == status]
            if not group:
                continue
            heading = "would be replaced" if self.dry_run and status == REPLACED else status
            verified = any(row.errors for _, row in group)
            lines.append(heading + "error of allowed".rjust(WIDTH - len(heading)) if verified else heading)
            classes = min(_CLASSES - 12 * verified, max(len(row.class_name) for _, row in group))
            for count, row in group:
                lines += _lines_of(count, row, classes, verified, notes)
        for text, number in notes.items():
            lines.append(wrapped(f"[{number}] {text}"))
        if any("upstream_draws" in text for text in notes):
            lines.append(wrapped(_DRAWS))
        if every and self.weights is not None:
            lines += map(wrapped, self.weights.every())
        return "\n".join([*lines, self.summary])

    def __str__(self) -> str:
        return self.table()


def _lines_of(count: int, row: Row, classes: int, verified: bool, notes: dict[str, int]) -> list[str]:
    """Returns the two lines of a row, with the classes in ``classes`` columns. The parts of its reason after the
    first, and text beyond the second line, go to ``notes``, text -> number."""
    name = shortened(row.class_name, classes, middle="," not in row.class_name).ljust(classes)
    room = WIDTH - _COUNT - classes - 1 - (_ERRORS if verified else 0)
    path = shortened(row.path or "(the model)", room).ljust(room)
    first = f"{count:4d} x {name} {path}{_largest_error(row) if verified else ''}".rstrip()
    reason, *others = row.reason.split("; ")
    kernels = " ".join(row.kernels)
    text, room = f"{kernels}: {reason}" if kernels else reason, WIDTH - _COUNT - _NOTE * len(others)
    if len(text) > room:
        others.insert(0, reason)
        text = shortened(text, room - _NOTE, middle=False)
    numbers = (notes.setdefault(other, len(notes) + 1) for other in others)
    return [first, " " * _COUNT + text + "".join(f" [{number}]" for number in numbers)]


def wrapped(line: str) -> str:
    """Returns a line as several of at most 80 columns, of which the later ones are indented."""
    return textwrap.fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


class Restored(int):
    """The number of modules that ``restore`` gave their own forward back. ``print`` and the interactive prompt show
    the other fields too; in an f-string it is the number.

    ``modules`` is the number of modules of the model. ``left`` holds the paths of swapped modules that keep a forward
    which other code bound after the swap. ``weights`` counts the weights whose copies in fewer bits are dropped, and
    ``graphs`` the modules whose recorded calls are.
    """

    model: str
    modules: int
    left: list[str]
    weights: int
    graphs: int

    def __new__(
        cls, count: int, model: str, modules: int, left: list[str], weights: int, graphs: int
    ) -> Self:
        self = super().__new__(cls, count)
        self.model, self.modules, self.left, self.weights, self.graphs = model, modules, left, weights, graphs
        return self

    def __repr__(self) -> str:
        lines = [f"{self.model}: restored {self:d} of {self.modules} modules to their own forward"]
        lines += [f"dropped the copies of {self.weights} weights in fewer bits"] if self.weights else []
        lines += [f"dropped the recorded calls of {self.graphs} modules"] if self.graphs else []
        lines += [f"left {path or '(the model)'}: other code has bound its forward" for path in self.left]
        return "\n".join(map(wrapped, lines))

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return int.__format__(int(self), spec)


def _of_encoders(reasons: dict[str, str | None] | None, how: str, how_not: str) -> list[str]:
    """Returns the lines of the summary about path -> why an encoder does not run as it was asked to."""
    if reasons is None:
        return []
    if not reasons:
        return [f"{how}: the model holds no encoder that fastasr knows"]
    left = [f"{path or '(the model)'}: {reason}" for path, reason in reasons.items() if reason]
    counts = f"{how}: {len(reasons) - len(left)} of {len(reasons)} known encoders or layers"
    return [counts, *(f"  {how_not}: {line}" for line in left)]


def _grouped(rows: Iterable[Row]) -> list[tuple[int, Row]]:
    """Returns [(count, row)], one per group of equal rows. Modules without a rule share a row per reason."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        like = row.class_name if row.rule else None
        groups.setdefault((row.status, row.reason, row.rule, like, row.kernels), []).append(row)
    result = []
    for group in groups.values():
        first, names = group[0], group[0].class_name
        if first.rule is None and len(group) > 1:
            counts = Counter(row.class_name for row in group)
            names = ", ".join(name if n == 1 else f"{n} {name}" for name, n in counts.most_common())
        merged = Row(first.path, names, first.rule, first.kernels, first.status, first.reason, *worst(group))
        result.append((len(group), merged))
    return result


def worst(rows: Sequence[Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the largest errors of rows that have some, and the errors that are allowed there."""
    errors: dict[str, float] = {}
    allowed: dict[str, float] = {}
    for row in rows:
        for name, value in (row.errors or {}).items():
            if value >= errors.get(name, 0.0):
                errors[name] = value
                if name in row.allowed:
                    allowed[name] = row.allowed[name]
    return errors, allowed


def shortened(text: str, width: int, middle: bool = True) -> str:
    """Returns ``text`` in at most ``width`` characters, shortened in the middle or at the end."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2 if middle else 0
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}" if width > 0 else ""


def _largest_error(row: Row) -> str:
    """Returns the error that is largest relative to what is allowed, and the allowed one."""
    errors, allowed = row.errors or {}, row.allowed or {}
    shares = {name: errors[name] / limit if limit else 0.0 for name, limit in allowed.items()}
    if not shares:
        return ""
    name = max(shares, key=lambda name: shares[name])
    return f" {errors[name]:.1e} of {allowed[name]:.1e}"
