# SPDX-License-Identifier: Apache-2.0
"""Code that benchmarks of whole models share: names of implementations and passes, and the rows of one unit."""

from collections.abc import Callable
from math import prod

import torch

from fastasr.benchmarks import limits
from fastasr.benchmarks.case import Report, Settings
from fastasr.benchmarks.harness import LoadMeter, Timing, Variant, interleave, peak_bytes
from fastasr.benchmarks.rows import Row

UPSTREAM, COMPILE, FASTASR = "upstream", "compile", "fastasr"
FORWARD, BOTH = "forward", "forward+backward"


def product_flops(call: Callable[[], object]) -> int:
    """Returns the multiply and add operations of the products."""
    from torch.utils.flop_counter import FlopCounterMode

    mapping = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def _convolution_backward_flops(grad, x, weight, *arguments, out_val=None, **_) -> int:
    """Counts a grouped convolution's backward. torch's own count treats it as dense: 129 times too much for 128
    channels by themselves. Each of the two gradients has the products of the forward pass.
    """
    output_mask = arguments[-1]
    return 2 * grad[0] * prod(weight) * prod(grad[2:]) * sum(output_mask[:2])


def measure_unit(
    name: str, case: str, pass_: str, shape: str, runs: dict, settings: Settings, reps: int, report: Report
) -> list[Row]:
    """Yields one row per implementation (its call in ``runs``), all of them timed in turns. The floor is that of the
    products alone, counted in ``runs[UPSTREAM]``.
    """
    for key, run in runs.items():
        report(f"{name}: {case}, {pass_}: first call of {key}" + (" (compiles)" if key == COMPILE else ""))
        run()
    flops = product_flops(runs[UPSTREAM])
    rate = limits.gemm_flops_per_second("cpu")
    report(f"{name}: {case}, {pass_}: timing {', '.join(runs)}, {reps} rounds")
    load = LoadMeter()
    made = {key: Variant(run) for key, run in runs.items()}
    timings = interleave(made, reps=reps, warmup=2, sample_seconds=settings.sample_seconds)
    other = load.other_cores()
    return measured_rows(
        timings,
        made,
        memory=settings.memory,
        name=name,
        case=case,
        shape=shape,
        pass_=pass_,
        load=other,
        flops=flops,
        seconds=flops / rate,
        limit=f"GEMM {rate / 1e9:.0f} GFLOP/s",
    )


def measured_rows(
    timings: dict[str, Timing], variants: dict[str, Variant], *, memory: bool, seconds: float, **fields
) -> list[Row]:
    """Yields a row of the suite "models" per implementation; ``seconds`` is what the limit allows, ``memory`` adds the
    peaks.
    """
    rows = []
    for implementation, timing in timings.items():
        lower, upper = timing.quartiles
        rows.append(
            Row.measured(
                suite="models",
                dtype="float32",
                device="cpu",
                implementation=implementation,
                median_ms=round(timing.median * 1e3, 4),
                q1_ms=round(lower * 1e3, 4),
                q3_ms=round(upper * 1e3, 4),
                reps=timing.reps,
                peak_bytes=peak_bytes(variants[implementation]) if memory else None,
                fraction_of_limit=round(seconds / timing.median, 4),
                **fields,
            )
        )
    return rows
