# SPDX-License-Identifier: Apache-2.0
"""The training log, a CSV file with a row per step. A resumed run continues it."""

import csv
import os
from pathlib import Path

COLUMNS = ("step", "epoch", "loss", "simple", "pruned", "ctc", "lr", "batch", "audio_seconds", "seconds")


class Log:
    """A training log. Opening it drops the rows after ``step``, since a run resumed from there repeats these steps."""

    def __init__(self, path, step=0):
        self.path = Path(path)
        rows = []
        if step and self.path.is_file():
            with self.path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["step"] and int(row["step"]) <= step]
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({name: row.get(name, "") for name in COLUMNS} for row in rows)
        os.replace(unfinished, self.path)
        self._file = self.path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def write(self, **row):
        self._writer.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()})
        self._file.flush()

    def close(self):
        self._file.close()
