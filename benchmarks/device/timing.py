# SPDX-License-Identifier: Apache-2.0
"""Times an op or a training step on a machine, beside eager, ``torch.compile``, a copy and the prediction."""

import contextlib
import random
import statistics
from collections.abc import Callable
from functools import partial

import torch

import fastasr
from fastasr.benchmarks import limits, upstream
from fastasr.benchmarks.case import Case, row, variant
from fastasr.benchmarks.device.checks import reported
from fastasr.benchmarks.device.machine import GPU
from fastasr.benchmarks.harness import Variant, peak_bytes
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.time_limit import Expired, time_limit
from fastasr.models import fast_conformer, zipformer

ROUNDS, CALLS, WARMUP = 5, 5, 3
ROUNDS_OF_MODELS = 2
COMPILE_SECONDS = 60  # A graph that takes longer leaves its column empty; the others are measured.
NORMS = 0.05  # The norm of all gradients in bfloat16 may differ from eager's in float32 by this share.

# milliseconds by implementation: on the device, on the host
Times = dict[str, tuple[list[float], list[float]]]


def _timed(machine: GPU, variants: dict[str, Variant], rounds: int = ROUNDS) -> Times:
    """Times the implementations in turns, so that a slow minute of the machine affects all of them."""
    times: Times = {name: ([], []) for name in variants}
    for round_ in range(1 if machine.dry else rounds):
        for name, made in variants.items():
            found = machine.milliseconds(made, 0 if round_ else WARMUP, CALLS)
            for kept, new in zip(times[name], found, strict=True):
                kept.extend(new)
    return times


def _quartiles(times: list[float]) -> list[float]:
    return statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3


def _ready(build: Callable, pass_: str) -> Variant:
    made = variant(build(), pass_)
    made.call()
    return made


def _variants(tell: Callable, machine: GPU, case: Case, dtype: torch.dtype, pass_: str) -> dict[str, Variant]:
    """Returns the implementations of one pass of a case, each called once; tells which rival cannot run."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    builds = {name: build for name, build in case.make(machine.device, dtype).items() if name != "upstream"}
    variants = {"fastasr": _ready(builds.pop("fastasr"), pass_)}
    for name, build in builds.items():
        try:
            with time_limit(COMPILE_SECONDS):
                variants[name] = _ready(build, pass_)
        except (Exception, Expired) as error:
            tell({"left_out": name, "pass": pass_, "message": f"{type(error).__name__}: {error}"[:300]})
    return variants


def time_pass(tell: Callable, machine: GPU, case: Case, dtype: torch.dtype, pass_: str) -> None:
    """Tells the rows of one pass of a case. ``fraction_of_limit`` is the time of a copy of the same bytes, or of the
    products, over the median.
    """
    variants = _variants(tell, machine, case, dtype, pass_)
    cost = case.costs(dtype.itemsize)[pass_]
    source, destination = limits.copy_buffers(cost.bytes, machine.device)
    variants["copy"] = Variant(lambda: destination.copy_(source))
    times = _timed(machine, variants)
    limit_ms = statistics.median(times["copy"][0])
    limit = f"copy {cost.bytes / limit_ms / 1e6:.0f} GB/s"
    rate = limits.gemm_flops_per_second(machine.device, dtype) if cost.flops else 1.0
    if cost.flops / rate * 1e3 > limit_ms:
        limit_ms, limit = cost.flops / rate * 1e3, f"GEMM {rate / 1e12:.0f} TFLOP/s"
    rows = []
    for name, (device, host) in times.items():
        more = {"reps": len(device), "limit": limit, "host_ms": round(statistics.median(host), 6)}
        if name != "copy" and not machine.dry:
            more["peak_bytes"] = peak_bytes(variants[name], machine.device)
        made = row(case, machine.device, dtype, pass_, name, _quartiles(device), limit_ms, **more)
        rows.append(made.to_dict())
    tell({"rows": rows})


def _of_every_pass(measure: Callable, tell: Callable, machine: GPU, op: str, index: int, *more) -> None:
    case = machine.cases(op)[index]

    def every_pass() -> None:
        with machine.serving(op):
            for pass_ in case.passes[:2]:
                measure(tell, machine, case, *more, pass_)

    reported(tell, "timing", every_pass)


def time_op(tell: Callable, machine: GPU, op: str, index: int, dtype: torch.dtype) -> None:
    """Times one of an op's cases at sizes of training, forward and backward."""
    _of_every_pass(time_pass, tell, machine, op, index, dtype)


def compile_op(tell: Callable, machine: GPU, op: str, index: int, dtype: torch.dtype) -> None:
    """Calls once everything that ``time_op`` times, so that torch.compile and Triton have it in their caches; several
    ops may be compiled at a time. ``time_op`` tells which implementation cannot run.
    """

    def silent(message: dict) -> None:
        if "left_out" not in message:
            tell(message)

    _of_every_pass(_variants, silent, machine, op, index, dtype)


