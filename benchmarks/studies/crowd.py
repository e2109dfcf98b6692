# SPDX-License-Identifier: Apache-2.0
"""What many processes on few cores lose: calls per second of a Zipformer, alone and in a crowd, as shipped and swapped.

    python -m fastasr.benchmarks.studies.crowd                # measures; JSON beside the rows
    python -m fastasr.benchmarks.studies.crowd --quick        # shows in a minute that it works; keeps nothing

A crowd is ``--processes`` processes of ``--threads`` threads each. They begin together, and each counts the calls that
end within ``--seconds``; the crowd's throughput is the sum. The table compares the share of one process's throughput
that a crowd of swapped models keeps with the share that a crowd of upstream's keeps. Run it on an idle machine.
"""

import argparse
import json
import queue
import sys
import threading
import time
from pathlib import Path

import torch

from fastasr import files
from fastasr.benchmarks import upstream
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.rows import array

RESULTS = Path(__file__).resolve().parents[1] / "results" / "crowd.json"
MODELS = ("upstream", "fastasr")
PATIENCE_S = 600  # until all processes have built their models


def throughputs(options: argparse.Namespace) -> dict[tuple[str, int], float]:
    """Returns (model, number of processes that call it at once) -> the calls per second of all of them together, each
    the best of ``rounds`` in turns.
    """
    context = torch.multiprocessing.get_context("spawn")
    barrier, counts = context.Barrier(options.processes + 1), context.Queue()
    started = [
        context.Process(target=_member, args=(number, barrier, counts, options), daemon=True)
        for number in range(options.processes)
    ]
    for process in started:
        process.start()
    best: dict[tuple[str, int], float] = {}
    try:
        for model, n in _turns(options):
            barrier.wait(PATIENCE_S)
            found = sum(counts.get(timeout=PATIENCE_S) for _ in range(n))
            best[model, n] = max(best.get((model, n), 0.0), found)
            print(f"{model}, {n} x {options.threads} threads: {found:.2f} calls/s", flush=True)
    except (threading.BrokenBarrierError, queue.Empty):
        codes = [process.exitcode for process in started]
        raise ChildProcessError(f"a process of the crowd ended or hangs, exit codes {codes}") from None
    return best


def _turns(options: argparse.Namespace) -> list[tuple[str, int]]:
    return [(model, n) for model in MODELS for n in (1, options.processes)] * options.rounds


def _member(number, barrier, counts, options):
    """Takes its part in every turn: calls the model or, while one process measures alone, waits."""
    from fastasr.benchmarks.models.unit import inference, swapped

    torch.set_num_threads(options.threads)
    shipped = upstream.zipformer(options.size, inner_compile=False)
    x = torch.randn(1, options.frames, upstream.BINS, generator=torch.Generator().manual_seed(1))
    lengths = torch.full((1,), options.frames)
    models = zip(MODELS, (shipped, swapped(shipped)), strict=True)
    calls = {name: inference(model, x, lengths) for name, model in models}
    for call in calls.values():
        call(), call()
    for model, n in _turns(options):
        barrier.wait(PATIENCE_S)
        if number < n:
            done, begin = 0, time.perf_counter()
            while (now := time.perf_counter()) < begin + options.seconds:
                calls[model]()
                done += 1
            counts.put(done / (now - begin))


def measure(options: argparse.Namespace) -> list[dict]:
    """Returns a row for each model: its throughput alone and in the crowd."""
    best = throughputs(options)
    shape = {name: vars(options)[name] for name in ("processes", "threads", "size", "frames", "seconds")}
    return [
        {**stamp(), "model": model, **shape, "alone": best[model, 1], "crowd": best[model, options.processes]}
        for model in MODELS
    ]


def table() -> str:
    """Returns the committed rows as Markdown."""
    if not RESULTS.exists():
        return "No rows yet: `python -m fastasr.benchmarks.studies.crowd` writes them."
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    kept = {row["model"]: row["crowd"] / row["alone"] for row in rows}
    lines = ["| | one process, calls/s | all together, calls/s | kept |", "|---|---:|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['alone']:.2f} | {row['crowd']:.2f} | {kept[row['model']]:.0%} |"
        )
    row = rows[-1]
    what = f"{row['processes']} processes of {row['threads']} threads, Zipformer {row['size']}, {row['frames']} frames"
    where = f"{row['device_name']}, torch {row['torch']}, commit {row['commit']}, {row['date'][:10]}"
    crowd = {row["model"]: row["crowd"] for row in rows}
    compared = (
        f"Swapped models in a crowd make {crowd['fastasr'] / crowd['upstream']:.2f} times the calls of upstream's; "
        f"the share that they keep is {kept['fastasr'] / kept['upstream']:.2f} of that of upstream's."
    )
    return "\n".join([*lines, "", f"{compared} {what}; **{where}**."])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastasr.benchmarks.studies.crowd",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=sorted(upstream.SIZES), default="medium")
    parser.add_argument("--frames", type=int, default=400, help="of each recording, 10 ms each")
    parser.add_argument(
        "--quick", action="store_true", help="two processes, a tiny model, a second, no results"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.processes, options.seconds, options.rounds, options.size, options.frames = (
            2,
            1,
            1,
            "tiny",
            100,
        )
    try:
        found = measure(options)
    except (OSError, upstream.MissingUpstream) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.quick:
        files.write(RESULTS, array(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
