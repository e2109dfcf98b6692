# SPDX-License-Identifier: Apache-2.0
"""Random valid and invalid calls at every public op: an error of the right type or the right answer, never a crash.

``python -m fastasr.testing.fuzz -n 2000 --seed 7``. A run draws its seed unless ``--seed`` or ``SEED`` in the
environment gives it. A call depends on (seed, index) alone; the calls run in a child process, so a crash is reported
with the call that caused it: ``--only INDEX`` runs that one again. The tolerance is the op contract's.
"""

import argparse
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastasr.testing.refusals import Refusal, refusals
from fastasr.testing.seeds import begin, seeded
from fastasr.testing.table import Make, OpTable, flat, floating, tables, with_tensors
from fastasr.testing.tolerance import Comparison, compare, judged

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ELEMENTS = 50_000
_SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 65, 129)


T = TypeVar("T")


@dataclass
class Shape:
    """Draws sizes for a table's ``random`` entry. A call returns the dimensions of a tensor."""

    rng: random.Random

    def __call__(self) -> tuple[int, ...]:
        sizes = [self.size() for _ in range(self.rng.randint(0, 4))]
        while math.prod(sizes) > _ELEMENTS:
            sizes.remove(max(sizes))
        return tuple(sizes)

    def size(self) -> int:
        return self.rng.choice(_SIZES)

    def choice(self, options: Sequence[T]) -> T:
        return self.rng.choice(options)


# --------------------------------------------------------------------------- mutations
def _relayout(t: Tensor, rng: random.Random) -> Tensor:
    """Returns the same values at other strides or another offset."""
    kind = rng.randrange(5)
    if kind == 0 or t.dim() == 0:
        return t
    if kind == 1:
        order = list(range(t.dim()))
        rng.shuffle(order)
        inverse = [order.index(d) for d in range(t.dim())]
        return t.permute(order).contiguous().permute(inverse)
    if kind == 2:
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"), dtype=t.dtype, device=t.device)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if kind == 3:
        buffer = torch.full((t.numel() + 3,), float("nan"), dtype=t.dtype, device=t.device)
        buffer[3:] = t.flatten()
        return buffer[3:].view(t.shape)
    return t[:1].expand(t.shape) if t.shape[0] else t


def _special(t: Tensor, rng: random.Random) -> Tensor:
    if not t.numel():
        return t
    t = t.clone(memory_format=torch.contiguous_format)
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-8, 60000.0, -60000.0))
    t.view(-1)[rng.randrange(t.numel())] = value
    return t


def _break(arguments: dict, rng: random.Random) -> dict:
    """Replaces one argument by an unsuitable value, which is sometimes valid by chance."""
    name = rng.choice(list(arguments))
    value = arguments[name]
    if not isinstance(value, Tensor):
        wrong: object = rng.choice((None, -7, 99, 1.5, "x", [], (), True, float("nan"), torch.zeros(2)))
        return arguments | {name: wrong}
    options = (
        lambda: None,
        lambda: value.tolist(),
        lambda: 3,
        lambda: "tensor",
        lambda: value.int(),
        lambda: value.to(rng.choice(_DTYPES)),
        lambda: value.to(torch.complex64),
        lambda: value.to("meta"),
        lambda: value.bool(),
        lambda: value.unsqueeze(0),
        lambda: value.flatten(),
        lambda: value.new_zeros(rng.choice(_SIZES)),
        lambda: value.new_zeros((rng.choice(_SIZES), rng.choice(_SIZES))),
        lambda: torch.cat([value, value], -1) if value.dim() else value.new_zeros(2),
        lambda: value.to_sparse() if value.dim() else value.new_zeros(0),
        lambda: value.transpose(0, -1) if value.dim() else value,
    )
    return arguments | {name: rng.choice(options)()}


# --------------------------------------------------------------------------- judging
class Wrong(Exception):
    """Raised for a call that goes wrong; the message says how."""


