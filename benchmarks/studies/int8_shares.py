# SPDX-License-Identifier: Apache-2.0
"""Where the time of a whole Zipformer goes in float32 and in int8, and what faster products alone can gain.

    python -m fastasr.benchmarks.studies.int8_shares              # measures; JSON beside the rows, and the page
    python -m fastasr.benchmarks.studies.int8_shares --page-only  # the page from the JSON; --check compares it

torch's profiler gives the time of every operator in the swapped model, of each the shortest of several calls. The limit
is the time of int8 if its products took no time at all.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.markdown import put

ROOT = Path(__file__).resolve().parents[2]
PRODUCTS, ATTENTION = "products of linear layers", "attention"
PARTS = {  # the first that matches an operator's name
    PRODUCTS: ("::gemm", "reduced_linear", "aten::addmm", "aten::mm", "linear"),
    ATTENTION: ("attention", "weighted_values", "aten::bmm", "aten::baddbmm"),
    "convolutions": ("conv",),
    "activations, norms, sums": (
        "swoosh",
        "norm",
        "bypass",
        "aten::add",
        "aten::mul",
        "aten::sum",
        "aten::sigmoid",
    ),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill", "aten::constant_pad"),
}
OTHER = "views, allocation, dispatch"
FORMATS = ("float32", "int8")


def part_of(name, shapes):
    """Returns the part of an operator. The product of nonlin_attention is a gemm whose left factor is square."""
    square = name.endswith("::gemm") and len(shapes[0]) == 2 and shapes[0][0] == shapes[0][1]
    if square:
        return ATTENTION
    return next((part for part, keys in PARTS.items() if any(key in name for key in keys)), OTHER)


def measure(size="medium", batch=1, seconds=16, threads=1, calls=9, report=lambda _: None):
    """Returns a dict of the milliseconds of each part in each format."""
    import fastasr
    from fastasr.benchmarks.models.unit import inference, swapped

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shipped = upstream.zipformer(size, inner_compile=False)
        x = torch.randn(batch, 100 * seconds, upstream.BINS, generator=torch.Generator().manual_seed(1))
        found = {}
        for format in FORMATS:
            model = swapped(shipped)
            if format != "float32":
                fastasr.accelerate(model, weights=format)
            found[format] = _parts(inference(model, x, torch.full((batch,), 100 * seconds)), calls)
            report(f"{format}: {sum(found[format].values()):.1f} ms")
        where = {"size": size, "batch": batch, "seconds": seconds, "calls": calls}
        return {**where, "parts": found, "environment": stamp()}
    finally:
        torch.set_num_threads(before)


def _parts(call, calls):
    from torch.profiler import ProfilerActivity, profile

    shortest = {}
    call(), call()
    for _ in range(calls):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
            call()
        for event in run.key_averages(group_by_input_shape=True):
            key = event.key, str(event.input_shapes)
            known = shortest.get(key, (float("inf"),))[0]
            shortest[key] = min(known, event.self_cpu_time_total), part_of(event.key, event.input_shapes)
    parts = dict.fromkeys((*PARTS, OTHER), 0.0)
    for time, part in shortest.values():
        parts[part] += time / 1e3
    return {part: round(time, 3) for part, time in parts.items()}


def block(found):
    """Returns the page's table."""
    exact, rounded = (found["parts"][format] for format in FORMATS)
    totals = [sum(parts.values()) for parts in (exact, rounded)]
    lines = ["| | float32, ms | int8, ms | gain | share of int8 |", "|---|---:|---:|---:|---:|"]
    for part in exact:
        gain = f"{exact[part] / rounded[part]:.2f}×" if rounded[part] else ""
        lines.append(
            f"| {part} | {exact[part]:.1f} | {rounded[part]:.1f} | {gain} | {rounded[part] / totals[1]:.0%} |"
        )
    lines.append(f"| **all** | {totals[0]:.1f} | {totals[1]:.1f} | {totals[0] / totals[1]:.2f}× | 100% |")
    limit = totals[0] / (totals[1] - rounded[PRODUCTS])
    place = found["environment"]
    what = f"Zipformer {found['size']}, {found['batch']} x {found['seconds']} s, {place['threads']} thread(s)"
    where = f"{place['device_name']}, torch {place['torch']}, commit {place['commit']}, {place['date'][:10]}"
    bound = f"If the int8 products took no time, int8 would be {limit:.2f}× as fast as float32."
    return "\n".join([*lines, "", f"{bound} {what}; {where}."])


def main(arguments=None):
    """Returns the exit code: 0, 1 when ``--check`` finds a difference, or 2 when something is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m fastasr.benchmarks.studies.int8_shares",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=sorted(upstream.SIZES), default="medium")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=16, help="of each recording")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=9)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/int8_shares.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/precision.md")
    parser.add_argument("--page-only", action="store_true", help="the page from the results")
    parser.add_argument("--check", action="store_true", help="compare the page only")
    options = parser.parse_args(arguments)
    try:
        if not (options.page_only or options.check):
            sizes = options.size, options.batch, options.seconds, options.threads, options.calls
            found = measure(*sizes, report=lambda line: print(line, flush=True))
            options.results.write_text(json.dumps(found) + "\n", encoding="utf-8")
        if not options.results.exists():
            return 0
        made = block(json.loads(options.results.read_text(encoding="utf-8")))
        return put(options.page, made, options.check, "<!-- shares:start -->", "<!-- shares:end -->")
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
