# SPDX-License-Identifier: Apache-2.0
"""Benchmark rows and their JSON Lines files.

A row is one implementation of one case in one pass. The rows of a case and pass were measured interleaved and form a
*unit*; a unit is written and replaced as a whole.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastasr import files
from fastasr.benchmarks.environment import code, stamp


@dataclass
class Row:
    """One measurement. Times are wall-clock milliseconds of one call.

    ``suite`` "ops" | "models" | "dispatch" | "sweep"; ``name`` the op or model; ``case`` which of its cases;
    ``shape`` and ``dtype`` of the main input; ``implementation`` "eager" | "compile" | "upstream" |
    "fastasr" | "copy" | .... ``peak_bytes``: memory beyond that held before the call. ``bytes`` and
    ``flops``: the least that the mathematics needs. ``fraction_of_limit``: least possible time on this
    machine over the median, 1.0 being the limit, which ``limit`` names. ``load``: cores kept busy by other
    processes meanwhile. On a GPU ``median_ms`` is the device's time; ``host_ms`` is the median until the call returns.
    Of a whole model on a GPU ``median_ms`` is the wall clock's time of a call, and ``busy_ms`` the time of its kernels.
    ``note``: which implementation could not be measured beside this one, and why.
    ``code``: a hash of the files that the op or model is made of.
    """

    suite: str
    name: str
    case: str
    shape: str
    dtype: str
    device: str
    # "pass" is a keyword of Python: the attribute is pass_, the key in the file is "pass"
    pass_: str
    implementation: str
    median_ms: float
    q1_ms: float
    q3_ms: float
    reps: int
    peak_bytes: int | None = None
    bytes: int | None = None
    flops: int | None = None
    fraction_of_limit: float | None = None
    limit: str | None = None
    load: float | None = None
    host_ms: float | None = None
    busy_ms: float | None = None
    note: str = ""
    code: str = ""
    commit: str = ""
    torch: str = ""
    triton: str | None = None
    cuda: str | None = None
    device_name: str = ""
    threads: int = 0
    python: str = ""
    date: str = ""

    @classmethod
    def measured(cls, **fields) -> "Row":
        """Returns a row stamped with the present environment."""
        device = fields["device"]
        return cls(**{**fields, "code": code(fields["suite"], fields["name"], device), **stamp(device)})

    @property
    def unit(self) -> tuple:
        """Identifies rows that were measured together and the kind of machine, without the commit."""
        return (
            self.suite,
            self.name,
            self.case,
            self.shape,
            self.pass_,
            self.dtype,
            self.device,
            self.device_name,
            self.threads,
        )

    @property
    def old(self) -> bool:
        """Says whether the code has changed since. Rows without a hash count as old."""
        now = code(self.suite, self.name, torch.device(self.device).type)
        return bool(now) and self.code != now

    def to_dict(self) -> dict:
        return {("pass" if key == "pass_" else key): value for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "Row":
        """Makes a row of a dict and drops fields this version does not know. Raises ``ValueError`` if a required field
        is missing.
        """
        values = {("pass_" if key == "pass" else key): value for key, value in values.items()}
        known = {field.name: field for field in dataclasses.fields(cls)}
        missing = [
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and name not in values
        ]
        if missing:
            raise ValueError(f"benchmark row lacks {', '.join(missing)}")
        return cls(**{key: value for key, value in values.items() if key in known})


def array(found: Iterable[dict]) -> str:
    """Returns a JSON array with one element per line, so that a change shows as lines."""
    return "[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n"


def read(path: str | os.PathLike) -> list[Row]:
    """Returns the rows of a JSON Lines file, in file order; an absent file has none. Raises ``ValueError`` with the
    line.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row.from_dict(json.loads(line)))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return rows


def read_all(paths: Iterable[str | os.PathLike]) -> list[Row]:
    return [row for path in paths for row in read(path)]


def write(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Replaces the file in one step: a reader, or an interrupt, never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, "".join(json.dumps(row.to_dict()) + "\n" for row in rows))


def merge(path: str | os.PathLike, new: Iterable[Row]) -> list[Row]:
    """Adds ``new`` to the file, replacing older rows of the same units. Returns all rows of the file."""
    new = list(new)
    units = {row.unit for row in new}
    rows = [row for row in read(path) if row.unit not in units] + new
    write(path, rows)
    return rows
