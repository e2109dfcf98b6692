# SPDX-License-Identifier: Apache-2.0
"""``python -m fastasr.benchmarks.studies.predict``: predicts the times of the GPU cases of the ops, in bfloat16.

    --op NAME ...     only these ops; rows of others stay
    --card NAME ...   only these GPUs; rows of others stay
    --torch-only      renews what torch takes in the rows that there are, and compiles nothing
    --verbose         prints the prediction of every kernel

No GPU is needed: a fake one records the launches, and Triton and nvcc compile the kernels ahead of time. Where nvcc is
missing, the rows of kernels in CUDA C++ stay as they are. Rows go to ``results/predicted.json``. They are predictions,
not measurements: docs/gpu-predictions.md says how far to trust them.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fastasr.benchmarks import ops, predictions
from fastasr.benchmarks.case import variant
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.studies.predict import cuda, model, torch_ops
from fastasr.benchmarks.studies.predict.cards import CARDS, Card
from fastasr.kernels import _launch, rnnt_joiner
from fastasr.ops._dispatch import gpu_backends
from fastasr.testing.fake_gpu import Launch, fake_gpu
from fastasr.testing.speed import BOTH, Case, Unavailable

DTYPE = torch.bfloat16
# A formula of more operations goes step by step, and torch.compile cannot fuse its steps.
RECURRENCE = 100


class _Forgetful(dict):
    """Makes every launch go through Triton, which is given tensors where a repeated launch gives addresses."""

    def __contains__(self, key) -> bool:
        return False


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Stands for the joiner's own, which takes tensors of the CPU for those of a CPU."""
    return torch.mm(a, b) if a.dtype is torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


@contextmanager
def _recording(op: str, capability: int, processors: int) -> Iterator[list[Launch] | list[cuda.Launch]]:
    """Makes the op run on a GPU that only records what is launched, inside the ``with`` block."""
    if gpu_backends()[op] == "cuda":
        with cuda.recording(op) as launches:
            yield launches
        return
    with (
        fake_gpu(capability=divmod(capability, 10), processors=processors) as gpu,
        mock.patch.object(_launch, "_compiled", _Forgetful()),
        mock.patch.object(rnnt_joiner, "_product", _product),
    ):
        yield gpu.launches


@lru_cache(maxsize=1)
def record(
    case: Case, phase: str, capability: int, processors: int
) -> tuple[list[Launch] | list[cuda.Launch], list[torch_ops.Operation]]:
    """Returns what a pass of the op launches on a GPU: our kernels, and torch's operations between them."""
    with _recording(case.op, capability, processors) as launches:
        with torch_ops.Recorder():  # which multiplies as _product asks
            made = variant(case.make("cpu", DTYPE)["fastasr"](), phase)
            state = () if made.prepare is None else (made.prepare(),)
        before = len(launches)
        with torch_ops.Recorder() as between:
            made.run(*state)
        return launches[before:], between.operations


@lru_cache(maxsize=1)
def formulas(case: Case, phase: str) -> dict[str, tuple[list[torch_ops.Operation], set[int]]]:
    """Returns the operations of the case's formulas in torch, and the storages of their results."""
    found = {}
    for name, build in case.make("cpu", DTYPE).items():
        if name in ("fastasr", "compile", "upstream", "FlexAttention"):
            continue
        try:
            implementation = build()
        except Unavailable:
            continue
        with FakeTensorMode(allow_non_fake_inputs=True):
            made = variant(implementation, phase)
            state = () if made.prepare is None else (made.prepare(),)
            with torch_ops.Recorder() as recorder:
                results = made.run(*state)
        kept = {torch_ops.storage_of(t) for t in tree_leaves(results) if isinstance(t, torch.Tensor)}
        found[name] = recorder.operations, kept
    return found


def in_torch(case: Case, phase: str, card: Card) -> dict:
    """Returns the columns of a row for torch: the best formula compiled, and the op's definition in eager."""
    found = formulas(case, phase)
    at_best = {
        name: torch_ops.compiled(operations, kept, card)
        for name, (operations, kept) in found.items()
        if len(operations) <= RECURRENCE
    }
    best = min(at_best, key=at_best.get, default=None)
    definition, _ = found["eager"]
    return {
        "torch_us": best and round(at_best[best], 1),
        "torch_best": best,
        "eager_us": round(sum(operation.microseconds(card, eager=True) for operation in definition), 1),
        "eager_launches": sum(operation.kernels for operation in definition),
    }


def row(case: Case, phase: str, card: Card, verbose: bool) -> dict:
    """Returns the row of a case. ``bound`` says what bounds the kernels, by their shares of the time."""
    launches, between = record(case, phase, card.capability, card.processors)
    total = sum(operation.microseconds(card) for operation in between)
    bounds = Counter({"torch": total})
    for launch in launches:
        one = model.predict(launch, card)
        total += one.microseconds
        bounds[one.bound] += one.microseconds
        if verbose:
            print(f"    {launch.name} {launch.grid}: {one}")
    cost = case.costs(DTYPE.itemsize)[phase]
    return {
        "kind": "prediction",
        "op": case.op,
        "case": case.name,
        "phase": phase,
        "dtype": "bfloat16",
        "device": card.name,
        "predicted_us": round(total, 1),
        "roof_us": round(max(cost.bytes / card.memory / 1e3, cost.flops / card.peak / 1e6), 1),
        "launches": len(launches) + len(between),
        "bound": bounds.most_common(1)[0][0],
        "commit": stamp("cpu")["commit"],
        "triton": triton.__version__,
    } | in_torch(case, phase, card)


KEY = "device", "op", "case", "phase"


def passes() -> list[tuple[Card, Case, str]]:
    """Returns what has a prediction: every pass of the GPU cases of the ops with GPU kernels, for every GPU."""
    backends = gpu_backends()
    return [
        (card, case, phase)
        for module in ops.MODULES
        for case in getattr(module, "ON_DEVICE", ())
        if case.op in backends
        for phase in case.passes
        if phase != BOTH or len(case.passes) == 2  # else it is the sum of the others
        for card in CARDS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="*")
    parser.add_argument("--card", nargs="*", choices=[card.name for card in CARDS])
    parser.add_argument("--torch-only", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    every = passes()
    places = {(card.name, case.op, case.name, phase): n for n, (card, case, phase) in enumerate(every)}
    known = {key: row for row in predictions.rows() if (key := tuple(row[name] for name in KEY)) in places}
    for card, case, phase in every:
        if case.op not in (options.op or [case.op]) or card.name not in (options.card or [card.name]):
            continue
        key = card.name, case.op, case.name, phase
        if options.torch_only:
            columns = in_torch(case, phase, card)
            made = {name: value for name, value in known[key].items() if name not in columns} | columns
        else:
            try:
                made = row(case, phase, card, options.verbose)
            except LookupError as error:
                print(f"# {case.op} {case.name} {phase}, {card.name}: no prediction: {error}", flush=True)
                continue
        print(" ".join(map(str, list(made.values())[1:])), flush=True)
        known[key] = made
        predictions.write([known[key] for key in sorted(known, key=places.get)])


if __name__ == "__main__":
    main()
