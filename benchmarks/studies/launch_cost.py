# SPDX-License-Identifier: Apache-2.0
"""``python -m fastasr.benchmarks.studies.launch_cost``: what a call of each op with Triton kernels costs the host.

A fake GPU stands for the driver, so a machine without one measures all of it but the driver's own launch: the op's
checks, autograd, the launcher's arithmetic and allocations (of the CPU here), and each launch. CPU time of one thread.
Run it on an idle machine. Rows go to ``results/launch_cost.json``, from which scripts/tables.py makes the table.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from fastasr import files
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.rows import array
from fastasr.kernels._launch import launch
from fastasr.ops._dispatch import gpu_backends
from fastasr.testing import Make, tables
from fastasr.testing.fake_gpu import Launch, fake_gpu
from fastasr.testing.table import floating

STAMP = "device_name", "torch", "triton", "commit", "date"
RESULTS = Path(__file__).parents[1] / "results" / "launch_cost.json"


def microseconds(f: Callable[[], object], calls: int = 500, repeats: int = 7) -> float:
    """Returns the least CPU time of one call, over several repeats."""
    found = []
    for _ in range(repeats):
        begin = time.thread_time()
        for _ in range(calls):
            f()
        found.append((time.thread_time() - begin) / calls * 1e6)
    return min(found)


def both_ways(one: Launch) -> tuple[float, float]:
    """Returns the microseconds of a launch by :func:`launch` and by Triton itself."""
    names, constexprs = one.kernel.arg_names, {one.kernel.arg_names[i] for i in one.kernel.constexprs}
    given = dict(zip(names, one.arguments, strict=True))
    arguments = [value for name, value in given.items() if name not in constexprs]
    constants = {name: given[name] for name in names if name in constexprs}
    constants |= {name: one.options[name] for name in ("num_warps", "num_stages")}
    triton_launch = one.kernel[one.grid]
    return (
        microseconds(lambda: launch(one.kernel, one.grid, *arguments, **constants)),
        microseconds(lambda: triton_launch(*arguments, **constants)),
    )


def rows():
    """Yields (op, launches of a forward call, its microseconds, those of its costliest launch both ways)."""
    for name, table in sorted(tables().items()):
        if gpu_backends().get(name) != "triton":
            continue
        arguments = table.thorough[0].arguments(Make(torch.bfloat16))
        arguments |= {n: t.requires_grad_() for n, t in floating(arguments).items()}
        with fake_gpu() as gpu:
            table.function(**arguments)
            launches = list(gpu.launches)
            call = microseconds(lambda: table.function(**arguments))  # noqa: B023
            ours, tritons = max(map(both_ways, launches))
        yield name, len(launches), call, ours, tritons


def table() -> str:
    """Returns the committed rows as Markdown."""
    found = json.loads(RESULTS.read_text())
    lines = ["| op | launches | call, µs | one launch, µs | by Triton, µs |", "|---|---:|---:|---:|---:|"]
    for row in found:
        times = (f"{row[name]:.1f}" for name in ("call_us", "launch_us", "triton_us"))
        lines.append(f"| {row['op']} | {row['launches']} | {' | '.join(times)} |")
    of = {key: ", ".join(sorted({row[key] for row in found})) for key in STAMP}
    versions = f"torch {of['torch']}, Triton {of['triton']}"
    return "\n".join(
        [*lines, "", f"**{of['device_name']}**, {versions}; commit {of['commit']}; {of['date']}."]
    )


def main() -> None:
    found = []
    now = stamp("cpu") | {"triton": triton.__version__}
    for name, launches, *times in rows():
        times = dict(zip(("call_us", "launch_us", "triton_us"), (round(t, 1) for t in times), strict=True))
        found.append({"op": name, "launches": launches, **times, **{key: now[key] for key in STAMP}})
        print(found[-1], flush=True)
    files.write(RESULTS, array(found))


if __name__ == "__main__":
    main()
