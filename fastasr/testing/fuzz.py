# SPDX-License-Identifier: Apache-2.0
"""Random valid and invalid calls at every public op: an error of the right type or the right answer, never a crash.

``python -m fastasr.testing.fuzz -n 2000 --seed 7``. A call depends on (seed, index) alone; the calls run in a child
process, so a crash is reported with the call that caused it: ``--only INDEX`` runs that one again.
"""

import argparse
import math
import random
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fastasr import ops
from fastasr.testing.refusals import Refusal, refusals
from fastasr.testing.table import Make, flat, floating, tables, with_tensors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ELEMENTS = 50_000
_SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 65, 129)


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

    def choice(self, options):
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
        wrong = rng.choice((None, -7, 99, 1.5, "x", [], (), True, float("nan"), torch.zeros(2)))
        return arguments | {name: wrong}
    options = (
        lambda: None,
        lambda: value.tolist(),
        lambda: 3,
        lambda: "tensor",
        lambda: value.int(),
        lambda: value.to(rng.choice(_DTYPES)),
        lambda: value.cfloat(),
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
def _agrees(out: Tensor, reference: Tensor, magnitude: float) -> str:
    """Returns "" if ``out`` equals the float64 ``reference`` up to rounding, with non-finite values in the same places,
    else what differs."""
    if out.shape != reference.shape:
        return f"shape {tuple(out.shape)}, expected {tuple(reference.shape)}"
    if out.device.type == "meta":
        return ""
    rounded = reference.to(out.dtype).double()
    if out.dtype is torch.float16 and not rounded.isfinite().all():
        return ""  # near the end of half's range, the last rounding may decide between finite and infinite
    finite = rounded.isfinite()
    if not torch.equal(finite, out.isfinite()):
        return "infinities or NaNs stand in other places"
    if not finite.any():
        return ""
    error = (out.double() - rounded)[finite].abs().max().item()
    size = max(magnitude, rounded[finite].abs().max().item())
    limit = 64 * torch.finfo(out.dtype).eps * size
    return "" if error <= limit else f"error {error:.3e}, allowed {limit:.3e}"


def run_one(seed: int, index: int, only: tuple[str, ...] = ()) -> tuple[str, str]:
    """Runs one call of any op, or of those in ``only``. Returns (what was called, what is wrong or "")."""
    rng = random.Random(f"{seed}/{index}")
    name = rng.choice(only or list(tables()))
    table = tables()[name]
    dtype = rng.choice(_DTYPES)
    arguments = table.random(Make(dtype, seed=rng.randrange(1 << 30)), Shape(rng))
    arguments = with_tensors(arguments, lambda _, t: _relayout(t, rng))
    special = rng.random() < 0.2
    if special:
        arguments = with_tensors(
            arguments,
            lambda name, t: _special(t, rng) if name not in table.unread and rng.random() < 0.5 else t,
        )
    if rng.random() < 0.2:
        refusal = rng.choice(list(refusals(ops.OPS[name], arguments)))
        return _judge_refusal(table, refusal)
    if rng.random() < 0.5:
        arguments = _break(arguments, rng)
    gradients = rng.random() < 0.5 and not special
    label = f"{name}({', '.join(f'{k}={_describe(v)}' for k, v in arguments.items())})"
    draws = bool(arguments.get("training")) and bool(arguments.get("dropout_p"))
    if gradients:
        arguments = with_tensors(arguments, lambda _, t: t.detach().requires_grad_() if t.is_leaf else t)
    try:
        outputs = table.function(**arguments)
    except (TypeError, ValueError) as error:
        ok = str(error).startswith(f"fastasr.{name}: ")
        return label, "" if ok else f"{type(error).__name__} that does not name the op: {error}"
    except Exception as error:
        return label, f"{type(error).__name__}: {error}"
    if draws or any(t.device.type == "meta" for t in floating(arguments).values()):
        return label, ""
    wide = with_tensors(arguments, lambda _, t: t.detach().double().requires_grad_(t.requires_grad))
    try:
        references = table.definition(**wide)
    except Exception as error:
        return label, f"accepted a call that its definition refuses: {type(error).__name__}: {error}"
    for ours, theirs in zip(_tuple(outputs), _tuple(references), strict=True):
        wrong = _agrees(ours.detach(), theirs.detach(), 1.0)
        if wrong and not (special and _as_good_as_eager(table.definition, arguments, outputs, references)):
            return label, wrong
    out, reference = flat(outputs), flat(references)
    if not gradients or special or not out.numel():
        return label, ""
    names = [n for n, t in floating(arguments).items() if t.requires_grad]
    try:
        ours = torch.autograd.grad(out.sum(), [arguments[n] for n in names], allow_unused=True)
    except Exception as error:
        return label, f"backward: {type(error).__name__}: {error}"
    expected = torch.autograd.grad(reference.sum(), [wide[n] for n in names], allow_unused=True)
    for n, a, e in zip(names, ours, expected, strict=True):
        if (a is None) != (e is None):
            return label, f"gradient of {n} is {'missing' if a is None else 'unexpected'}"
        # The terms of a gradient may cancel, so rounding is judged relative to the terms.
        rows = max(1, out.numel() // max(1, e.numel())) if e is not None else 1
        wrong = a is not None and _agrees(a, e, float(rows) ** 0.5 * _scale_of(arguments))
        if wrong:
            return label, f"gradient of {n}: {wrong}"
    return label, ""


def _judge_refusal(table, refusal: Refusal) -> tuple[str, str]:
    arguments = refusal.arguments()
    label = f"{table.op}({', '.join(f'{k}={_describe(v)}' for k, v in arguments.items())})"
    try:
        table.function(**arguments)
    except refusal.error as error:
        ok = str(error).startswith(f"fastasr.{table.op}: {refusal.blamed}: ")
        return label, "" if ok else f"{refusal.name}: the message does not say so: {error}"
    except Exception as error:
        return label, f"{refusal.name}: {type(error).__name__}: {error}"
    return label, f"{refusal.name}: nothing was raised"


def _as_good_as_eager(definition, arguments: dict, outputs, references) -> bool:
    """Whether the definition in the call's own dtypes is about as far from float64 as the op. With a value of 60000
    among scores of 1, for example, no implementation is accurate."""
    eager = definition(**with_tensors(arguments, lambda _, t: t.detach()))
    near = definition(**with_tensors(arguments, lambda _, t: _nudged(t.detach().double())))
    for ours, theirs, exact, moved in zip(*map(_tuple, (outputs, eager, references, near)), strict=True):
        # Where eager, or float64 of inputs moved by a rounding, disagrees with float64, rounding decides: an infinity
        # times a difference is NaN only if the difference is 0.
        decided = (exact.isfinite() == theirs.isfinite()) & (exact.isfinite() == moved.isfinite())
        if not torch.equal(exact.isfinite()[decided], ours.isfinite()[decided]):
            return False
        finite = exact.isfinite() & theirs.isfinite() & ours.isfinite()
        if finite.any():
            error, allowed = ((t.detach().double() - exact)[finite].abs().max() for t in (ours, theirs))
            if (
                ours.dtype is torch.float64
            ):  # eager is the oracle here, and its operations have another order at the scale of the extreme value
                allowed = 64 * torch.finfo(torch.float64).eps * _largest(arguments)
            if error > 2 * allowed:
                return False
    return True


def _nudged(t: Tensor) -> Tensor:
    """Changes each element by about a rounding error of float32; zeros, infinities and NaNs stay the same."""
    return t * (1 + 1e-7 * torch.randn(t.shape, dtype=t.dtype, generator=torch.Generator().manual_seed(0)))


def _largest(arguments: dict) -> float:
    """Returns the largest finite magnitude in the tensors."""
    finite = [t.detach().double()[t.isfinite()].abs() for t in floating(arguments).values()]
    return max([1.0, *(t.max().item() for t in finite if t.numel())])


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _scale_of(arguments: dict) -> float:
    sizes = [t.detach().double().abs().max().item() for t in floating(arguments).values() if t.numel()]
    return max([1.0, *sizes]) ** 2


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
def _child(seed: int, first: int, count: int, only: tuple[str, ...]) -> int:
    for index in range(first, first + count):
        print(f"@{index}", flush=True)  # if this process dies, the parent reports the last index that it saw
        label, wrong = run_one(seed, index, only)
        if wrong:
            print(f"call {index}: {label}\n    {wrong}", flush=True)
    print("@end", flush=True)
    return 0


def fuzz(count: int, seed: int, only: tuple[str, ...] = ()) -> int:
    """Runs ``count`` calls. Returns how many went wrong; a crash counts as one, and the other calls still run."""
    failures, first = 0, 0
    while first < count:
        command = [sys.executable, "-m", "fastasr.testing.fuzz", "--child", "--seed", str(seed)]
        command += ["--first", str(first), "-n", str(count - first), *(f"--op={name}" for name in only)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            last, ended = first, False
            for line in process.stdout:
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
        print(
            f"call {last}: the process died (exit status {process.returncode}); again: --seed {seed} --only {last}"
        )
        first = last + 1
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastasr.testing.fuzz", description=__doc__)
    parser.add_argument("-n", type=int, default=1000, help="number of calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", action="append", default=[], help="call this op alone; may be repeated")
    parser.add_argument("--only", type=int, help="run this one call, in this process")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    only = tuple(options.op)
    if options.child:
        return _child(options.seed, options.first, options.n, only)
    if options.only is not None:
        label, wrong = run_one(options.seed, options.only, only)
        print(f"{label}\n{wrong or 'right'}")
        return 1 if wrong else 0
    start = time.perf_counter()
    failures = fuzz(options.n, options.seed, only)
    elapsed = time.perf_counter() - start
    print(f"fuzz: {options.n} calls, {failures} wrong, seed {options.seed}, {elapsed:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
