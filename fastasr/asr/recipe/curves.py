# SPDX-License-Identifier: Apache-2.0
"""Draws the loss curves of several runs in one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastasr import files
from fastasr.asr.recipe.logs import read as rows_of


def read(path: Path | str) -> dict[str, list[float]]:
    """Returns the columns of a training log, {name: floats}. Raises ValueError if the file is not a training log."""
    rows = rows_of(path)
    if not rows or "loss" not in rows[0]:
        raise ValueError(f"{path} is no training log: it has no column step or loss, or no row")
    try:
        return {
            name: [float(row[name]) for row in rows if row.get(name)] for name in ("step", "loss", "seconds")
        }
    except ValueError as error:
        raise ValueError(f"{path} is no training log: {error}") from None


def smoothed(values: Sequence[float], share: float = 0.02) -> list[float]:
    """Returns the running mean over ``share`` of the run. Losses differ from batch to batch, which hides the trend."""
    width = max(1, round(len(values) * share))
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / len(values[max(0, i - width + 1) : i + 1])
        for i in range(len(values))
    ]


def plot(logs: Any, out: Path) -> None:
    """Draws the losses of the logs {label: path} over steps and over time, and writes the picture to ``out``."""
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
    with files.replacing(out) as unfinished:
        picture.savefig(unfinished, dpi=120, format=Path(out).suffix[1:] or "png")
    plt.close(picture)