def refused(table: OpTable, refusal: Refusal, arguments: dict) -> None:
    """Expects the error of the refusal."""
    try:
        table.function(**arguments)
    except refusal.error as error:
        if not str(error).startswith(f"fastasr.{table.op}: {refusal.blamed}: "):
            raise Wrong(f"{refusal.name}: the message does not say so: {error}") from error
    except Exception as error:
        raise Wrong(f"{refusal.name}: {type(error).__name__}: {error}") from error
    else:
        raise Wrong(f"{refusal.name}: nothing was raised")


class Call:
    """Call number ``index`` of the run. Another ``draw`` of it has other values in tensors of the same shapes."""

    def __init__(self, index: int, only: tuple[str, ...], draw: int = 0) -> None:
        rng = random.Random(seeded(index))
        self.table = tables()[rng.choice(only or list(tables()))]
        arguments = self.table.random(Make(rng.choice(_DTYPES), seed=f"{index}/{draw}"), Shape(rng))
        arguments = with_tensors(arguments, lambda _, t: _relayout(t, rng))
        self.special = rng.random() < 0.2
        if self.special:
            arguments = with_tensors(
                arguments,
                lambda name, t: (
                    _special(t, rng) if name not in self.table.unread and rng.random() < 0.5 else t
                ),
            )
        self.refusal = None
        if rng.random() < 0.2:
            self.refusal = rng.choice(list(refusals(self.table.op, arguments)))
            arguments = self.refusal.arguments()
        elif rng.random() < 0.5:
            arguments = _break(arguments, rng)
        self.cotangent = f"cotangent {index}/{draw}"
        self.gradients = rng.random() < 0.5 and not self.special
        self.arguments = arguments

    def __str__(self) -> str:
        return f"{self.table.op}({', '.join(f'{k}={_describe(v)}' for k, v in self.arguments.items())})"

    def compared(self, single: bool, moved: bool) -> Iterator[tuple[str, Comparison]]:
        """Yields (what, comparison) of the outputs and gradients; nothing if the op refuses the call.

        ``single``: float64 tensors are rounded to float32. ``moved``: the yardstick is not eager, but the definition in
        float64 of arguments that are moved by a rounding.
        """
        name, arguments = self.table.op, self.arguments
        if single:
            arguments = with_tensors(arguments, lambda _, t: t.float() if t.dtype is torch.float64 else t)
        arguments = with_tensors(arguments, lambda _, t: t.detach().requires_grad_(self.gradients))
        try:
            outputs = self.table.function(**arguments)
        except (TypeError, ValueError) as error:
            if not str(error).startswith(f"fastasr.{name}: "):
                raise Wrong(f"{type(error).__name__} that does not name the op: {error}") from error
            return
        except Exception as error:
            raise Wrong(f"{type(error).__name__}: {error}") from error
        draws = bool(arguments.get("training")) and bool(arguments.get("dropout_p"))
        if draws or any(t.device.type == "meta" for t in floating(arguments).values()):
            return
        same = with_tensors(arguments, lambda _, t: _moved(t) if moved else t.detach())
        same = with_tensors(same, lambda _, t: t.requires_grad_(self.gradients))
        wide = with_tensors(arguments, lambda _, t: t.detach().double().requires_grad_(self.gradients))
        try:
            eager, exact = self.table.definition(**same), self.table.definition(**wide)
        except Exception as error:
            what = f"accepted a call that its definition refuses: {type(error).__name__}: {error}"
            raise Wrong(what) from error
        if self.special:
            for ours, theirs in zip(_tuple(outputs), _tuple(exact), strict=True):
                wrong = _differs(ours, theirs)
                if wrong and not _as_good_as_eager(self.table.definition, arguments, outputs, eager, exact):
                    raise Wrong(wrong)
            return
        for i, results in enumerate(zip(*map(_tuple, (outputs, eager, exact)), strict=True)):
            yield from _comparison(f"output {i}", *results)
        out, eager, exact = flat(outputs), flat(eager), flat(exact)
        if not self.gradients or not out.numel():
            return
        cotangent = Make(out.dtype, seed=self.cotangent).normal(*out.shape)
        try:
            found = self._gradients(out, arguments, cotangent)
        except Exception as error:
            raise Wrong(f"backward: {type(error).__name__}: {error}") from error
        by_eager: dict[str, Any] = self._gradients(eager, same, cotangent)
        reference: dict[str, Any] = self._gradients(exact, wide, cotangent)
        nudged = with_tensors(wide, lambda _, t: _nudged(t.detach(), 1e-15).requires_grad_())
        near: dict[str, Any] = self._gradients(flat(self.table.definition(**nudged)), nudged, cotangent)
        for n, grad in found.items():
            if (grad is None) != (reference[n] is None):
                raise Wrong(f"gradient of {n} is {'missing' if grad is None else 'unexpected'}")
            # If float64's last digits decide, the gradient's terms cancel and none of its digits means anything.
            if grad is not None and not (near[n] - reference[n]).norm() > 1e-3 * reference[n].norm():
                yield from _comparison(f"gradient of {n}", grad, by_eager[n], reference[n])

    @staticmethod
    def _gradients(out: Tensor, arguments: dict, cotangent: Tensor) -> dict[str, Tensor | None]:
        leaves = floating(arguments)
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype), allow_unused=True)
        return dict(zip(leaves, grads, strict=True))


