# SPDX-License-Identifier: Apache-2.0
"""Peak memory and time of an encoder on long recordings: random weights, inference, one utterance.

``python -m fastasr.benchmarks.studies.long_audio [--minutes 2.5 5 10] [--chunk-size C] [--results FILE] [--out FILE]``
measures our Zipformer, ``… --parakeet 17 --size 110M --minutes 60`` transformers' Parakeet encoder of so many layers,
swapped, with full attention and a mask. Each length runs in a fresh process; its rows are added to a file, and the
picture is written. The memory is the resident set's high-water mark over what the process held with the model loaded.
It is linear in time but for one byte per pair of frames, which transformers' encoder puts into the mask of Parakeet.
Computing time is linear only with chunks: without them every frame attends to all others.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastasr.benchmarks.harness import peak_bytes
from fastasr.benchmarks.models import fast_conformer
from fastasr.benchmarks.models.unit import swapped
from fastasr.benchmarks.plots import COLOURS, plain, png, pyplot
from fastasr.benchmarks.rows import Row, merge, read
from fastasr.benchmarks.upstream import BINS, SIZES

ROOT = Path(__file__).resolve().parents[2]
NAME, PARAKEET, FRAMES_PER_MINUTE = "zipformer_long_audio", "fast_conformer_long_audio", 6000
MINUTES = (2.5, 5.0, 10.0)


class Encoder(torch.nn.Module):
    """The front end and the encoder, features (1, T, 80) to (1, T', C)."""

    def __init__(self, size: str, chunk_size: int = -1, left_context_frames: int = 128):
        from fastasr.models import zipformer

        super().__init__()
        config = dict(SIZES[size])
        if chunk_size > 0:
            config |= {
                "causal": True,
                "chunk_size": (chunk_size,),
                "left_context_frames": (left_context_frames,),
            }
        self.front_end = zipformer.Conv2dSubsampling(BINS, config["encoder_dim"][0])
        self.encoder = zipformer.Zipformer(**config)

    def forward(self, features):
        lengths = torch.tensor([features.shape[1]])
        x, lengths = self.front_end(features, lengths)
        padding = torch.zeros(1, x.shape[1], dtype=torch.bool)
        return self.encoder(x.transpose(0, 1), lengths, padding)[0].transpose(0, 1)


def parakeet(size: str, layers: int):
    """Returns transformers' encoder, swapped, features (1, T, 80) to (1, T', C)."""
    encoder = swapped(fast_conformer.encoder(size, layers))
    return lambda features: encoder(features, torch.ones(features.shape[:2]).long()).last_hidden_state


def run(size: str, frames: int, chunk_size: int, layers: int = 0) -> dict:
    """Returns seconds and peak bytes of one call in this process."""
    torch.manual_seed(0)
    model = parakeet(size, layers) if layers else Encoder(size, chunk_size).eval()
    features = torch.randn(1, frames, BINS)
    outcome = {}

    def call():
        begun = time.perf_counter()
        y = model(features)
        outcome.update(seconds=time.perf_counter() - begun, finite=bool(torch.isfinite(y).all()))
        return y

    with torch.inference_mode():
        model(features[:, :600])  # these are made once: packed weights, tables
        peak = peak_bytes(call, rounds=1)
    if peak is None:
        raise OSError("long_audio: /proc/self/clear_refs cannot be written: the peak cannot be measured here")
    if not outcome["finite"]:
        raise FloatingPointError(f"long_audio: the output of {frames} frames is not finite")
    return {"seconds": outcome["seconds"], "peak_bytes": peak}


def in_fresh_process(
    study: str, arguments: Sequence[str], label: str, timeout: float | None = None
) -> dict[str, float]:
    """Returns what a study prints as JSON in its last line. Raises RuntimeError with its last output when it fails."""
    command = [sys.executable, "-m", f"fastasr.benchmarks.studies.{study}", *arguments]
    environment = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"{label}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def case_name(size: str, chunk_size: int, layers: int) -> str:
    if layers:
        return f"{size}, {layers} layers"
    return f"{size}, chunks of {chunk_size}" if chunk_size > 0 else f"{size}, whole"


def measure(
    size: str, minutes: float, chunk_size: int = -1, layers: int = 0, timeout: float | None = None
) -> Row:
    """Measures one length in a fresh process: of a Parakeet of so many layers, or of Zipformer. Raises RuntimeError
    with its last output when it fails.
    """
    frames = round(minutes * FRAMES_PER_MINUTE)
    arguments = ["--size", size, "--chunk-size", str(chunk_size), "--parakeet", str(layers)]
    label = f"long_audio: {minutes:g} minutes"
    found = in_fresh_process("long_audio", ["--run", str(frames), *arguments], label, timeout)
    milliseconds = round(found["seconds"] * 1e3, 3)
    return Row.measured(
        suite="models",
        name=PARAKEET if layers else NAME,
        case=case_name(size, chunk_size, layers),
        shape=f"1x{frames}x{BINS}",
        dtype="float32",
        device="cpu",
        pass_="forward",
        implementation="fastasr",
        median_ms=milliseconds,
        q1_ms=milliseconds,
        q3_ms=milliseconds,
        reps=1,
        peak_bytes=found["peak_bytes"],
    )


def minutes_of(row: Row) -> float:
    return int(row.shape.split("x")[1]) / FRAMES_PER_MINUTE


def growth(rows: Sequence[Row]) -> float:
    """Returns how much faster than its length memory grows, from the shortest to the longest: 1 is linear."""
    first, last = min(rows, key=minutes_of), max(rows, key=minutes_of)
    return (last.peak_bytes / first.peak_bytes) / (minutes_of(last) / minutes_of(first))


def figure(rows: Sequence[Row]):
    """Draws memory and time over the length, one line per case."""
    plt = pyplot()
    picture, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
    values = (
        (lambda r: r.peak_bytes / 2**30, "peak over the model, GiB"),
        (lambda r: r.median_ms / 1e3, "seconds"),
    )
    for panel, (value, label) in zip(axes, values, strict=True):
        for case, style in zip(
            sorted({row.case for row in rows}, reverse=True), ("o-", "s--", "^:"), strict=False
        ):
            points = sorted((minutes_of(row), value(row)) for row in rows if row.case == case)
            panel.plot(*zip(*points, strict=True), style, ms=3, color=COLOURS["fastasr"], label=case)
        panel.set_xlabel("minutes", fontsize=8)
        panel.set_ylabel(label, fontsize=8)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        plain(panel)
    axes[0].legend(fontsize=8, frameon=False)
    model = "Parakeet" if rows[0].name == PARAKEET else "Zipformer"
    picture.suptitle(f"{model}'s encoder on one long recording, CPU inference in float32", fontsize=10)
    return picture


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastasr.benchmarks.studies.long_audio", description=__doc__
    )
    parser.add_argument("--minutes", type=float, nargs="*", default=MINUTES)
    parser.add_argument("--parakeet", type=int, default=0, metavar="LAYERS", help="Parakeet, not Zipformer")
    parser.add_argument("--size", choices=sorted({*SIZES, *fast_conformer.SIZES}), help="medium, or 110M")
    parser.add_argument(
        "--chunk-size", type=int, default=-1, help="frames of a chunk of a causal encoder; -1: none"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.jsonl")
    parser.add_argument("--out", type=Path, help="default: long_audio.png or long_parakeet.png of the docs")
    parser.add_argument("--run", type=int, metavar="FRAMES", help="measure this many frames in this process")
    options = parser.parse_args(arguments)
    layers = options.parakeet
    size = options.size or ("110M" if layers else "medium")
    if options.run is not None:
        print(json.dumps(run(size, options.run, options.chunk_size, layers)))
        return 0
    for minutes in options.minutes:
        row = measure(size, minutes, options.chunk_size, layers)
        merge(options.results, [row])
        print(f"{minutes:g} min: {row.peak_bytes / 2**20:.0f} MiB, {row.median_ms / 1e3:.1f} s", flush=True)
    name = PARAKEET if layers else NAME
    rows = [row for row in read(options.results) if row.name == name and row.case.startswith(size)]
    if not rows:
        print(f"no rows of {name} in {options.results}", file=sys.stderr)
        return 1
    out = options.out or ROOT / "docs" / "plots" / ("long_parakeet.png" if layers else "long_audio.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(png(figure(rows)))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