def _zipformer(machine: GPU) -> tuple[str, torch.nn.Module, tuple]:
    """Returns shape, model and inputs: Zipformer-M on 20 utterances of 30 s, fewer where memory is short."""
    torch.manual_seed(0)
    if machine.dry:
        size, batch, frames = "tiny", 2, 100
    else:
        size, batch, frames = "medium", 20 if torch.cuda.mem_get_info()[0] > 6e10 else 4, 3000
    model = upstream.drawing(upstream.steady(upstream.Encoder(upstream.SIZES[size], zipformer))).train()
    return f"{size} {batch}x{frames}x80", model, upstream.example(batch, frames)


class _Block(torch.nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.positions = fast_conformer.FastConformerPositions(width)
        self.block = fast_conformer.FastConformerBlock(
            width, heads, 4 * width, attention_dropout=0.1, dropout=0.1
        )

    def forward(self, x):
        return (self.block(x, position_embeddings=self.positions(x)),)


def _fast_conformer(machine: GPU) -> tuple[str, torch.nn.Module, tuple]:
    """Returns shape, model and inputs: a block of a 110M Parakeet on 20 utterances of 30 s."""
    torch.manual_seed(0)
    batch, frames, width, heads = (2, 12, 32, 2) if machine.dry else (20, 375, 512, 8)
    return f"{batch}x{frames}x{width}", _Block(width, heads), (torch.randn(batch, frames, width),)


# Name -> its maker, and whether torch.compile takes it: Zipformer's schedules and dropped layers recompile forever
MODELS = {"zipformer_training": (_zipformer, False), "fast_conformer_training": (_fast_conformer, True)}


def time_model(tell: Callable, machine: GPU, name: str) -> None:
    """Times a training step under autocast to bfloat16, forward and backward, with the same random numbers each time.

    The norm of all gradients must be near eager's in float32, or no further from it than eager's in bfloat16,
    whose own rounding may be large.
    """
    reported(tell, "timing", partial(_time_model, tell, machine, name))


def weighted(y: torch.Tensor) -> torch.Tensor:
    """Returns a loss with another weight for each number."""
    return (y * torch.arange(y.numel(), device=y.device).sin().view_as(y)).sum()


def _steps(machine: GPU, name: str) -> tuple[str, dict[str, Callable[[], None]], Callable[[], float]]:
    """Returns shape, implementation -> a training step, which leaves gradients behind, and a function for their norm.
    The step "float32" is eager's without autocast and TF32.
    """
    build, compiles = MODELS[name]
    shape, model, inputs = build(machine)
    model, inputs = model.to(machine.device), tuple(t.to(machine.device) for t in inputs)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(backend: str, call: Callable, cast: bool = True) -> None:
        torch.manual_seed(0)
        random.seed(0)
        for p in parameters:
            p.grad = None
        with fastasr.backend(backend):
            with torch.autocast(machine.device, torch.bfloat16, enabled=cast):
                y = call(*inputs)[0].float()
            weighted(y).backward()

    def exact() -> None:  # the last step of its process, to which these settings are left
        for products in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            products.fp32_precision = "ieee"
        step("eager", model, cast=False)

    def norm() -> float:
        return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item()

    ways = {"fastasr": ("auto", model), "eager": ("eager", model)}
    if compiles and not machine.dry:
        ways["compile"] = ("eager", torch.compile(model))
    return shape, {key: partial(step, *way) for key, way in ways.items()} | {"float32": exact}, norm


def compile_model(tell: Callable, machine: GPU, name: str) -> None:
    """Calls once each step that ``time_model`` times, as ``compile_op`` does for an op."""
    for run in _steps(machine, name)[1].values():
        with contextlib.suppress(Exception, Expired), time_limit(2 * COMPILE_SECONDS):  # time_model tells
            run()


def _time_model(tell: Callable, machine: GPU, name: str) -> None:
    shape, steps, norm = _steps(machine, name)
    norms, rows = {}, []
    for key, run in steps.items():
        try:
            with time_limit(2 * COMPILE_SECONDS):
                run()
        except (Exception, Expired) as error:
            if key != "compile":
                raise
            message = f"{type(error).__name__}: {error}"[:300]
            tell({"left_out": key, "pass": "training step", "message": message})
            continue
        norms[key] = norm()
        if key == "float32":
            continue
        device, host = _timed(machine, {key: Variant(run)}, ROUNDS_OF_MODELS)[key]
        q1, median, q3 = _quartiles(device)
        made = Row.measured(
            suite="models", name=name, case="training step", shape=shape, dtype="bfloat16",
            device=machine.device, pass_="forward+backward", implementation=key, median_ms=median, q1_ms=q1,
            q3_ms=q3, reps=len(device), host_ms=statistics.median(host),
            peak_bytes=None if machine.dry else peak_bytes(run, machine.device),
        )  # fmt: skip
        rows.append(made.to_dict())
        tell({"busy_ms": machine.busy_milliseconds(run), "of": key})
    tell({"rows": rows})
    ours, eagers = (abs(norms[key] / norms["float32"] - 1) for key in ("fastasr", "eager"))
    tell({"norm_off": ours, "norm_of_eager_off": eagers})
    assert ours <= max(NORMS, eagers), (
        f"the norm of the gradients is off by {ours:.1%}, eager's by {eagers:.1%}"
    )
