# SPDX-License-Identifier: Apache-2.0
"""Measures how many live streams a machine serves: streams paced in real time, each with a chunk every chunk's
duration.

    python -m fastasr.benchmarks.studies.streaming_load           # measures, writes the JSON, the picture and the page
    python -m fastasr.benchmarks.studies.streaming_load --plot    # the picture and the page again; --check compares

The chunks of N streams arrive at their own phases; waiting chunks are served in one call (at most ``--batch`` chunks,
the oldest first). A chunk's latency is from its arrival to its output. N is sustained when 99 % of the latencies are
under one chunk; the largest such N is found by doubling and then halving the interval. An N that fails is tried again,
``--attempts`` times in all, and its best attempt counts: a shared machine stands still for a second now and then,
whichever implementation is measured. ``streaming_peers`` has the implementations.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch

from fastasr import files
from fastasr.asr.decoding.chunks import RIGHT_CONTEXT
from fastasr.benchmarks import upstream
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.markdown import grid
from fastasr.benchmarks.models import streaming_peers
from fastasr.benchmarks.models.transcribe import LEFT_CONTEXT
from fastasr.benchmarks.plots import COLOURS, OTHER_COLOUR, png, pyplot
from fastasr.benchmarks.studies import results

NAMES = (*streaming_peers.ENGINES, streaming_peers.SCRIPTED, streaming_peers.ONNX, streaming_peers.ONNX_INT8)
FRAME = 0.02  # seconds of an encoder's frame, before its output is halved
OVERLOAD = 4  # A run is given up at this many chunks of delay.


def pace(served, count, period, seconds, batch, features, clock=time.perf_counter, sleep=time.sleep):
    """Returns the latencies in seconds of every chunk of ``count`` streams over ``seconds``. It stops at the first
    chunk that is later than OVERLOAD periods, and includes it.

    ``served`` is ``step(features (n, ...), streams)``; ``features`` is (count, frames, bins), one chunk of each stream,
    which every stream sends again and again.
    """
    phases = [period * stream / count for stream in range(count)]
    # when each next chunk is complete
    due = sorted((phase + period, stream) for stream, phase in enumerate(phases))
    latencies, began = [], clock()
    while due[0][0] <= seconds:
        now = clock() - began
        if due[0][0] > now:
            sleep(due[0][0] - now)
            continue
        waiting = [entry for entry in due if entry[0] <= now][:batch]
        streams = [stream for _, stream in waiting]
        served.step(features[streams], streams)
        done = clock() - began
        latencies += [done - arrived for arrived, _ in waiting]
        if latencies and max(latencies[-len(waiting) :]) > OVERLOAD * period:
            break
        due = sorted([(arrived + period, stream) for arrived, stream in waiting] + due[len(waiting) :])
    return latencies


def percentile(latencies, share):
    """Returns the smallest latency that ``share`` of them do not exceed."""
    return sorted(latencies)[max(0, math.ceil(share * len(latencies)) - 1)]


def largest(sustained, most):
    """Returns the largest N of 1 to ``most`` with sustained(N), which no longer holds beyond some N; 0 for none."""
    good, bad = 0, None
    n = 1
    while bad is None and good < most:
        if sustained(n):
            good, n = n, min(2 * n, most)
        else:
            bad = n
    while bad is not None and bad - good > 1:
        middle = (good + bad) // 2
        if sustained(middle):
            good = middle
        else:
            bad = middle
    return good


def measure(
    names=NAMES,
    size="medium",
    chunk=16,
    threads=1,
    seconds=20.0,
    batch=16,
    most=128,
    attempts=1,
    report=lambda _: None,
):
    """Returns the results as a dict, as in the JSON file: for each of ``names`` the largest number of streams, the
    percentiles and every latency there, and the 99th percentile of each number that was tried, of its best attempt;
    how long the engine took to pack, states for ``most`` streams included.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        period = chunk * FRAME
        generator = torch.Generator().manual_seed(1)
        frames = 2 * chunk + RIGHT_CONTEXT
        features = torch.randn(most, frames, upstream.BINS, generator=generator)
        found = {}
        for name in names:
            report(f"{name}: making")
            served = streaming_peers.make([name], size, chunk, threads, most)[name]
            found[name] = _limit(served, name, period, seconds, batch, most, attempts, features, report)
            if name in streaming_peers.ENGINES:
                found[name]["packing_ms"] = round(1e3 * served.packing_seconds, 1)
        return {
            "size": size,
            "chunk": chunk,
            "left_context": LEFT_CONTEXT,
            "period_ms": round(1e3 * period, 1),
            "seconds": seconds,
            "batch": batch,
            "attempts": attempts,
            "implementations": found,
            "environment": stamp(),
        }
    finally:
        torch.set_num_threads(before)


