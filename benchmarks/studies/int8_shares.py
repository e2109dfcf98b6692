# SPDX-License-Identifier: Apache-2.0
"""Where the time of a whole Zipformer goes in float32 and in int8, and what faster products alone can gain.

    python -m fastasr.benchmarks.studies.int8_shares              # measures; JSON beside the rows, and the page
    python -m fastasr.benchmarks.studies.int8_shares --page-only  # the page from the JSON; --check compares it

torch's profiler gives the time of every operator in the swapped model, of each the shortest of several calls, in which
layers call their submodules one by one. What int8 can reach with vectors has products at four times the rate of
float32's best ones, since a word holds four bytes, and takes float32's time for the rest. AMX multiplies more at once.
"""

import sys

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.environment import device_name, stamp
from fastasr.benchmarks.studies import results
from fastasr.benchmarks.studies.breakdown import PRODUCTS, profiled

FORMATS = ("float32", "int8")
BYTES = 4  # in a word that an instruction multiplies


def measure(size="medium", batch=1, seconds=16, threads=2, calls=9, report=lambda _: None):
    """Returns the milliseconds of each part in each format, and of the products at the machine's best rate."""
    import fastasr
    from fastasr.benchmarks.models.unit import inference, product_flops, product_limit, swapped

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shipped, inputs = (
            upstream.zipformer(size, inner_compile=False),
            upstream.example(batch, 100 * seconds),
        )
        limit, rate = product_limit(product_flops(inference(shipped, *inputs)))
        found = {}
        for format in FORMATS:
            model = swapped(shipped)
            if format != "float32":
                fastasr.accelerate(model, weights=format)
            found[format] = profiled(model, inference(model, *inputs), calls)
            report(f"{batch} x {seconds} s, {format}: {sum(found[format].values()):.1f} ms")
        where = {
            "size": size,
            "shape": f"{batch} x {seconds} s",
            "limit_ms": round(1e3 * limit, 3),
            "limit": rate,
        }
        return {**where, "calls": calls, "parts": found, "environment": stamp()}
    finally:
        torch.set_num_threads(before)


def block(found):
    """Returns the tables of all machines and shapes."""
    return "\n\n".join(_table(of) for shapes in found.values() for of in shapes.values())


def _table(found):
    exact, rounded = (found["parts"][format] for format in FORMATS)
    totals = [sum(parts.values()) for parts in (exact, rounded)]
    place = found["environment"]
    lines = [
        f"| Zipformer {found['size']}, {found['shape']}, {place['threads']} thread(s) "
        "| float32, ms | int8, ms | gain | share of int8 |",
        "|---|---:|---:|---:|---:|",
    ]
    for part in exact:
        gain = f"{exact[part] / rounded[part]:.2f}×" if rounded[part] else ""
        lines.append(
            f"| {part} | {exact[part]:.1f} | {rounded[part]:.1f} | {gain} | {rounded[part] / totals[1]:.0%} |"
        )
    lines.append(f"| **all** | {totals[0]:.1f} | {totals[1]:.1f} | {totals[0] / totals[1]:.2f}× | 100% |")
    rest = totals[0] - exact[PRODUCTS]
    where = f"{place['device_name']}, torch {place['torch']}, commit {place['commit']}, {place['date'][:10]}"
    bound = f"If the int8 products took no time, int8 would be {totals[0] / rest:.2f}× as fast as float32."
    if "limit_ms" in found:
        reached = totals[0] / (rest + found["limit_ms"] / BYTES)
        bound += (
            f" With products at {BYTES} times float32's best rate here ({found['limit']}), as vectors can have "
            f"them, and the rest as in float32, {reached:.2f}×."
        )
    return "\n".join([*lines, "", f"{bound} {where}."])


def main(arguments=None):
    """Returns the exit code, see ``results.run``."""
    parser = results.parser("int8_shares", __doc__, "precision.md")
    parser.add_argument("--size", choices=sorted(upstream.SIZES), default="medium")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=int, default=16, help="of each recording")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=9)
    options = parser.parse_args(arguments)

    def measured(found):
        sizes = options.seconds, options.threads, options.calls
        shapes = [
            measure(options.size, batch, *sizes, report=lambda line: print(line, flush=True))
            for batch in options.batches
        ]
        return found | {device_name(): {of["shape"]: of for of in shapes}}

    return results.run(options, measured, lambda found: {"shares": block(found)})


if __name__ == "__main__":
    sys.exit(main())