def _comparison(what: str, ours: Tensor, eager: Tensor, exact: Tensor) -> Iterator[tuple[str, Comparison]]:
    """Yields the comparison, except where eager overflowed: half's range may decide between finite and infinite."""
    if eager.dtype is torch.float16 and not eager.isfinite().all():
        return
    try:
        yield what, compare(ours, eager, exact)
    except AssertionError as error:
        raise Wrong(f"{what}: {error}") from error


def run_one(index: int, only: tuple[str, ...] = ()) -> tuple[str, str]:
    """Runs one call of any op, or of those in ``only``. Returns (what was called, what is wrong or "")."""
    call = Call(index, only)
    try:
        if call.refusal:
            refused(call.table, call.refusal, call.arguments)
            return str(call), ""
        # Eager may be exact where terms are equal, as those of expanded tensors, or where one is 0.
        for moved in (False, True):

            def compared(draw: int, single: bool, moved: bool = moved) -> Iterator[tuple[str, Comparison]]:
                return Call(index, only, draw).compared(single, moved)

            failed = judged(compared, 1)
            if not failed:
                break
        return str(call), "; ".join(f"{what}: {comparison}" for what, comparison in failed.items())
    except Wrong as wrong:
        return str(call), str(wrong)


def _differs(out: Tensor, reference: Tensor) -> str:
    """Returns "" if ``out`` equals the float64 ``reference`` up to rounding, with non-finite values in the same places,
    and the difference in words if not."""
    if out.shape != reference.shape:
        return f"shape {tuple(out.shape)}, expected {tuple(reference.shape)}"
    rounded = reference.to(out.dtype).double()
    if out.dtype is torch.float16 and not rounded.isfinite().all():
        return ""  # near the end of half's range, the last rounding may decide between finite and infinite
    finite = rounded.isfinite()
    if not torch.equal(finite, out.isfinite()):
        return "infinities or NaNs stand in other places"
    if not finite.any():
        return ""
    error, size = (out.double() - rounded)[finite].abs(), rounded[finite].abs()
    eps, arithmetic = (torch.finfo(t).eps for t in (out.dtype, torch.promote_types(out.dtype, torch.float32)))
    # One rounding of the output, and the error of kernels that compute in float32.
    limit = eps * size + 64 * arithmetic * size.amax().clamp(min=1)
    worst = (error / limit).argmax()
    return "" if (error <= limit).all() else f"error {error[worst]:.3e}, allowed {limit[worst]:.3e}"


