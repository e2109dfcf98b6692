# SPDX-License-Identifier: Apache-2.0
"""The units of a verdict, in the order of a run: first correctness, then speed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from fastasr.benchmarks.device import whole_models
from fastasr.benchmarks.device.checks import check_op, reported
from fastasr.benchmarks.device.compilation import PARTS, compile_kernels
from fastasr.benchmarks.device.machine import GPU, Skipped, kernels
from fastasr.benchmarks.device.timing import MODELS, compile_model, compile_op, time_model, time_op

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 3  # the exit code of compute-sanitizer when it found an error


@dataclass(frozen=True)
class Unit:
    """One process of a run: ``function(tell, machine, *arguments)`` within ``limit`` seconds.

    ``kind`` and ``name`` tell units apart; ``op`` is the op or model that it is about, if it is about one. Units of one
    stage may run at a time if they share the "device", or only the "cores" because they do not use the device.
    """

    stage: str
    kind: str
    name: str
    function: Callable
    arguments: tuple
    limit: float
    op: str = ""
    shares: str = ""

    @property
    def key(self) -> str:
        return f"{self.stage} {self.kind}: {self.name}"


def units(machine: GPU, compiled: bool = False, ways: tuple[str, ...] = ()) -> Iterator[Unit]:
    """Yields the units of all stages: A, correctness; B, speed in bfloat16; M, whole models; C, float32,
    sanitizers, tests. compiled: sweeps have ``torch.compile`` too. ways: whole models run in these ways alone.
    """
    ops = list(kernels())
    for op in (op for op, backend in kernels().items() if backend == "triton"):
        for part in range(PARTS):
            name = f"{op} {part + 1}/{PARTS}"
            yield Unit("A", "compile", name, compile_kernels, (op, part), 120, op, "cores")
    for op in ops:
        alone = op == "layer_norm_lstm"  # its programs wait for each other
        yield Unit("A", "check", op, check_op, (op,), 120, op, "" if alone else "device")
    bfloat16, float32 = torch.bfloat16, torch.float32

    def timed(stage: str, op: str, index: int, dtype: torch.dtype, ahead: bool = False) -> Unit:
        name = f"{op} {machine.cases(op)[index].name} {str(dtype).removeprefix('torch.')}"
        kind, function, shares = ("compile", compile_op, "device") if ahead else ("time", time_op, "")
        return Unit(stage, kind, name, function, (op, index, dtype), 240, op, shares)

    for model in (model for model, (_, compiles) in MODELS.items() if compiles):
        yield Unit("B", "compile", model, compile_model, (model,), 300, model, "device")
    yield from (timed("B", op, 0, bfloat16, ahead=True) for op in ops)
    yield from (Unit("B", "time", model, time_model, (model,), 300, model) for model in MODELS)
    yield from (timed("B", op, 0, bfloat16) for op in ops)
    for kind, function, limit in (
        ("whole model", whole_models.time_whole, 600),
        ("profile", whole_models.profile, 300),
    ):
        for name, workload in product(whole_models.MODELS, whole_models.WORKLOADS):
            arguments, of = (name, workload, ways), f"{name} {workload.case}"
            yield Unit("M", kind, of, function, arguments, limit, name)
    for name in whole_models.MODELS:
        for seconds, of in ((30, ""), (None, ", LibriSpeech-like")):
            arguments = (name, seconds, ("compile",) if compiled and seconds else (), ways)
            yield Unit("M", "sweep", f"{name} over the batch{of}", whole_models.sweep, arguments, 600, name)
    yield from (timed("C", op, 0, float32) for op in ops)
    for tool in SANITIZERS:
        yield from (Unit("C", tool, op, sanitize, (tool, op), 300, op, "device") for op in ops)
    for name in folders_of_tests():
        yield Unit("C", "tests", name, run_tests, (f"tests/{name}", "-m", "gpu"), 540)
    for op in ops:
        arguments = ("tests/ops/test_contract.py", "-k", f"cuda and {op}")
        yield Unit("C", "tests", f"contract of {op}", run_tests, arguments, 540, op)
    for op in ops:
        yield from (timed("C", op, i, bfloat16) for i in range(1, len(machine.cases(op))))


def folders_of_tests() -> list[str]:
    """Returns the folders of the checkout's tests that need a GPU; the ops' contract has one unit per op instead."""
    files = (ROOT / "tests").rglob("test_*.py")
    return sorted({f.relative_to(ROOT / "tests").parts[0] for f in files if "mark.gpu" in f.read_text()})


def _last_line(done: subprocess.CompletedProcess) -> str:
    print(done.stdout)
    return (done.stdout.strip().splitlines() or ["no output"])[-1]


def sanitize(tell: Callable, machine: GPU, tool: str, op: str) -> None:
    """Launches every kernel of an op under a tool of compute-sanitizer, on samples with tails of every kind."""

    def check() -> None:
        if machine.dry:
            raise Skipped("a dry run launches nothing on a GPU")
        homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
        folders = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
        program = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
        if program is None:
            raise Skipped("compute-sanitizer is not installed")
        with machine.serving(op):
            pass  # raises where this installation has no such kernel
        call = (
            "import torch; from fastasr.benchmarks.device.checks import launch; "
            f"launch({op!r}); torch.cuda.synchronize()"
        )
        # Without torch's caching allocator each tensor's end is the end of an allocation.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FASTASR_BACKEND": kernels()[op]}
        done = subprocess.run(
            [program, f"--tool={tool}", f"--error-exitcode={FOUND}", sys.executable, "-c", call],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
        last = _last_line(done)
        assert done.returncode != FOUND, f"{last}\n{done.stdout[:1500]}"
        if done.returncode:
            raise Skipped(f"it did not run to its end (exit code {done.returncode}): {last}")

    reported(tell, tool, check)


def run_tests(tell: Callable, machine: GPU, *arguments: str) -> None:
    """Runs tests of the checkout that need a GPU."""

    def check() -> None:
        if machine.dry:
            raise Skipped("a dry run has no GPU")
        if not (ROOT / "tests").is_dir():
            raise Skipped("the tests are in a clone of the repository, not in the installed package")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        last = _last_line(done)
        if done.returncode == 5:
            raise Skipped(f"no test was found: {last}")
        assert not done.returncode, f"{last}\n{done.stdout[-1500:]}"

    reported(tell, "tests", check)
