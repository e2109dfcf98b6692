# SPDX-License-Identifier: Apache-2.0
"""Zipformer-M inference, batch of 4, 16 s: upstream as shipped, upstream with only its linears replaced,
fastasr.

The second shows how much of the gain is the GEMM's and how much the kernels'. The benchmark measures the whole model,
each of its stacks, and, in a fresh process with cold caches, the first call against the second.
"""

import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.case import Report
from fastasr.benchmarks.harness import LoadMeter, Timing, Variant, in_fresh_process, interleave
from fastasr.benchmarks.models import unit
from fastasr.benchmarks.models.unit import (
    COMPILE,
    FASTASR,
    FORWARD,
    LINEAR,
    UPSTREAM,
    Run,
    benchmark,
    timed_row,
    with_linear,
)
from fastasr.benchmarks.rows import Row
from fastasr.testing.speed import Case

NAME = "zipformer"
WHOLE, STACKS, AUTOCAST = "whole model", "stacks", "whole model, autocast(bfloat16)"
FIRST, SECOND, SWAP = "first call", "second call", "accelerate()"
BATCH, FRAMES = 4, 1600
FIRST_CALL_TIMEOUT = 300  # seconds for one fresh process
QUICK = {"size": "tiny", "batch": 2, "frames": 200, "fresh": False}


def variants(shipped: torch.nn.Module) -> dict[str, Callable[[], torch.nn.Module]]:
    """Returns functions that make each implementation's model from upstream's."""
    return {
        UPSTREAM: lambda: shipped,
        LINEAR: lambda: copy.deepcopy(shipped),
        FASTASR: lambda: unit.swapped(shipped),
    }


def _call(model: Callable, inputs: tuple) -> Callable[[], torch.Tensor]:
    return unit.inference(lambda: model(*inputs)[0])


