# SPDX-License-Identifier: Apache-2.0
"""The demo itself: speech, model, swap, verification, timing, report."""

import argparse
import contextlib
import copy
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

import fastasr
from fastasr.benchmarks import environment, upstream
from fastasr.benchmarks.harness import Timing, interleave, wait_until_idle
from fastasr.benchmarks.table import duration, times
from fastasr.demo import audio, features
from fastasr.demo.stages import Stages

UPSTREAM, COMPILED, FASTASR = "upstream as shipped", "upstream, torch.compile", "fastasr"
PLAIN_WIDTH = 120  # of a pipe or a file
COMPILE_LIMIT = 200  # seconds: the demo promises to end


class CompileTimeout(BaseException):
    """torch.compile took longer than the demo waits. Not an Exception: the compiler's own handlers let it
    pass.
    """


@dataclass
class Story:
    """What the demo found out, for the report."""

    speech: audio.Speech
    features: torch.Tensor
    lengths: torch.Tensor
    size: str
    parameters: int
    swap: fastasr.SwapReport
    difference: float = 0.0
    first_calls: dict[str, float] = field(default_factory=dict)  # seconds
    timings: dict[str, Timing] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stamp: dict = field(default_factory=dict)

    @property
    def audio_seconds(self) -> float:
        return sum(clip.seconds for clip in self.speech.utterances)


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raises ``CompileTimeout`` after ``seconds``; outside the main thread there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise CompileTimeout

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _forward(model, inputs: tuple):
    with torch.no_grad():
        return model(*inputs)[0]


def _speech(stages: Stages, options: argparse.Namespace) -> tuple[audio.Speech, torch.Tensor, torch.Tensor]:
    with stages.stage("Speech"):
        speech = audio.load(
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


def _compiled(stages: Stages, model, inputs: tuple, story: Story):
    """Upstream under torch.compile after its first call, or None with a note."""
    compiled = torch.compile(copy.deepcopy(model))
    text = f"torch.compile of the whole model (about two minutes here, {COMPILE_LIMIT} s at most)"
    timing = Timing()
    try:
        with stages.alive(text), _at_most(COMPILE_LIMIT):
            timing = _timed_once(lambda: _forward(compiled, inputs))
    except CompileTimeout:
        story.notes.append(f"torch.compile was given up after {COMPILE_LIMIT} s")
    except Exception as error:  # upstream under torch.compile is a comparison, not what is shown
        first = (str(error).strip().splitlines() or [""])[0]
        story.notes.append(f"torch.compile failed: {type(error).__name__}: {first[:160]}")
    if not timing.samples:
        stages.say(story.notes[-1], style="yellow")
        return None
    story.first_calls[COMPILED] = timing.samples[0]
    stages.say(f"first call of {COMPILED}: {timing.samples[0]:.1f} s")
    return compiled


def _timed_once(call) -> Timing:
    """The very first call, timed."""
    import time

    start = time.perf_counter()
    call()
    return Timing([time.perf_counter() - start])


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
    """Exit code 0, or 1 when verification restored a module."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    stages = Stages(console, 7)
    console.print(f"[bold]fastasr {fastasr.__version__}[/] on {environment.device_name()}", soft_wrap=True)
    speech, x, lengths = _speech(stages, options)
    inputs = (x, lengths)

    with stages.stage("Upstream's model"):
        shipped = upstream.zipformer(options.size)
        count = sum(p.numel() for p in shipped.parameters())
        stages.say(
            f"Zipformer ({options.size}) from the PyPI package zipformer, {count / 1e6:.1f} million parameters"
        )
        stages.say("random weights: it recognises nothing, but speed and agreement do not depend on training")

    with stages.stage("Swap"):
        ours = copy.deepcopy(shipped)
        report = fastasr.accelerate(ours)
        story = Story(speech, x, lengths, options.size, count, report, stamp=environment.stamp())
        for (cls, kernels), number in replaced_by_class(report).items():
            stages.say(f"{number:4d} × {cls} -> {kernels}")
        stages.say(report.summary)

    with stages.stage("Verification, layer by layer, on this speech"):
        stages.say(
            "every swapped module runs both ways, values and gradients, each against upstream in float64"
        )
        with stages.alive("verifying"):
            checked = fastasr.verify(ours, inputs)
        merge(report, checked)
        stages.say(f"{len([r for r in checked.rows if r.errors])} modules verified")
        for row in report.rolled_back:
            stages.say(f"restored: {row.path}: {row.reason}", style="bold red")

    with stages.stage("Timing"):
        models = {UPSTREAM: shipped, FASTASR: ours}
        outputs = {}
        for name, model in models.items():
            with stages.alive(f"first call of {name}"):
                story.first_calls[name] = _timed_once(
                    lambda m=model: outputs.update(y=_forward(m, inputs))
                ).median
            outputs[name] = outputs.pop("y")
            stages.say(f"first call of {name}: {story.first_calls[name]:.1f} s")
        story.difference = relative_difference(outputs[FASTASR], outputs[UPSTREAM])
        stages.say(
            f"largest difference of the outputs, relative to the largest output: {story.difference:.1e}"
        )
        if options.no_compile:
            story.notes.append("torch.compile was left out (--no-compile)")
        elif compiled := _compiled(stages, shipped, inputs, story):
            models = {UPSTREAM: shipped, COMPILED: compiled, FASTASR: ours}
        wait_until_idle(patience=20, report=stages.say)
        with stages.alive(f"{options.reps} interleaved rounds of {len(models)}"):
            story.timings = interleave(
                {name: (lambda m=model: _forward(m, inputs)) for name, model in models.items()},
                reps=options.reps,
                warmup=2,
                sample_seconds=0.0,
            )
        console.print()
        console.print(_times_table(story))
        console.print()

    with stages.stage("Report"):
        from fastasr.demo import report as page

        written = page.write(story, options.out)
        stages.say(f"written: {written}")
    return 0 if report.ok else 1


def replaced_by_class(report: fastasr.SwapReport) -> dict[tuple[str, str], int]:
    """(class, kernels) -> how many modules were replaced."""
    found: dict[tuple[str, str], int] = {}
    for row in report.replaced:
        key = (row.class_name, " ".join(row.kernels))
        found[key] = found.get(key, 0) + 1
    return found


def merge(report: fastasr.SwapReport, checked: fastasr.SwapReport) -> None:
    """Puts what verification found into the report of the swap."""
    results = {row.path: row for row in checked.rows}
    for row in report.rows:
        if (result := results.get(row.path)) is not None:
            row.status, row.errors = result.status, result.errors
            row.reason = "; ".join(filter(None, (row.reason, result.reason)))
    report.verified = True


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()
