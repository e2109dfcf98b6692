# SPDX-License-Identifier: Apache-2.0
"""Where the time of a whole Zipformer goes in float32 and in int8, and what faster products alone can gain.

    python -m fastasr.benchmarks.studies.int8_shares              # measures; JSON beside the rows, and the page
    python -m fastasr.benchmarks.studies.int8_shares --page-only  # the page from the JSON; --check compares it

torch's profiler gives the time of every operator in the swapped model, of each the shortest of several calls. The limit
is the time of int8 if its products took no time at all.
"""

import sys

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.studies import results
from fastasr.benchmarks.studies.breakdown import PRODUCTS, profiled

FORMATS = ("float32", "int8")


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
            found[format] = profiled(inference(model, x, torch.full((batch,), 100 * seconds)), calls)
            report(f"{format}: {sum(found[format].values()):.1f} ms")
        where = {"size": size, "batch": batch, "seconds": seconds, "calls": calls}
        return {**where, "parts": found, "environment": stamp()}
    finally:
        torch.set_num_threads(before)


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
    """Returns the exit code, see ``results.run``."""
    parser = results.parser("int8_shares", __doc__, "precision.md")
    parser.add_argument("--size", choices=sorted(upstream.SIZES), default="medium")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=16, help="of each recording")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=9)
    options = parser.parse_args(arguments)
    sizes = options.size, options.batch, options.seconds, options.threads, options.calls
    return results.run(
        options,
        lambda _: measure(*sizes, report=lambda line: print(line, flush=True)),
        lambda found: {"shares": block(found)},
    )


if __name__ == "__main__":
    sys.exit(main())
