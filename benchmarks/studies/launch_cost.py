# SPDX-License-Identifier: Apache-2.0
"""``python -m fastasr.benchmarks.studies.launch_cost``: what a call of each op with Triton kernels costs the host.

A fake GPU stands for the driver, so a machine without one measures all of it but the driver's own launch: the op's
checks, autograd, the launcher's arithmetic and allocations (of the CPU here), and each launch. CPU time of one thread.
"""

import time
from collections.abc import Callable

import torch

from fastasr.kernels._launch import launch
from fastasr.ops._dispatch import FAMILIES
from fastasr.testing import Make, tables
from fastasr.testing.fake_gpu import Launch, fake_gpu
from fastasr.testing.table import floating


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
    with_kernels = {
        op for f in FAMILIES.values() for op in f.ops if any(i.backend == "triton" for i in f.implementations)
    }
    for name, table in sorted(tables().items()):
        if name not in with_kernels:
            continue
        arguments = table.thorough[0].arguments(Make(torch.bfloat16))
        arguments |= {n: t.requires_grad_() for n, t in floating(arguments).items()}
        with fake_gpu() as gpu:
            table.function(**arguments)
            launches = list(gpu.launches)
            call = microseconds(lambda: table.function(**arguments))  # noqa: B023
            ours, tritons = max(map(both_ways, launches))
        yield name, len(launches), call, ours, tritons


def main() -> None:
    print("| op | launches | call, µs | one launch, µs | by Triton, µs |\n|---|---:|---:|---:|---:|")
    for name, count, *times in rows():
        print(f"| {name} | {count} | {' | '.join(f'{t:.1f}' for t in times)} |", flush=True)


if __name__ == "__main__":
    main()