def _limit(served, name, period, seconds, batch, most, attempts, features, report):
    tried, runs = {}, {}

    def attempt(count):
        served.open(count)
        for _ in range(3):  # first calls allocate, compile and warm caches
            for first in range(0, count, batch):
                streams = list(range(first, min(count, first + batch)))
                served.step(features[streams], streams)
        latencies = pace(served, count, period, seconds, batch, features)
        p99 = percentile(latencies, 0.99)
        report(f"{name}: {count} streams, p99 {1e3 * p99:.1f} ms of {1e3 * period:.0f}")
        if p99 < tried.get(count, math.inf):
            tried[count], runs[count] = p99, latencies
        return p99 < period

    def sustained(count):
        return any(attempt(count) for _ in range(attempts))

    streams = largest(sustained, most)
    latencies = runs[streams] if streams else runs[1]
    return {
        "streams": streams,
        **{
            f"p{round(100 * share)}_ms": round(1e3 * percentile(latencies, share), 2)
            for share in (0.5, 0.9, 0.99)
        },
        "tried_p99_ms": {str(count): round(1e3 * p99, 2) for count, p99 in sorted(tried.items())},
        "latencies_ms": [round(1e3 * latency, 1) for latency in latencies],
    }


def figure(found):
    """Draws a histogram of the latencies of each implementation at its largest number of streams."""
    plt = pyplot()
    ways = found["implementations"]
    picture, axes = plt.subplots(
        len(ways), 1, figsize=(7.2, 1.1 * len(ways) + 0.9), sharex=True, layout="constrained", squeeze=False
    )
    limit = 1.05 * max(found["period_ms"], *(values["p99_ms"] for values in ways.values()))
    for panel, (name, values) in zip(axes[:, 0], ways.items(), strict=True):
        colour = COLOURS["fastasr"] if name in streaming_peers.ENGINES else OTHER_COLOUR
        panel.hist(values["latencies_ms"], bins=60, range=(0, limit), color=colour)
        panel.axvline(found["period_ms"], color="#20242c", linewidth=1, linestyle="--")
        panel.axvline(values["p99_ms"], color="#20242c", linewidth=1)
        panel.set_title(
            f"{name}: {values['streams']} streams, p99 {values['p99_ms']:.0f} ms", fontsize=8, loc="left"
        )
        panel.tick_params(labelsize=8)
        panel.set_yticks([])
        panel.spines[["top", "right", "left"]].set_visible(False)
    axes[-1, 0].set_xlabel("latency of a chunk, ms (dashed: one chunk, the bound)", fontsize=8)
    place = found["environment"]
    picture.suptitle(
        f"Zipformer {found['size']}, chunks of {found['period_ms']:.0f} ms, {place['threads']} thread(s), "
        f"{place['device_name']}",
        fontsize=10,
    )
    return picture


def block(found):
    """Returns the page's table."""
    lines = []
    for name, values in found["implementations"].items():
        packing = values.get("packing_ms")
        latencies = (f"{values[f'p{share}_ms']:.0f}" for share in (50, 90, 99))
        lines.append([name, values["streams"], *latencies, "" if packing is None else f"{packing / 1e3:.1f}"])
    what = f"Zipformer {found['size']}, chunks of {found['period_ms']:.0f} ms"
    lines = grid((what, "streams", "p50, ms", "p90, ms", "p99, ms", "made in, s"), lines, 5)
    place = found["environment"]
    where = f"{place['device_name']}, {place['threads']} thread(s), torch {place['torch']}, commit {place['commit']}"
    how = f"{found['seconds']:.0f} s of each number of streams, best of {found['attempts']} attempts"
    return "\n".join([*lines, "", f"{where}; {how}."])


def main(arguments=None):
    """Returns the exit code, see ``results.run``."""
    parser = results.parser("streaming_load", __doc__, "streaming_load.md", page_only="--plot")
    parser.add_argument(
        "--only",
        nargs="*",
        default=NAMES,
        metavar="NAME",
        help=", ".join((*streaming_peers.NAMES, *streaming_peers.SHERPA)),
    )
    parser.add_argument("--size", choices=sorted(upstream.SIZES), default="medium")
    parser.add_argument("--chunk", type=int, default=16, help="frames of a chunk, 20 ms each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each number of streams")
    parser.add_argument("--batch", type=int, default=16, help="chunks in a call at most")
    parser.add_argument("--attempts", type=int, default=3, help="of each number of streams at most")
    parser.add_argument("--most", type=int, default=256, help="streams at most")
    parser.add_argument("--out", type=Path, default=results.ROOT / "docs" / "plots" / "streaming_load.png")
    options = parser.parse_args(arguments)
    sizes = options.size, options.chunk, options.threads, options.seconds, options.batch
    code = results.run(
        options,
        lambda _: measure(
            options.only, *sizes, options.most, options.attempts, report=lambda line: print(line, flush=True)
        ),
        lambda found: {"bench": block(found)},
    )
    if code or options.check:
        return code
    found = json.loads(options.results.read_text(encoding="utf-8"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write(options.out, png(figure(found)))
    for name, values in found["implementations"].items():
        print(f"{name}: {values['streams']} streams, p99 {values['p99_ms']:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
