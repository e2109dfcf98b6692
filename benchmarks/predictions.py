# SPDX-License-Identifier: Apache-2.0
"""Reads the predicted times of the ops' kernels on GPUs: ``results/predicted.json``, one row per line.

They are predictions of a cost model, not measurements: ``python -m fastasr.benchmarks.studies.predict`` writes them.
"""

import json
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("results") / "predicted.json"


@cache
def rows() -> tuple[dict, ...]:
    """Returns the predictions, in the order of the file; none where the file is absent."""
    return tuple(json.loads(FILE.read_text())) if FILE.exists() else ()


def write(found: list[dict]) -> None:
    """Replaces the file: a JSON array with one row per line."""
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    rows.cache_clear()


def predicted(op: str, phase: str, shape_label: str, device: str) -> float | None:
    """Returns the predicted microseconds of a case in bfloat16 on a device, or None where there is no prediction.

    ``phase`` is "forward", "backward" or "forward+backward", ``shape_label`` the name of the op's case, and ``device``
    the name that torch gives the GPU, such as "NVIDIA H100 80GB HBM3".
    """
    times = {
        row["phase"]: row["predicted_us"]
        for row in rows()
        if (row["op"], row["case"]) == (op, shape_label) and row["device"] in device
    }
    if phase == "forward+backward" and phase not in times and {"forward", "backward"} <= times.keys():
        return times["forward"] + times["backward"]
    return times.get(phase)
