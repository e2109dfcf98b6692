# SPDX-License-Identifier: Apache-2.0
"""A case: one op at one shape, its implementations, and the least that each pass must move and compute."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fastasr.benchmarks import limits, upstream
from fastasr.benchmarks.harness import LoadMeter, Variant, interleave, peak_bytes
from fastasr.benchmarks.rows import Row

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
PASSES = (FORWARD, BACKWARD, BOTH)
FRAMES, BATCH = 1500, 20  # a training step on a GPU: 30 s of speech, 20 utterances

Report = Callable[[str], None]


class Unavailable(Exception):
    """Raised when an implementation cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Cost:
    """The least a pass needs: bytes read and written once, multiply and add operations of products."""

    bytes: int
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def costs_of(forward: Cost, backward: Cost) -> dict[str, Cost]:
    """Returns the costs of each pass; both passes together cost the sum."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def costs(forward: tuple[int, int], backward: tuple[int, int]) -> Callable[[int], dict[str, Cost]]:
    """Returns the costs by item size of passes given as (values read and written, operations)."""
    return lambda size: costs_of(*(Cost(values * size, flops) for values, flops in (forward, backward)))


@dataclass
class Implementation:
    """``call`` computes the output; gradients are taken with respect to ``differentiable``.

    ``inference`` is the forward pass without gradients where that is another call, for example where a module is in
    evaluation mode then.
    """

    call: Callable[[], torch.Tensor]
    differentiable: Callable[[], tuple[torch.Tensor, ...]]
    inference: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """``make(device, dtype)`` allocates the inputs and returns, per implementation, a function without
    arguments that builds it (and may raise ``Unavailable``), so that a missing package costs one
    implementation only.

    ``copy`` adds the implementation "copy", a plain copy of the pass's bytes, as the limit of the machine.
    """

    op: str
    name: str
    shape: str
    make: Callable[[str, torch.dtype], Mapping[str, Callable[[], Implementation]]]
    costs: Callable[[int], Mapping[str, Cost]]  # item size in bytes -> cost by pass
    copy: bool = False
    passes: tuple[str, ...] = PASSES
    quick: bool = True  # part of a quick run


@dataclass(frozen=True)
class Settings:
    """How long to measure. ``compile`` includes torch.compile'd formulas."""

    reps: int = 15
    warmup: int = 3
    sample_seconds: float = 0.02
    compile: bool = True
    memory: bool = True

    @classmethod
    def quick(cls, **changes) -> "Settings":
        return cls(**{"reps": 3, "warmup": 1, "sample_seconds": 0.002, "memory": False, **changes})


def parameters(*tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Returns the tensors, made to require gradients."""
    for tensor in tensors:
        tensor.requires_grad_(True)
    return lambda: tensors


def simple(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> Implementation:
    """Wraps ``function(*tensors)``, with gradients of every tensor."""
    return Implementation(lambda: function(*tensors), parameters(*tensors))


def module(
    instance: torch.nn.Module, *inputs: torch.Tensor, result: Callable | None = None, **state: torch.Tensor
) -> Implementation:
    """Wraps ``instance(*inputs)``, with gradients of the inputs and parameters, which take the values in ``state``."""
    for name, value in state.items():
        parameter = instance.get_parameter(name)
        parameter.data = value.detach().reshape(parameter.shape).clone()
    return Implementation(_call(instance, inputs, result), parameters(*inputs, *instance.parameters()))


def _call(function: Callable, inputs: Sequence, result: Callable | None) -> Callable[[], torch.Tensor]:
    """Returns a function without arguments; ``result`` takes the tensor from what ``function`` returns."""
    return (lambda: function(*inputs)) if result is None else (lambda: result(function(*inputs)))


def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compiles ``function`` with torch.compile for exactly these shapes, as a whole graph."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def versions(
    op: Callable,
    *inputs: torch.Tensor,
    options: Mapping | None = None,
    others: Mapping[str, Callable[[], Implementation]] | None = None,
    compiles: bool = True,
    differentiable: Sequence[torch.Tensor] | None = None,
    result: Callable | None = None,
) -> dict[str, Callable[[], Implementation]]:
    """Returns builders of an op's definition ("eager"), of the compiled definition, of ``others``, and of the op.

    Each computes ``function(*inputs, **options)``, of which ``result`` takes the tensor if it is not one. Gradients are
    those of ``differentiable``, by default of all inputs.
    """

    def build(function):
        call = partial(function, **options) if options else function
        wanted = inputs if differentiable is None else differentiable
        return Implementation(_call(call, inputs, result), parameters(*wanted))

    made = {"eager": lambda: build(op.definition), "compile": lambda: build(compiled(op.definition))}
    if not compiles:
        del made["compile"]
    return made | dict(others or {}) | {"fastasr": lambda: build(op)}


def shaped(op: str, shape: Sequence[int], make: Callable, costs: Callable, note: str = "", **options) -> Case:
    """Returns the case that is named by its shape and the note behind it."""
    name = "x".join(map(str, shape)) + note
    return Case(op, name, name, make, costs, **options)


def variant(implementation: Implementation, pass_: str) -> Variant:
    """Returns what a pass times: a call without gradients, a call and its gradients, or the gradients alone."""
    if pass_ == FORWARD:
        call = implementation.inference or implementation.call

        def forward():
            with torch.no_grad():
                return call()

        return Variant(forward)
    call, wanted = implementation.call, implementation.differentiable()
    grad = torch.randn_like(call().detach())
    if pass_ == BOTH:
        return Variant(lambda: torch.autograd.grad(call(), wanted, grad))
    return Variant(lambda y: torch.autograd.grad(y, wanted, grad), prepare=call)


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
    case: Case, device: str, dtype: torch.dtype, pass_: str, name: str, quartiles, floor_ms: float, **more
) -> Row:
    """Returns the row of one implementation from its quartiles and the least time of the pass, in ms."""
    q1, median, q3 = quartiles
    cost = case.costs(dtype.itemsize)[pass_]
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
        bytes=cost.bytes,
        flops=cost.flops,
        fraction_of_limit=round(floor_ms / median, 4),
        **more,
    )


def measure(
    case: Case,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    settings: Settings | None = None,
    skip: Callable[[str], bool] = lambda _: False,
    report: Report = lambda _: None,
) -> Iterator[list[Row]]:
    """Measures ``case`` pass by pass and yields the rows of each. If ``skip(pass)`` is true, that pass is left out."""
    settings = settings or Settings()
    passes = [p for p in case.passes if not skip(p)]
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
        cost = case.costs(dtype.itemsize)[pass_]
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
        if case.copy:
            variants["copy"] = _copy_variant(cost.bytes, device)
        load = LoadMeter()
        timings = interleave(
            variants,
            reps=settings.reps,
            warmup=settings.warmup,
            sample_seconds=settings.sample_seconds,
            device=device,
        )
        other = load.other_cores()
        floor, limit = _floor_seconds(cost, device, dtype, timings["copy"].median if case.copy else None)
        rows = []
        for name, timing in timings.items():
            memory = peak_bytes(variants[name], device) if settings.memory and name != "copy" else None
            lower, upper = timing.quartiles
            quartiles = [1e3 * seconds for seconds in (lower, timing.median, upper)]
            more = {"reps": timing.reps, "peak_bytes": memory, "limit": limit, "load": other}
            rows.append(row(case, device, dtype, pass_, name, quartiles, 1e3 * floor, **more))
        yield rows


def upstream_member(name: str):
    """Returns a class or function of an upstream package by its full name, or raises ``Unavailable``."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(upstream.module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Unavailable(str(error)) from None
