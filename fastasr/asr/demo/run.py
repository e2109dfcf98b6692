# SPDX-License-Identifier: Apache-2.0
"""Runs the demo: speech, model, swap, verification, timing, report."""

import argparse
import copy
import logging
import time
import warnings
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastasr
from fastasr.asr.audio import features, recordings
from fastasr.asr.demo.stages import Stages
from fastasr.asr.demo.story import COMPILED, FASTASR, UPSTREAM, Story, replaced_by_class
from fastasr.benchmarks import environment, upstream
from fastasr.benchmarks.harness import interleave, wait_until_idle
from fastasr.benchmarks.table import duration, times
from fastasr.benchmarks.time_limit import Expired, time_limit

PLAIN_WIDTH = 120  # columns of a pipe or a file
RESTORED_SHOWN = 5
EXCERPT = (400, 360)  # frames of the two utterances for verification; they differ, so that one is padded
COMPILE_LIMIT = 200  # seconds, so that the demo ends in a reasonable time


def _forward(model: Any, inputs: tuple) -> Tensor:
    with torch.no_grad():
        return model(*inputs)[0]


def _speech(
    stages: Stages, options: argparse.Namespace
) -> tuple[recordings.Speech, torch.Tensor, torch.Tensor]:
    with stages.stage("Speech"):
        speech = recordings.load(
            options.audio, options.cache, options.seconds, stages.say, only_generated=options.generated
        )
        stages.say(f"source: {speech.source}")
        for clip in speech.utterances:
            words = clip.text if len(clip.text) <= 90 else clip.text[:87] + "..."
            stages.say(f"{clip.seconds:4.1f} s  {words or clip.name}", style="dim")
    with stages.stage("Features"):
        x, lengths = features.batch(speech.utterances)
        if speech.rate != features.RATE:
            stages.say(f"resampled from {speech.rate} to {features.RATE} Hz by a windowed sinc")
        stages.say(f"80-bin log-mel filterbanks: {tuple(x.shape)}, lengths {lengths.tolist()}")
    return speech, x, lengths


def _compiled(stages: Stages, model: Any, inputs: tuple, story: Story) -> Any:
    """Returns upstream's model under torch.compile after its first call, or None, which a note explains."""
    compiled = torch.compile(copy.deepcopy(model))
    # torch.compile's many warnings about upstream's code need no action from the user
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch._dynamo")
    text = f"torch.compile of the whole model (about two minutes here, {COMPILE_LIMIT} s at most)"
    start = time.perf_counter()
    try:
        with stages.alive(text), time_limit(COMPILE_LIMIT):
            _forward(compiled, inputs)
        story.first_calls[COMPILED] = time.perf_counter() - start
    except Expired:
        story.notes.append(f"torch.compile was given up after {COMPILE_LIMIT} s")
    except Exception as error:  # the demo goes on without this comparison
        first = (str(error).strip().splitlines() or [""])[0]
        story.notes.append(f"torch.compile failed: {type(error).__name__}: {first[:160]}")
    if COMPILED not in story.first_calls:
        stages.say(story.notes[-1], style="yellow")
        return None
    stages.say(f"first call of {COMPILED}: {story.first_calls[COMPILED]:.1f} s")
    return compiled


