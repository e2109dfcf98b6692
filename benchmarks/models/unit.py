# SPDX-License-Identifier: Apache-2.0
"""Code that benchmarks of whole models share: names of implementations and passes, and the rows of one unit."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from math import prod
from statistics import median

import torch
from torch.utils._pytree import tree_leaves

from fastasr.benchmarks import limits, upstream
from fastasr.benchmarks.case import Report, Settings
from fastasr.benchmarks.harness import LoadMeter, Timing, Variant, interleave, peak_bytes
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.time_limit import Expired, time_limit
from fastasr.testing.speed import Case, Implementation, Unavailable

UPSTREAM, COMPILE, FASTASR = "upstream", "compile", "fastasr"
LINEAR = "upstream+linear"
BF16, INT8 = "fastasr bf16", "fastasr int8"
FORWARD, BOTH = "forward", "forward+backward"
COMPILE_SECONDS = 900  # for the calls of upstream's model that compile


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


def why_not_compiled(call: Callable[[], object]) -> str:
    """Makes the first two calls of a compiled model, after which nothing compiles any more. Returns "", or the error or
    the limit of time that ended them."""
    try:
        with time_limit(COMPILE_SECONDS):
            call()
            call()
    except (Exception, Expired) as error:  # the other implementations are still worth measuring
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first[:160]}"
    return ""


@dataclass(frozen=True)
class Run:
    """One run of a model's benchmark: its name and how long it measures.

    ``compile_model`` measures upstream under torch.compile too, where that is possible. ``skip(case, shape, pass)``
    leaves a unit out.
    """

    name: str
    settings: Settings
    reps: int | None
    compile_model: bool
    skip: Callable[[str, str, str], bool]
    report: Report

    def made(self, makers: dict[str, Callable[[], torch.nn.Module]]) -> dict[str, torch.nn.Module]:
        """Returns the models of the implementations that can be made."""
        models = {}
        for implementation, make in makers.items():
            try:
                models[implementation] = make()
            except Exception as error:  # the other implementations are still worth measuring
                self.report(f"{self.name}: {implementation} left out: {type(error).__name__}: {error}")
        return models

    def unit(self, case: str, pass_: str, shape: str, runs: dict, reps: int | None = None) -> list[Row]:
        """Returns one row per implementation (its call in ``runs``), all of them timed in turns for ``reps`` rounds,
        if the run does not set them. The floor is the time of the products alone, counted in ``runs[UPSTREAM]``. If
        torch.compile fails, it has no row, and the ``note`` of upstream's row says why.
        """
        head, reps = f"{self.name}: {case}, {pass_}", self.reps or reps or self.settings.reps
        note = ""
        for key, run in list(runs.items()):
            self.report(f"{head}: first call of {key}" + (" (compiles)" if key == COMPILE else ""))
            if key != COMPILE:
                run()
            elif note := why_not_compiled(run):
                note = f"{COMPILE}: {note}"
                self.report(f"{head}: left out: {note}")
                del runs[key]
        flops = product_flops(runs[UPSTREAM])
        self.report(f"{head}: timing {', '.join(runs)}, {reps} rounds")
        made = {key: Variant(run) for key, run in runs.items()}
        rows = self.rows(made, flops, case=case, shape=shape, pass_=pass_, reps=reps)
        for row in rows:
            row.note = note if row.implementation == UPSTREAM else ""
        return rows

    def rows(
        self,
        variants: dict[str, Variant],
        flops: int,
        limit: tuple[float, str] | None = None,
        *,
        reps: int,
        warmup: int = 2,
        sample_seconds: float | None = None,
        memory: bool | None = None,
        **fields,
    ) -> list[Row]:
        """Times the variants in turns and returns a row of each. ``limit``: the least seconds and what sets them, by
        default the products; the settings say how long a sample is and whether rows have ``memory``, if not given.
        """
        if sample_seconds is None:
            sample_seconds = self.settings.sample_seconds
        load, how = LoadMeter(), {"reps": reps, "warmup": warmup, "sample_seconds": sample_seconds}
        if limit is None:
            timings, shares, fields["limit"] = timed_with_products(variants, flops, **how)
        else:
            timings, (seconds, fields["limit"]) = interleave(variants, **how), limit
            shares = {key: seconds / timing.median for key, timing in timings.items()}
        fields |= {"name": self.name, "flops": flops, "load": load.other_cores()}
        return [
            timed_row(
                timing,
                implementation=key,
                peak_bytes=peak_bytes(variants[key]) if memory or self.settings.memory else None,
                fraction_of_limit=round(shares[key], 4),
                **fields,
            )
            for key, timing in timings.items()
        ]


def timed_with_products(
    variants: dict[str, Variant], flops: int, *, calls: int = 4, **how
) -> tuple[dict[str, Timing], dict[str, float], str]:
    """Times the variants in turns, with large products of torch's among them in every round.

    Returns the timings, of each variant the share of its time that products of ``flops`` operations take at the rate of
    the large ones, and that rate in words. A share is the median over the rounds: a clock or a load that changes from
    round to round affects both.
    """
    product, each, _ = limits.large_product()
    timings = interleave(variants | {"": Variant(lambda: [product() for _ in range(calls)])}, **how)
    beside = [calls * each / seconds for seconds in timings.pop("").samples]
    shares = {
        key: median(flops / rate / seconds for rate, seconds in zip(beside, timing.samples, strict=True))
        for key, timing in timings.items()
    }
    return timings, shares, f"GEMM {median(beside) / 1e9:.0f} GFLOP/s"


def product_limit(flops: int) -> tuple[float, str]:
    """Returns the least seconds of the products, and what sets them."""
    rate = limits.gemm_flops_per_second("cpu")
    return flops / rate, f"GEMM {rate / 1e9:.0f} GFLOP/s"


def steps_limit(flops: int, read: int) -> tuple[float, str]:
    """Returns the least seconds of these products and of reading so many bytes, as the steps of a search read weights,
    and what sets them."""
    product, memory = limits.gemm_flops_per_second("cpu"), limits.read_bytes_per_second()
    how = f"GEMM {product / 1e9:.0f} GFLOP/s, reading {memory / 1e9:.0f} GB/s"
    return flops / product + read / memory, how


def timed_row(timing: Timing, *, dtype: str = "float32", **fields) -> Row:
    """Returns a row of the suite "models", with milliseconds of this timing."""
    lower, upper = timing.quartiles
    q1, median, q3 = (round(seconds * 1e3, 4) for seconds in (lower, timing.median, upper))
    return Row.measured(
        suite="models",
        dtype=dtype,
        device="cpu",
        median_ms=median,
        q1_ms=q1,
        q3_ms=q3,
        reps=timing.reps,
        **fields,
    )


def benchmark(name: str) -> Callable:
    """Makes ``measure(*, settings, reps, compile_model, skip, report, **sizes)`` of a function of a ``Run`` and sizes
    that yields the rows of each unit.
    """

    def made(function: Callable) -> Callable:
        @wraps(function)
        def measure(
            *,
            settings: Settings | None = None,
            reps: int | None = None,
            compile_model: bool = False,
            skip: Callable[[str, str, str], bool] = lambda case, shape, pass_: False,
            report: Report = lambda _: None,
            **sizes,
        ) -> Iterator[list[Row]]:
            run = Run(name, settings or Settings(), reps, compile_model, skip, report)
            return function(run, **sizes)

        return measure

    return made


def swapped(model: torch.nn.Module) -> torch.nn.Module:
    """Returns a swapped copy."""
    import fastasr

    model = copy.deepcopy(model)
    fastasr.accelerate(model)
    return model


def reduced(model: torch.nn.Module, weights: str) -> torch.nn.Module | None:
    """Returns a swapped copy with weights of fewer bits, or None if no weight can have them."""
    import fastasr

    model = swapped(model)
    return model if fastasr.accelerate(model, weights=weights).weights.reduced else None


def inference(call: Callable, *arguments, **named) -> Callable[[], object]:
    """Returns a call without gradients."""

    def run():
        with torch.no_grad():
            return call(*arguments, **named)

    return run


def first(output) -> torch.Tensor:
    """Returns a model's first output, or its only one."""
    return output if isinstance(output, torch.Tensor) else first(output[0])


