# SPDX-License-Identifier: Apache-2.0
"""Measures a case, one op at one shape, and makes its rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastasr.benchmarks import limits
from fastasr.benchmarks.harness import LoadMeter, Timing, Variant, interleave, peak_bytes
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import ratio_to_fastest
from fastasr.testing.speed import BOTH, FORWARD, Case, Cost, Implementation, Unavailable

Report = Callable[[str], None]
TRAINING = "training forward"  # a call that keeps what its gradients need
LONGER = 4  # A pass in doubt gets this many times as many repetitions, each this many times as long.


@dataclass(frozen=True)
class Settings:
    """How long to measure. ``compile`` includes torch.compile'd formulas, ``limits`` what the machine can do. Rounds
    end after ``seconds``, but three are measured. A pass is measured again, for longer, if the fastest of the others
    takes less than ``doubted`` times as long as ours; the second measurement alone counts.
    """

    reps: int = 15
    warmup: int = 3
    sample_seconds: float = 0.02
    compile: bool = True
    memory: bool = True
    limits: bool = True
    seconds: float = math.inf
    doubted: float = 0.0

    @classmethod
    def quick(cls, **changes) -> "Settings":
        return cls(**{"reps": 3, "warmup": 1, "sample_seconds": 0.002, "memory": False, **changes})


def variant(implementation: Implementation, pass_: str) -> Variant:
    """Returns the code that a pass times: a call without gradients, one that keeps data for gradients, a call and its
    gradients, or the gradients alone.
    """
    if pass_ == FORWARD:
        call = implementation.inference or implementation.call

        def forward():
            with torch.no_grad():
                return call()

        return Variant(forward)
    call, wanted = implementation.call, implementation.differentiable()
    if pass_ == TRAINING:
        return Variant(call)
    grads = [torch.randn_like(y.detach()) for y in _differentiable(call())]
    if pass_ == BOTH:
        return Variant(lambda: torch.autograd.grad(_differentiable(call()), wanted, grads))
    return Variant(lambda y: torch.autograd.grad(y, wanted, grads), prepare=lambda: _differentiable(call()))


def _differentiable(found) -> list[torch.Tensor]:
    """Returns the results of a call, one or several, that have gradients."""
    return [y for y in ([found] if isinstance(found, torch.Tensor) else found) if y.requires_grad]


def _copy_variant(bytes_moved: int, device: str) -> Variant:
    source, destination = limits.copy_buffers(bytes_moved, device)
    return Variant(lambda: destination.copy_(source))


def _floor_seconds(
    cost: Cost, device: str, dtype: torch.dtype, copy_seconds: float | None
) -> tuple[float, str]:
    """Returns the least seconds for ``cost`` on this machine, and what sets them."""
    if cost.flops:
        rate = limits.gemm_flops_per_second(device, dtype)
        return cost.flops / rate, f"GEMM {rate / 1e9:.0f} GFLOP/s"
    seconds = copy_seconds or limits.copy_seconds(cost.bytes, device)
    return seconds, f"copy {cost.bytes / seconds / 1e9:.1f} GB/s"


def row(
    case: Case,
    device: str,
    dtype: torch.dtype,
    pass_: str,
    name: str,
    quartiles,
    floor_ms: float | None,
    **more,
) -> Row:
    """Returns the row of one implementation from its quartiles and the least time of the pass in ms, if known."""
    q1, median, q3 = quartiles
    cost = case.costs(dtype.itemsize).get(pass_)
    return Row.measured(
        suite="ops",
        name=case.op,
        case=case.name,
        shape=case.shape,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        pass_=pass_,
        implementation=name,
        median_ms=round(median, 6),
        q1_ms=round(q1, 6),
        q3_ms=round(q3, 6),
        bytes=cost.bytes if cost else None,
        flops=cost.flops if cost else None,
        fraction_of_limit=round(floor_ms / median, 4) if floor_ms else None,
        **more,
    )


def _timed(
    variants: dict[str, Variant], settings: Settings, device: str, times: int = 1
) -> dict[str, Timing]:
    return interleave(
        variants,
        reps=times * settings.reps,
        warmup=settings.warmup,
        sample_seconds=times * settings.sample_seconds,
        seconds=settings.seconds,
        device=device,
    )


def measure(
    case: Case,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    settings: Settings | None = None,
    passes: Sequence[str] | None = None,
    skip: Callable[[str], bool] = lambda _: False,
    report: Report = lambda _: None,
) -> Iterator[list[Row]]:
    """Measures ``case`` pass by pass, ``passes`` or all of its own, and yields the rows of each. If ``skip(pass)`` is
    true, that pass is left out.
    """
    settings = settings or Settings()
    passes = [p for p in passes or case.passes if not skip(p)]
    if not passes:
        return
    # Each case compiles from scratch: graphs of an earlier shape would make this one's dynamic.
    torch._dynamo.reset()
    torch.manual_seed(0)
    implementations = {}
    for name, build in case.make(device, dtype).items():
        if name == "compile" and not settings.compile:
            continue
        try:
            implementations[name] = build()
        except Unavailable as reason:
            report(f"{case.op} {case.name}: {name} left out: {reason}")
    for pass_ in passes:
        variants = {}
        for name, implementation in implementations.items():
            try:
                made = variant(implementation, pass_)
                made.call()
            except Exception as error:  # one broken implementation must not end the run; the report names it
                first = (str(error).strip().splitlines() or [""])[0]
                report(
                    f"{case.op} {case.name}, {pass_}: {name} failed: {type(error).__name__}: {first[:160]}"
                )
                continue
            variants[name] = made
        if not variants:
            continue
        cost = case.costs(dtype.itemsize)[pass_] if settings.limits else None
        if case.copy and cost:
            variants["copy"] = _copy_variant(cost.bytes, device)
        load = LoadMeter()
        timings = _timed(variants, settings, device)
        medians = {name: timing.median for name, timing in timings.items()}
        if (ratio_to_fastest(medians) or math.inf) < settings.doubted:
            timings = _timed(variants, settings, device, LONGER)
        other = load.other_cores()
        floor, limit = None, None
        if cost:
            copy = timings["copy"].median if case.copy else None
            floor, limit = _floor_seconds(cost, device, dtype, copy)
        rows = []
        for name, timing in timings.items():
            memory = peak_bytes(variants[name], device) if settings.memory and name != "copy" else None
            lower, upper = timing.quartiles
            quartiles = [1e3 * seconds for seconds in (lower, timing.median, upper)]
            more = {"reps": timing.reps, "peak_bytes": memory, "limit": limit, "load": other}
            rows.append(row(case, device, dtype, pass_, name, quartiles, floor and 1e3 * floor, **more))
        yield rows
