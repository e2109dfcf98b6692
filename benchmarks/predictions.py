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
DISPATCH = 1.1  # a step this much longer than eager's would be a reason to leave the op to its definition
TIMES = "predicted_us", "torch_us", "eager_us"


def steps() -> list[dict]:
    """Returns what a step of inference and one of training pay of each case on each device: the forward pass, and the
    sum of both passes, as rows with ``TIMES`` alone.
    """
    passes: dict[tuple, dict[str, dict]] = {}
    for row in rows():
        passes.setdefault((row["device"], row["op"], row["case"]), {})[row["phase"]] = row
    found = []
    for (device, op, case), times in passes.items():
        both = [times[name] for name in ("forward+backward",) if name in times] or list(times.values())
        for phase, summed in (("forward", [times["forward"]]), ("forward+backward", both)):
            step = {"device": device, "op": op, "case": case, "phase": phase}
            for name in TIMES:
                values = [row[name] for row in summed]
                step[name] = None if None in values else sum(values)
            found.append(step)
    return found


def of_eager(step: dict) -> float:
    """Returns the predicted time over that of the op's definition in eager."""
    return step["predicted_us"] / step["eager_us"]


def slower_than_eager() -> list[dict]:
    """Returns the steps for which the op's definition in eager is predicted to be faster."""
    return [step for step in steps() if of_eager(step) > DISPATCH]


def _cell(row: dict, names: tuple[str, ...]) -> str:
    return " / ".join("–" if row[name] is None else f"{row[name]:.0f}" for name in names)


def _loses(row: dict) -> bool:
    return row["torch_us"] is not None and row["predicted_us"] > LOSES * row["torch_us"]


def table() -> str:
    """Returns the predictions as Markdown: a line for each pass, a column for each device."""
    found = rows()
    if not found:
        return NONE_YET
    devices = list(dict.fromkeys(row["device"] for row in found))
    lines: dict[tuple, dict[str, str]] = {}
    for row in found:
        text = _cell(row, ("predicted_us", "roof_us", "torch_us", "eager_us"))
        line = lines.setdefault((row["op"], row["case"], row["phase"]), {})
        line[row["device"]] = f"**{text}**" if _loses(row) else text
    made = [f"| predicted / roof / torch at best / eager, µs | {' | '.join(devices)} |"]
    made += ["|---|" + "---:|" * len(devices)]
    for (op, case, phase), cells in lines.items():
        made.append(f"| `{op}` {case}, {phase} | {' | '.join(cells.get(d, '') for d in devices)} |")
    versions = sorted({row["triton"] for row in found})
    return "\n".join([*made, "", f"Predictions from kernels compiled with Triton {', '.join(versions)}."])


def losers(device: str = "H100") -> str:
    """Returns the passes of a device that are predicted to lose to torch at best as Markdown, the worst first."""
    found = [row for row in rows() if row["device"] == device and _loses(row)]
    if not found:
        return NONE_YET
    found.sort(key=lambda row: row["torch_us"] / row["predicted_us"])
    made = [
        "| pass | predicted, µs | torch at best, µs | ratio | eager, µs | ratio | bound by |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in found:
        times = (
            f"{row['predicted_us']:.0f}",
            *(f"{row[name]:.0f} | {row['predicted_us'] / row[name]:.2f}" for name in TIMES[1:]),
        )
        made.append(f"| `{row['op']}` {row['case']}, {row['phase']} | {' | '.join(times)} | {row['bound']} |")
    return "\n".join(made)


def sums(device: str = "H100") -> str:
    """Returns the steps of a device as Markdown, and where each case comes out worst against eager."""
    cases: dict[tuple, list[dict]] = {}
    for step in steps():
        cases.setdefault((step["op"], step["case"]), []).append(step)
    if not cases:
        return NONE_YET
    made = [
        "| predicted / torch at best / eager, µs | forward | forward+backward | worst ratio to eager |",
        "|---|---:|---:|---|",
    ]
    for (op, case), found in cases.items():
        cells = (_cell(step, TIMES) for step in found if step["device"] == device)
        worst = max(found, key=of_eager)
        ratio = f"{of_eager(worst):.2f}"
        ratio = f"**{ratio}**" if of_eager(worst) > DISPATCH else ratio
        made.append(f"| `{op}` {case} | {' | '.join(cells)} | {ratio}, {worst['device']}, {worst['phase']} |")
    return "\n".join(made)
