# SPDX-License-Identifier: Apache-2.0
"""The training log, a CSV file with a row per step. A resumed run continues it."""

import csv
from pathlib import Path
from typing import Any

from fastasr import files

COLUMNS = ("step", "epoch", "loss", "simple", "pruned", "ctc", "lr", "batch", "audio_seconds", "seconds")


def read(path: Path | str) -> list[dict]:
    """Returns the rows of a log, {column: text} with a step of int. A last row that a full disk has cut is left out.
    Raises ValueError if the file is not a training log.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    try:
        rows = [row for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()) if row["step"]]
        return [{**row, "step": int(row["step"])} for row in rows]
    except (csv.Error, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no training log: {type(error).__name__}: {error}") from None


class Log:
    """A training log. Opening it drops the rows after ``step``, since a run resumed from there repeats these steps.
    Raises ValueError as ``read`` does.
    """

    def __init__(self, path: Path | str, step: int = 0) -> None:
        self.path = Path(path)
        rows = []
        if step and self.path.is_file():
            rows = [row for row in read(self.path) if row["step"] <= step]
        with files.replacing(self.path) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({name: row.get(name, "") for name in COLUMNS} for row in rows)
        self._file = self.path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def write(self, **row: Any) -> None:
        self._writer.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()})
        self._file.flush()

    def close(self) -> None:
        self._file.close()
