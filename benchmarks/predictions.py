# SPDX-License-Identifier: Apache-2.0
"""Reads the predicted times of the ops' kernels on GPUs: ``results/predicted.json``, one row per line.

They are predictions of a cost model, not measurements: ``python -m fastasr.benchmarks.studies.predict`` writes them.
"""

import json
from functools import cache
from pathlib import Path

from fastasr import files
from fastasr.benchmarks.rows import array

FILE = Path(__file__).with_name("results") / "predicted.json"


@cache
def rows() -> tuple[dict, ...]:
    """Returns the predictions, in the order of the file; none where the file is absent."""
    return tuple(json.loads(FILE.read_text())) if FILE.exists() else ()


def write(found: list[dict]) -> None:
    """Replaces the file: a JSON array with one row per line."""
    files.write(FILE, array(found))
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


NONE_YET = "No predictions yet."
LOSES = 1.25  # a prediction this much longer than torch's best is beyond what the model cannot tell apart


def _cell(row: dict) -> str:
    text = " / ".join(
        "–" if row[name] is None else f"{row[name]:.0f}" for name in ("predicted_us", "roof_us", "torch_us")
    )
    return f"**{text}**" if row["torch_us"] and row["predicted_us"] > LOSES * row["torch_us"] else text


def table() -> str:
    """Returns the predictions as Markdown: a line for each pass, a column for each device."""
    found = rows()
    if not found:
        return NONE_YET
    devices = list(dict.fromkeys(row["device"] for row in found))
    lines: dict[tuple, dict[str, dict]] = {}
    for row in found:
        lines.setdefault((row["op"], row["case"], row["phase"]), {})[row["device"]] = row
    made = [f"| predicted / roof / torch, µs | {' | '.join(devices)} |", "|---|" + "---:|" * len(devices)]
    for (op, case, phase), cells in lines.items():
        texts = (_cell(cells[device]) if device in cells else "" for device in devices)
        made.append(f"| `{op}` {case}, {phase} | {' | '.join(texts)} |")
    versions = sorted({row["triton"] for row in found})
    return "\n".join([*made, "", f"Predictions from kernels compiled with Triton {', '.join(versions)}."])


def losers(device: str = "H100") -> str:
    """Returns the passes of a device that are predicted to lose to torch as Markdown, the worst first."""
    found = [row for row in rows() if row["device"] == device and _cell(row).startswith("**")]
    if not found:
        return NONE_YET
    found.sort(key=lambda row: row["torch_us"] / row["predicted_us"])
    made = ["| pass | predicted, µs | torch at best, µs | ratio | bound by |", "|---|---:|---:|---:|---|"]
    for row in found:
        ratio = row["predicted_us"] / row["torch_us"]
        made.append(
            f"| `{row['op']}` {row['case']}, {row['phase']} | {row['predicted_us']:.0f} | {row['torch_us']:.0f} | "
            f"{ratio:.1f} | {row['bound']} |"
        )
    return "\n".join(made)
