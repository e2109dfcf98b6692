# SPDX-License-Identifier: Apache-2.0
"""Loss curves of several runs in one picture."""

import csv
from pathlib import Path


def read(path):
    """Column -> floats of a training log. Raises ValueError for what is none."""
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "loss" not in rows[0] or "step" not in rows[0]:
        raise ValueError(f"{path} is no training log: it has no column step or loss, or no row")
    return {name: [float(row[name]) for row in rows if row[name]] for name in ("step", "loss", "seconds")}


def smoothed(values, share=0.02):
    """The running mean over ``share`` of the run, so that batches of other utterances do not hide the trend."""
    width = max(1, round(len(values) * share))
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def plot(logs, out):
    """Writes a picture of {label: path}: loss over steps, and over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for label, path in logs.items():
        columns = read(path)
        loss = smoothed(columns["loss"])
        panels[0].plot(columns["step"], loss, label=label, linewidth=1.2)
        panels[1].plot([s / 60 for s in columns["seconds"]], loss, label=label, linewidth=1.2)
    panels[0].set_ylabel("training loss per frame, running mean")
    panels[0].set_xlabel("step")
    panels[1].set_xlabel("minutes")
    panels[0].set_yscale("log")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    picture.savefig(out, dpi=120)
    plt.close(picture)