def runs_of(models: dict[str, torch.nn.Module], pass_: str, *inputs) -> dict[str, Callable]:
    """Returns each implementation's call of the pass: COMPILE's under torch.compile, LINEAR's with our products. In a
    backward pass they get the gradient of the first output, and clear those of the parameters and of the inputs."""
    runs = {}
    for key, model in models.items():
        model.train(pass_ == BOTH)
        called = torch.compile(model) if key == COMPILE else model
        runs[key] = inference(called, *inputs) if pass_ == FORWARD else _both(model, called, inputs)
        if key == LINEAR:
            runs[key] = with_linear(runs[key])
    return runs


def _both(model: torch.nn.Module, called: Callable, inputs: tuple) -> Callable[[], None]:
    leaves = [*model.parameters(), *(t for t in tree_leaves(inputs) if t.requires_grad)]
    with torch.no_grad():
        gradient = torch.randn_like(first(model(*inputs)))

    def run():
        for leaf in leaves:
            leaf.grad = None
        first(called(*inputs)).backward(gradient)

    return run


def weighted_step(model: torch.nn.Module, weight: torch.Tensor, *inputs, **named) -> Callable[[], None]:
    """Returns a forward and a backward pass of the weighted sum of the model's first output."""

    def run():
        model.zero_grad()
        (first(model(*inputs, **named)) * weight).sum().backward()

    return run


