# SPDX-License-Identifier: Apache-2.0
"""The cost of a call besides its arithmetic: every op on the smallest sample of its table.

Rows hold milliseconds like all others; a call takes microseconds. The implementations are the eager formula, the public
function ``fastasr.ops.<name>``, and the registered operator ``torch.ops.fastasr.<name>`` ("operator").
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastasr import ops
from fastasr.benchmarks.case import Report, Settings
from fastasr.benchmarks.harness import LoadMeter, Variant, interleave
from fastasr.benchmarks.rows import Row
from fastasr.testing.table import Make, floating, table

NAME = "dispatch"
INFERENCE, NO_GRAD, FORWARD, BOTH = "inference mode", "no_grad", "forward", "forward+backward"
PASSES = (INFERENCE, NO_GRAD, FORWARD, BOTH)
CASE = "tiny tensor"


@dataclass(frozen=True)
class Tiny:
    """An op's keyword arguments at the smallest sample, and its three ways of being called."""

    arguments: dict
    functions: dict[str, Callable]
    passes: tuple[str, ...]

    @property
    def shape(self) -> str:
        return "x".join(map(str, next(iter(floating(self.arguments).values())).shape))


def tiny(name: str, device: str = "cpu") -> Tiny:
    samples = table(name)
    calls = (sample.arguments(Make(device=device)) for sample in samples.samples if sample.exact)
    sizes = [(sum(t.numel() for t in floating(a).values()), a) for a in calls]
    arguments = min((sized for sized in sizes if sized[0]), key=lambda sized: sized[0])[1]

    def operator(**arguments):
        return samples.overload(*samples.registered(arguments))

    functions = {"eager": samples.definition, "fastasr": samples.function, "operator": operator}
    return Tiny(arguments, functions, (INFERENCE, NO_GRAD) if name in ops.GRADIENTS else PASSES)


def _first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _variant(function: Callable, arguments: dict, pass_: str) -> Variant:
    if pass_ in (INFERENCE, NO_GRAD):
        return Variant(lambda: function(**arguments))
    leaves = {name: t.detach().requires_grad_(True) for name, t in floating(arguments).items()}
    arguments = arguments | leaves
    if pass_ == FORWARD:
        return Variant(lambda: function(**arguments))
    grad = torch.ones_like(_first(function(**arguments)).detach())

    def both():
        _first(function(**arguments)).backward(grad)
        for tensor in leaves.values():
            tensor.grad = None

    return Variant(both)


def _mode(pass_: str):
    """Returns the mode of a pass. It is entered once around the timing, because entering it is not part of a call."""
    if pass_ == INFERENCE:
        return torch.inference_mode()
    return torch.set_grad_enabled(pass_ != NO_GRAD)


def measure(
    *,
    device: str = "cpu",
    settings: Settings | None = None,
    only: Callable[[str], bool] = lambda _: True,
    skip: Callable[[str, str, str], bool] = lambda op, shape, pass_: False,
    report: Report = lambda _: None,
) -> Iterator[list[Row]]:
    """Yields the rows of one op and pass at a time. ``only(op)`` chooses ops, ``skip(op, shape, pass)`` leaves out."""
    settings = settings or Settings()
    for name in filter(only, ops.NAMES):
        call = tiny(name, device)
        for pass_ in call.passes:
            if skip(name, call.shape, pass_):
                continue
            variants = {}
            with _mode(pass_):
                for implementation, function in call.functions.items():
                    try:
                        variant = _variant(function, call.arguments, pass_)
                        variant.call()
                    except Exception as error:  # It is reported, and the others are measured.
                        report(f"dispatch {name}, {pass_}: {implementation} failed: {error}")
                        continue
                    variants[implementation] = variant
                load = LoadMeter()
                timings = interleave(
                    variants,
                    reps=settings.reps,
                    warmup=20,
                    sample_seconds=settings.sample_seconds,
                    max_calls=5000,
                    device=device,
                )
            other = load.other_cores()
            yield [
                Row.measured(
                    suite="dispatch",
                    name=name,
                    case=CASE,
                    shape=call.shape,
                    dtype="float32",
                    device=device,
                    pass_=pass_,
                    implementation=implementation,
                    median_ms=round(timing.median * 1e3, 7),
                    q1_ms=round(timing.quartiles[0] * 1e3, 7),
                    q3_ms=round(timing.quartiles[1] * 1e3, 7),
                    reps=timing.reps,
                    load=other,
                )
                for implementation, timing in timings.items()
            ]