def _as_good_as_eager(
    definition: Callable[..., Any], arguments: dict, outputs: Any, eager: Any, references: Any
) -> bool:
    """Says whether the definition in the call's own dtypes is about as far from float64 as the op. With a value of
    60000 among scores of 1, for example, no implementation is accurate.
    """
    near = definition(**with_tensors(arguments, lambda _, t: _nudged(t.detach().double(), 1e-7)))
    for ours, theirs, exact, moved in zip(*map(_tuple, (outputs, eager, references, near)), strict=True):
        # Where eager, or float64 of inputs moved by a rounding, disagrees with float64, rounding decides: an infinity
        # times a difference is NaN only if the difference is 0.
        decided = (exact.isfinite() == theirs.isfinite()) & (exact.isfinite() == moved.isfinite())
        if not torch.equal(exact.isfinite()[decided], ours.isfinite()[decided]):
            return False
        finite = exact.isfinite() & theirs.isfinite() & ours.isfinite()
        if finite.any():
            error, allowed = ((t.detach().double() - exact)[finite].abs().max() for t in (ours, theirs))
            size, eps = exact[finite].abs().max(), torch.finfo(ours.dtype).eps
            allowed = max(allowed, eps / 2 * size)  # eager's last rounding may be exact by chance
            if ours.dtype is torch.float64:
                # Eager's operations have another order at the scale of the extreme value, which may be a score.
                allowed = max(allowed, 64 * eps * _largest(arguments) * max(size, 1))
            if error > 2 * allowed:
                return False
    return True


def _moved(t: Tensor) -> Tensor:
    """Moves each element by about a rounding of the kernels' arithmetic, which is float64 or float32."""
    return _nudged(t.detach().double(), torch.finfo(torch.promote_types(t.dtype, torch.float32)).eps)


def _nudged(t: Tensor, by: float) -> Tensor:
    """Changes each element by about this part of it; zeros, infinities and NaNs stay the same."""
    return t * (1 + by * torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(0)))


def _largest(arguments: dict) -> float:
    """Returns the largest finite magnitude in the tensors."""
    finite = [t.detach().double()[t.isfinite()].abs() for t in floating(arguments).values()]
    return max([1.0, *(t.max().item() for t in finite if t.numel())])


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        where = "" if value.device.type == "cpu" else f" on {value.device.type}"
        strides = (
            "" if value.layout is not torch.strided or value.is_contiguous() else f" strides {value.stride()}"
        )
        return f"{kind}{tuple(value.shape)}{strides}{where}"
    return repr(value)[:60]


# --------------------------------------------------------------------------- processes
def _child(first: int, count: int, only: tuple[str, ...]) -> int:
    for index in range(first, first + count):
        print(f"@{index}", flush=True)  # if this process dies, the parent reports the last index that it saw
        label, wrong = run_one(index, only)
        if wrong:
            print(f"call {index}: {label}\n    {wrong}", flush=True)
    print("@end", flush=True)
    return 0


def fuzz(count: int, only: tuple[str, ...] = ()) -> int:
    """Runs ``count`` calls. Returns how many went wrong; a crash counts as one, and the other calls still run."""
    failures, first = 0, 0
    while first < count:
        command = [sys.executable, "-m", "fastasr.testing.fuzz", "--child"]
        command += ["--first", str(first), "-n", str(count - first), *(f"--op={name}" for name in only)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            last, ended = first, False
            for line in process.stdout or ():
                if line == "@end\n":
                    ended = True
                elif line.startswith("@"):
                    last = int(line[1:])
                else:
                    failures += line.startswith("call ")
                    print(line, end="", flush=True)
        if ended and process.returncode == 0:
            break
        failures += 1
        print(f"call {last}: the process died (exit status {process.returncode})")
        first = last + 1
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastasr.testing.fuzz", description=__doc__)
    parser.add_argument("-n", type=int, default=1000, help="number of calls")
    parser.add_argument("--seed", help="default: SEED in the environment, else drawn")
    parser.add_argument("--op", action="append", default=[], help="call this op alone; may be repeated")
    parser.add_argument("--only", type=int, help="run this one call, in this process")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    run = begin(options.seed)
    only = tuple(options.op)
    if options.child:
        return _child(options.first, options.n, only)
    if options.only is not None:
        label, wrong = run_one(options.only, only)
        print(f"{label}\n{wrong or 'right'}")
        return 1 if wrong else 0
    start = time.perf_counter()
    failures = fuzz(options.n, only)
    elapsed = time.perf_counter() - start
    print(f"fuzz: {options.n} calls, {failures} wrong, {run}, {elapsed:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