def _autocast(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    return forward


def _flops(size: str, inputs: tuple) -> int:
    """Returns multiply and add operations of the products and convolutions of one forward."""
    return unit.product_flops(_call(upstream.zipformer(size, inner_compile=False), inputs))


class _Parts:
    """Measures the seconds spent in the front end and in each stack, by forward hooks; one list per call."""

    def __init__(self, model: torch.nn.Module):
        self.seconds: dict[str, list[float]] = {}
        self._handles = []
        parts = {"front end": model.encoder_embed}
        parts.update({f"stack {i}": stack for i, stack in enumerate(model.encoder.encoders)})
        for name, module in parts.items():
            self._watch(name, module)

    def _watch(self, name: str, module: torch.nn.Module) -> None:
        times = self.seconds.setdefault(name, [])
        begun = []

        def before(_module, _inputs):
            begun.append(time.perf_counter())

        def after(_module, _inputs, _output):
            times.append(time.perf_counter() - begun.pop())

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _row(case: str, implementation: str, timing: Timing, shape: str, load: float | None) -> Row:
    fields = {"name": NAME, "case": case, "shape": shape, "pass_": FORWARD, "load": load}
    dtype = "bfloat16" if case == AUTOCAST else "float32"
    return timed_row(timing, implementation=implementation, dtype=dtype, **fields)


def _fresh_process(implementation: str, size: str) -> dict[str, float]:
    """Returns the seconds of accelerate(), the first and the second call in a new process with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "FASTASR_CACHE")
        empty = {name: os.path.join(cache, name.lower()) for name in caches}
        module = "fastasr.benchmarks.models.first_call"
        return in_fresh_process(module, implementation, size, timeout=FIRST_CALL_TIMEOUT, **empty)


def _first_calls(size: str, shape: str, report: Report) -> list[list[Row]]:
    units: dict[str, list[Row]] = {FIRST: [], SECOND: [], SWAP: []}
    for implementation in (UPSTREAM, FASTASR):
        report(f"{NAME}: first and second call of {implementation} in a fresh process, empty caches")
        load = LoadMeter()
        try:
            seconds = _fresh_process(implementation, size)
        except (RuntimeError, ValueError, OSError) as error:
            report(f"{NAME}: first call of {implementation} not measured: {error}")
            continue
        for case, value in seconds.items():
            units[case].append(_row(case, implementation, Timing([value]), shape, load.other_cores()))
    return [rows for rows in units.values() if rows]


def shape_name(size: str = "medium", batch: int = BATCH, frames: int = FRAMES) -> str:
    return f"{size} {batch}x{frames}x{upstream.BINS}"


def sized(frames: int, batch: int) -> Case:
    """Returns the case of a sweep. Upstream's own compilation of its activations would take most of a cell's time."""
    inputs = upstream.example(batch, frames)
    make = partial(upstream.zipformer, inner_compile=False)
    return unit.sized(NAME, shape_name("medium", batch, frames), make, *inputs)


@benchmark(NAME)
def measure(
    run: Run, size: str = "medium", batch: int = BATCH, frames: int = FRAMES, fresh: bool = True
) -> Iterator[list[Row]]:
    """Yields the rows of the whole model, of its parts and of the first calls.

    ``compile_model`` adds upstream under torch.compile (minutes of compilation, given up after 15); ``fresh`` the first
    calls in fresh processes. The cases are WHOLE, AUTOCAST, STACKS and FIRST. Raises ``upstream.MissingUpstream``.
    """
    reps, report = run.reps or min(run.settings.reps, 9), run.report
    name = shape_name(size, batch, frames)

    def skip(case: str) -> bool:
        return run.skip(case, name, FORWARD)

    inputs = upstream.example(batch, frames)
    if fresh and not skip(FIRST):
        yield from _first_calls(size, name, report)
    if skip(WHOLE) and skip(STACKS) and skip(AUTOCAST):
        return
    report(f"{NAME}: building upstream's model ({size}) and its replacements")
    shipped = upstream.zipformer(size)
    models = run.made(variants(shipped))
    calls = {key: _call(model, inputs) for key, model in models.items()}
    calls[LINEAR] = with_linear(calls[LINEAR])
    if run.compile_model:
        calls[COMPILE] = _call(torch.compile(copy.deepcopy(shipped)), inputs)
    for key, call in list(calls.items()):
        report(f"{NAME}: first call of {key}" + (" (compiles for minutes)" if key == COMPILE else ""))
        if key != COMPILE:
            call()
        elif reason := unit.why_not_compiled(call):
            report(f"{NAME}: {COMPILE} left out: {reason}")
            del calls[key]
    if not skip(WHOLE):
        report(f"{NAME}: timing {', '.join(calls)}, {reps} rounds")
        made = {key: Variant(call) for key, call in calls.items()}
        fields = {"case": WHOLE, "shape": name, "pass_": FORWARD}
        yield run.rows(made, _flops(size, inputs), reps=reps, warmup=1, sample_seconds=0.0, **fields)
    if not skip(AUTOCAST):
        report(f"{NAME}: timing under autocast, {reps} rounds")
        load = LoadMeter()
        runs = {key: Variant(_autocast(calls[key])) for key in (UPSTREAM, FASTASR) if key in calls}
        timings = interleave(runs, reps=reps, warmup=1, sample_seconds=0.0)
        other = load.other_cores()
        yield [_row(AUTOCAST, key, timing, name, other) for key, timing in timings.items()]
    if not skip(STACKS):
        report(f"{NAME}: timing each stack, {reps} rounds")
        parts = {key: _Parts(model) for key, model in models.items()}
        load = LoadMeter()
        interleave({key: Variant(calls[key]) for key in models}, reps=reps, warmup=1, sample_seconds=0.0)
        other = load.other_cores()
        for part in parts.values():
            part.remove()
        for case in next(iter(parts.values())).seconds:
            yield [
                _row(case, key, Timing(part.seconds[case][-reps:]), name, other)
                for key, part in parts.items()
            ]