def _times_table(story: Story) -> Table:
    table = Table(title="One batch, forward, float32", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("first call", "median", "quartiles", "× upstream", "speech per second"):
        table.add_column(name, justify="right")
    base = story.timings[UPSTREAM].median
    for name, timing in story.timings.items():
        low, high = (duration(q * 1e3) for q in timing.quartiles)
        table.add_row(
            name,
            f"{story.first_calls[name]:.1f} s",
            duration(timing.median * 1e3),
            f"{low} – {high}",
            times(base / timing.median),
            f"{story.audio_seconds / timing.median:.0f} s",
            style="bold red" if name == FASTASR else None,
        )
    return table


def run(options: argparse.Namespace) -> int:
    """Runs the demo. Returns the exit code 0, or 1 if verification restored a module."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    stages = Stages(console, 7)
    console.print(f"[bold]fastasr {fastasr.__version__}[/] on {environment.device_name()}", soft_wrap=True)
    speech, x, lengths = _speech(stages, options)
    shipped = _upstream(stages, options.size)
    ours, report = _swap(stages, shipped)
    count = sum(p.numel() for p in shipped.parameters())
    story = Story(speech, x, lengths, options.size, count, report, stamp=environment.stamp())
    _verify(stages, ours, story)
    _time(stages, shipped, ours, story, options)
    with stages.stage("Report"):
        from fastasr.asr.demo import report as page

        written = page.write(story, options.out)
        stages.say(f"written: {written}")
    return 0 if report.ok else 1


def _upstream(stages: Stages, size: str) -> torch.nn.Module:
    with stages.stage("Upstream's model"):
        model = upstream.zipformer(size)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        stages.say(f"Zipformer ({size}) of the PyPI package zipformer, {count:.1f} M parameters")
        stages.say("random weights: it recognises nothing, but speed and agreement do not depend on training")
    return model


def _swap(stages: Stages, shipped: torch.nn.Module) -> tuple[torch.nn.Module, fastasr.SwapReport]:
    with stages.stage("Swap"):
        ours = copy.deepcopy(shipped)
        report = fastasr.accelerate(ours)
        for (cls, kernels), number in replaced_by_class(report).items():
            stages.say(f"{number:4d} × {cls} -> {kernels}")
        stages.say(report.summary)
    return ours, report


def _verify(stages: Stages, ours: torch.nn.Module, story: Story) -> None:
    with stages.stage("Verification, layer by layer, on this speech"):
        excerpt = excerpt_of(story.features, story.lengths)
        seconds = " and ".join(f"{n / 100:.1f} s" for n in excerpt[1].tolist())
        stages.say(
            "every swapped module runs both ways, values and gradients; of like ones the first in float64 too"
        )
        stages.say(f"on {seconds} of the batch: all of it would take minutes")
        checked = fastasr.verify(ours, excerpt)
        merge(story.swap, checked)
        restored = story.swap.rolled_back
        reached = len([row for row in checked.rows if row.errors])
        stages.say(f"{reached} modules verified, {len(restored)} of them restored")
        for row in restored[:RESTORED_SHOWN]:
            stages.say(f"restored: {row.path}: {row.reason}", style="bold red")
        if len(restored) > RESTORED_SHOWN:
            stages.say("... the others are in the report", style="bold red")


def _time(
    stages: Stages, shipped: torch.nn.Module, ours: torch.nn.Module, story: Story, options: argparse.Namespace
) -> None:
    """Times first calls and interleaved rounds, and compares the outputs."""
    inputs = (story.features, story.lengths)
    models = {UPSTREAM: shipped, FASTASR: ours}
    outputs: dict[str, torch.Tensor] = {}
    with stages.stage("Timing"):
        for name, model in models.items():
            with stages.alive(f"first call of {name}"):
                start = time.perf_counter()
                outputs[name] = _forward(model, inputs)
                story.first_calls[name] = time.perf_counter() - start
            stages.say(f"first call of {name}: {story.first_calls[name]:.1f} s")
        story.difference = relative_difference(outputs[FASTASR], outputs[UPSTREAM])
        stages.say(f"largest difference of the outputs, relative to the largest: {story.difference:.1e}")
        if not options.compile:
            story.notes.append("torch.compile was left out: --compile times it too")
        elif (compiled := _compiled(stages, shipped, inputs, story)) is not None:
            models = {UPSTREAM: shipped, COMPILED: compiled, FASTASR: ours}
        wait_until_idle(patience=options.patience, report=stages.say)
        with stages.alive(f"{options.reps} interleaved rounds of {len(models)}"):
            story.timings = interleave(
                {name: partial(_forward, model, inputs) for name, model in models.items()},
                reps=options.reps,
                warmup=1,
                sample_seconds=0.0,
            )
        stages.console.print(_times_table(story))


def excerpt_of(x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the beginnings of the batch's first utterances."""
    frames = torch.minimum(
        lengths[: len(EXCERPT)], torch.tensor(EXCERPT[: len(lengths)], dtype=torch.int64, device="cpu")
    )
    return x[: len(frames), : int(frames.max())], frames


def merge(report: fastasr.SwapReport, checked: fastasr.SwapReport) -> None:
    """Copies the results of the verification into the report of the swap."""
    results = {row.path: row for row in checked.rows}
    for row in report.rows:
        if (result := results.get(row.path)) is not None:
            row.status, row.errors = result.status, result.errors
            row.allowed, row.like = result.allowed, result.like
            row.reason = "; ".join(filter(None, (row.reason, result.reason)))
    report.verified = True


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
