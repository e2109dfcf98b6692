# SPDX-License-Identifier: Apache-2.0
"""Says whether an op is right on a machine: a verdict has a column for each of ``CHECKS``."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastasr.benchmarks.device.machine import GPU, Skipped
from fastasr.testing import recorded_steps
from fastasr.testing.checks import _same, compared, parity, poisoned, values_and_gradients
from fastasr.testing.peers import MissingUpstream
from fastasr.testing.table import (
    Make,
    OpTable,
    flat,
    floating,
    forward_and_backward,
    is_gradient,
    table,
    with_tensors,
)
from fastasr.testing.tolerance import Comparison, judged

DTYPES = (torch.float32, torch.bfloat16)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def small_shapes(machine: GPU, table: OpTable) -> None:
    """Values and gradients of the small samples are as near to float64 as eager's, and depend on no memory that was not
    written.
    """
    for sample in machine.samples(table):
        for check, dtype in (*((parity, dtype) for dtype in DTYPES), (poisoned, torch.float32)):
            try:
                check(table, sample, dtype, machine.device)
            except AssertionError as error:
                raise AssertionError(f"{sample.name}, {_named(dtype)}, {check.__name__}: {error}") from error


def training_shape(machine: GPU, table: OpTable) -> None:
    """Values and gradients at a shape of training are as near to float64 as eager's. If the device lacks the memory,
    float32 is the reference, and bfloat16 alone is checked.
    """
    short, failed = False, []
    for dtype in DTYPES:
        try:
            if not short:
                failed += _as_near(machine, table, dtype, torch.float64)
        except torch.OutOfMemoryError:
            short = True
        # This is outside the handler, because the exception keeps the tensors alive.
        if short and dtype is not torch.float32:
            torch.cuda.empty_cache()
            failed += _as_near(machine, table, dtype, torch.float32)
    assert not failed, "; ".join(failed)


def _as_near(machine: GPU, table: OpTable, dtype: torch.dtype, oracle: torch.dtype) -> list[str]:
    """Returns the names of results with larger errors than eager's."""

    def one_draw(draw: int, _: bool) -> Iterator[tuple[str, Comparison]]:
        arguments = machine.cases(table.op)[0].arguments(Make(dtype, machine.device, draw))
        return compared(table, arguments, dtype, draw, oracle=oracle)

    failed = judged(one_draw, 1, machine.more_draws)
    return [f"{_named(dtype)}, {name}: {c}" for name, c in failed.items()]


def three_repeats(machine: GPU, table: OpTable) -> None:
    """Three runs at the shape of training give the same bits, values and gradients."""
    arguments = machine.cases(table.op)[0].arguments(Make(torch.bfloat16, machine.device))
    first, grads, cotangent = values_and_gradients(table.function, arguments)
    for run in ("second", "third"):
        again, grads_again, _ = values_and_gradients(table.function, arguments, cotangent)
        _same(again.detach(), first.detach(), f"values of the {run} run")
        for name, grad in grads_again.items():
            _same(grad, grads[name], f"gradient of {name} in the {run} run")


def _step(table: OpTable, arguments: dict) -> Callable[[], tuple[Tensor, ...]]:
    """Returns a function without arguments that returns the op's output and gradients, of one fixed cotangent.

    It copies the arguments first, so an op that runs on another stream than the current one reads wrong numbers.
    """
    y = flat(table.function(**arguments))
    cotangent = Make(y.dtype, y.device, "cotangent").normal(*y.shape)

    def step() -> tuple[Tensor, ...]:
        wanted = not is_gradient(table.function)
        leaves = with_tensors(arguments, lambda _, t: t.clone().requires_grad_(wanted))
        y = flat(table.function(**leaves))
        inputs = tuple(floating(leaves).values()) if wanted else ()
        return y.detach(), *(torch.autograd.grad(y, inputs, cotangent.clone()) if inputs else ())

    return step


def _calls(machine: GPU, table: OpTable, dtype: torch.dtype) -> Iterator[tuple[str, dict]]:
    """Yields name and arguments of the samples, without dropout, which draws other numbers in every call."""
    for sample in machine.samples(table):
        arguments = sample.arguments(Make(dtype, machine.device))
        yield sample.name, arguments | ({"training": False} if "training" in arguments else {})


def cuda_graph(machine: GPU, table: OpTable) -> None:
    """A captured call, forward and backward, gives the same bits when it is replayed."""
    for name, arguments in _calls(machine, table, torch.float32):
        step = _step(table, arguments)
        expected = [t.clone() for t in step()]
        tensors, replay = machine.captured(step)
        for t in tensors:
            t.zero_()
        replay()
        machine.synchronize()
        for i, (a, b) in enumerate(zip(tensors, expected, strict=True)):
            _same(a, b, f"{name}, {'a gradient' if i else 'values'} after a replay")


def second_stream(machine: GPU, table: OpTable) -> None:
    """On a stream that is behind the default one, the op gives the same bits."""
    for name, arguments in _calls(machine, table, torch.bfloat16):
        step = _step(table, arguments)
        for a, b in zip(machine.on_another_stream(step), step(), strict=True):
            _same(a, b, f"{name}, on a second stream")


def second_device(machine: GPU, table: OpTable) -> None:
    """Tensors of a device that is not the current one are computed there, with the same bits."""
    device = machine.second_device()
    for name, here in _calls(machine, table, torch.float32):
        there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in here.items()}
        for a, b in zip(_step(table, there)(), _step(table, here)(), strict=True):
            _same(a.cpu(), b.cpu(), f"{name}, on {device}")


# Title -> check. The verdict and docs/gpu-queue.md have a column for each.
CHECKS: dict[str, Callable[[GPU, OpTable], None]] = {
    check.__name__.replace("_", " ").replace("cuda", "CUDA"): check
    for check in (small_shapes, training_shape, three_repeats, cuda_graph, second_stream, second_device)
}


def reported(tell: Callable[[dict], None], title: str, check: Callable[[], None]) -> bool:
    """Runs a check and tells its result. Returns False if the device may be unable to run another one."""
    tell({"check": title, "found": "started"})
    try:
        check()
    except (Skipped, MissingUpstream, torch.OutOfMemoryError) as reason:
        tell({"check": title, "found": "skipped", "message": str(reason)})
    except Exception as error:
        tell({"check": title, "found": "wrong", "message": f"{type(error).__name__}: {error}"[:2000]})
        return not (isinstance(error, RuntimeError) and "CUDA error" in str(error))
    else:
        tell({"check": title, "found": "right"})
    return True


def check_op(tell: Callable[[dict], None], machine: GPU, op: str) -> None:
    """Runs every check of an op."""

    def all_of_them() -> None:
        with machine.serving(op):
            for title, check in CHECKS.items():
                if not reported(tell, title, partial(check, machine, table(op))):
                    return

    reported(tell, "kernels", all_of_them)


def launch(op: str, device: str = "cuda") -> None:
    """Launches every kernel of an op on all of its samples, forward and backward. compute-sanitizer watches this.
    ``bypass`` stands for the other steps along a Zipformer's residual stream too.
    """
    if op == "bypass":
        recorded_steps.launch(device)
    for sample in table(op).samples:
        for dtype in DTYPES:
            forward_and_backward(table(op), sample, dtype, device)
