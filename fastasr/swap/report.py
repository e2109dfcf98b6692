# SPDX-License-Identifier: Apache-2.0
"""The report of a swap: which modules were replaced, which were not, and why."""

import io
import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field

REPLACED = "replaced"
SKIPPED = "skipped"
ROLLED_BACK = "rolled back"


@dataclass
class Row:
    """The result for one module. ``kernels`` are ops of ``fastasr.ops``. Verification fills ``errors``.

    An error is the largest one against an fp64 run of upstream's code, relative to the largest magnitude of the
    result. ``values`` and ``gradients`` are fastasr's errors, ``upstream_values`` and ``upstream_gradients`` those of
    upstream in the model's own precision.
    """

    path: str
    class_name: str
    rule: str | None
    kernels: tuple
    status: str
    reason: str
    errors: dict | None = None


@dataclass
class SwapReport:
    """One row per module of the model, in the order of ``model.named_modules()``.

    ``dry_run`` is True for ``explain``: status "replaced" then means that accelerate would replace the module.
    ``ragged`` says of ``accelerate(ragged=True)``, and in ``explain`` after it, why an encoder runs on padding
    (path -> reason, None: it does not).
    ``graphs`` says of ``accelerate(graphs=True)`` why calls of an encoder are not recorded (path -> reason, None: they
    are).
    ``weights`` is the :class:`fastasr.swap.weights.ReducedReport` of ``accelerate(weights=...)``, or None.
    ``print(report)`` shows equal rows as one line; ``report.table(every=True)`` has one line per module
    and, after them, one per weight.
    """

    model: str
    rows: list = field(default_factory=list)
    dry_run: bool = False
    verified: bool = False
    weights: object = None
    ragged: dict | None = None
    graphs: dict | None = None

    def _with_status(self, status):
        return [row for row in self.rows if row.status == status]

    @property
    def replaced(self):
        return self._with_status(REPLACED)

    @property
    def skipped(self):
        return self._with_status(SKIPPED)

    @property
    def rolled_back(self):
        return self._with_status(ROLLED_BACK)

    @property
    def ok(self):
        """Is False if verification rolled a module back."""
        return not self.rolled_back

    def __getitem__(self, path):
        """Returns the row of the module at ``path``. Raises KeyError if the model has none there."""
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(path)

    def __len__(self):
        return len(self.rows)

    def to_dict(self):
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

    def to_json(self, **options):
        """Returns ``to_dict()`` as JSON; ``options`` are passed to ``json.dumps``."""
        return json.dumps(self.to_dict(), **options)

    @property
    def summary(self):
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
        return "\n".join(lines)

    def table(self, every=False):
        """Returns the report as text: one line per module or, with ``every=False``, per group of equal rows."""
        columns, lines = self._lines(every)
        try:
            text = _rich_table(columns, lines)
        except ImportError:
            text = _plain_table(columns, lines)
        weights = self.weights.every() if every and self.weights is not None else []
        return "\n".join([text, *weights, self.summary])

    def _lines(self, every):
        columns = ["module", "class", "kernels", "status", "error", "reason"]
        if every:
            rows = [(row, row.path or "(the model)") for row in self.rows]
        else:
            rows = _grouped(self.rows)
        lines = [
            [where, row.class_name, kernel_names(row), self._status(row), _largest_error(row), row.reason]
            for row, where in rows
        ]
        return columns, lines

    def _status(self, row):
        return "would be replaced" if self.dry_run and row.status == REPLACED else row.status

    def __str__(self):
        return self.table()

    def __rich__(self):
        columns, lines = self._lines(every=False)
        return _build_rich(columns, lines, self.summary)


def _of_encoders(reasons, how, how_not):
    """Returns the lines of the summary about path -> why an encoder does not run as it was asked to."""
    if reasons is None:
        return []
    left = [f"{path or '(the model)'}: {reason}" for path, reason in reasons.items() if reason]
    counts = f"{how}: {len(reasons) - len(left)} of {len(reasons)} known encoders"
    return [counts, *(f"  {how_not}: {line}" for line in left)]


def kernel_names(row):
    """Returns the ops of a row as text; a dash for none."""
    return " ".join(row.kernels) or "-"


def _grouped(rows):
    """Returns [(row, where)], one per group of equal rows. Modules without a rule share one line per reason."""
    groups = {}
    for row in rows:
        like = row.class_name if row.rule else None
        groups.setdefault((row.status, row.reason, row.rule, like, row.kernels), []).append(row)
    result = []
    for group in groups.values():
        first = group[0]
        path = first.path or "(the model)"
        if first.rule is None and len(group) > 1:
            counts = Counter(row.class_name for row in group)
            names = ", ".join(name if n == 1 else f"{n} {name}" for name, n in counts.most_common())
            errors = None
        else:
            names, errors = first.class_name, _worst(group)
        merged = Row(path, names, first.rule, first.kernels, first.status, first.reason, errors)
        result.append((merged, path if len(group) == 1 else f"{len(group)} x, first {path}"))
    order = [REPLACED, ROLLED_BACK, SKIPPED]
    return sorted(result, key=lambda item: order.index(item[0].status))


def _worst(group):
    errors = {}
    for row in group:
        for name, value in (row.errors or {}).items():
            errors[name] = max(errors.get(name, 0.0), value)
    return errors or None


def _largest_error(row):
    if not row.errors:
        return ""
    values = [row.errors[k] for k in ("values", "gradients") if row.errors.get(k) is not None]
    return f"{max(values):.1e}" if values else ""


def _build_rich(columns, lines, caption=None):
    from rich.table import Table

    table = Table(caption=caption, caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    styles = {REPLACED: "green", ROLLED_BACK: "bold red", SKIPPED: "dim"}
    for line in lines:
        table.add_row(*[_escape(cell) for cell in line], style=styles.get(line[3]))
    return table


def _escape(cell):
    from rich.markup import escape

    return escape(cell)


def _rich_table(columns, lines):
    from rich.console import Console

    width = max(110, shutil.get_terminal_size((150, 24)).columns)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(_build_rich(columns, lines))
    return console.file.getvalue().rstrip("\n")


def _plain_table(columns, lines):
    rows = [columns, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