def with_linear(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Runs ``call`` with fastasr's product in place of ``F.linear``, and with nothing else of fastasr."""
    from fastasr import ops

    functional = torch.nn.functional
    original = functional.linear

    def linear(x, weight, bias=None):
        functional.linear = original  # ops.linear may choose the original.
        try:
            return ops.linear(x, weight, bias)
        finally:
            functional.linear = linear

    def replaced():
        functional.linear = linear
        try:
            return call()
        finally:
            functional.linear = original

    return replaced


def sized(name: str, shape: str, make: Callable[[], torch.nn.Module], *inputs: torch.Tensor) -> Case:
    """Returns a case of a sweep: upstream's model in evaluation mode, as ``make`` returns it, under torch.compile and
    swapped. Gradients are those of the parameters that it uses: upstream's Zipformer has some that it does not.
    """

    def shipped(device: str, dtype: torch.dtype) -> torch.nn.Module:
        try:
            return make().to(device, dtype)
        except upstream.MissingUpstream as reason:
            raise Unavailable(str(reason)) from None

    def versions(device: str, dtype: torch.dtype):
        given = [t.to(device, dtype if t.is_floating_point() else None) for t in inputs]

        def build(change: Callable) -> Implementation:
            model = change(shipped(device, dtype))

            def call() -> torch.Tensor:
                return model(*given)[0]

            def used() -> tuple[torch.Tensor, ...]:
                parameters = tuple(model.parameters())
                found = torch.autograd.grad(call().sum(), parameters, allow_unused=True)
                return tuple(p for p, grad in zip(parameters, found, strict=True) if grad is not None)

            return Implementation(call, used)

        changes = {UPSTREAM: lambda model: model, COMPILE: torch.compile, FASTASR: swapped}
        return {key: partial(build, change) for key, change in changes.items()}

    return Case(name, shape, shape, versions, lambda size: {}, passes=(FORWARD, BOTH))
