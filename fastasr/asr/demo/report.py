# SPDX-License-Identifier: Apache-2.0
"""The demo's HTML page, one file with embedded pictures."""

from pathlib import Path
from typing import Any

import torch

from fastasr import files
from fastasr.asr.demo.story import COMPILED, FASTASR, UPSTREAM, Story, replaced_by_class
from fastasr.benchmarks import page, plots

COLOURS = {UPSTREAM: "upstream", COMPILED: "compile", FASTASR: "fastasr"}
FLOOR = 1e-9  # smaller errors are drawn at this value


def _times(story: Story) -> Any:
    """Draws the median times as bars, with their quartiles."""
    plt = plots.pyplot()
    picture, axes = plt.subplots(figsize=(8, 0.6 + 0.5 * len(story.timings)), layout="constrained")
    names = list(story.timings)
    plots.bars(
        axes,
        {name: story.timings[name].median * 1e3 for name in names},
        {name: (q1 * 1e3, q3 * 1e3) for name in names for q1, q3 in [story.timings[name].quartiles]},
        {name: plots.COLOURS[COLOURS[name]] for name in names},
    )
    return picture


def _errors(story: Story) -> Any:
    """Draws every swapped module's errors against float64, for values and gradients, beside upstream's errors."""
    rows = [row for row in story.swap.rows if row.errors]
    if not rows:
        return None
    plt = plots.pyplot()
    picture, panels = plt.subplots(1, 2, figsize=(12, 3.6), sharey=True, layout="constrained")
    for axes, key in zip(panels, ("values", "gradients"), strict=True):
        for source, label, colour in (
            (f"upstream_{key}", "upstream", "#5b6678"),
            (key, "fastasr", "#c8374a"),
        ):
            points = [
                (i, max(v, FLOOR)) for i, row in enumerate(rows) if (v := row.errors.get(source)) is not None
            ]
            if points:
                axes.scatter(
                    *zip(*points, strict=True), s=9, color=colour, label=label, alpha=0.8, linewidths=0
                )
        axes.set_yscale("log")
        axes.set_title(key, fontsize=10, loc="left")
        axes.set_xlabel("swapped module, in the order of the model", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("error against float64,\nrelative to the largest result", fontsize=8)
    panels[0].legend(fontsize=8, frameon=False)
    return picture


def _spectrograms(story: Story) -> Any:
    """Draws the features that the model gets."""
    plt = plots.pyplot()
    count = len(story.features)
    picture, panels = plt.subplots(
        count, 1, figsize=(12, 1.25 * count + 0.3), sharex=True, layout="constrained"
    )
    low, high = torch.quantile(
        story.features[0].flatten()[:100_000], torch.tensor([0.05, 0.995], dtype=torch.float32, device="cpu")
    ).tolist()
    for axes, x in zip(panels if count > 1 else [panels], story.features, strict=True):
        image = x.T.numpy()
        extent = (0, len(x) / 100, 0, 80)
        axes.imshow(image, aspect="auto", origin="lower", extent=extent, vmin=low, vmax=high, cmap="magma")
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
        axes.set_ylabel("mel bin", fontsize=8)
    axes.set_xlabel("seconds", fontsize=8)
    return picture


def _picture(figure: Any) -> str | None:
    return page.embedded(plots.png(figure)) if figure is not None else None


def render(story: Story) -> str:
    base = story.timings[UPSTREAM].median
    rows = [
        {
            "name": name,
            "first": story.first_calls[name],
            "median": timing.median * 1e3,
            "quartiles": [q * 1e3 for q in timing.quartiles],
            "gain": base / timing.median,
            "speed": story.audio_seconds / timing.median,
        }
        for name, timing in story.timings.items()
    ]
    return (
        page.environment(Path(__file__).parent)
        .get_template("demo.html")
        .render(
            story=story,
            times=rows,
            gain=base / story.timings[FASTASR].median,
            replaced=[(*key, count) for key, count in replaced_by_class(story.swap).items()],
            verified=len([row for row in story.swap.rows if row.errors]),
            pictures={
                "times": _picture(_times(story)),
                "errors": _picture(_errors(story)),
                "speech": _picture(_spectrograms(story)),
            },
            e=story.stamp,
        )
    )


def write(story: Story, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, render(story))
    return path
