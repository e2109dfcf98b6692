# SPDX-License-Identifier: Apache-2.0
"""The machine that units run on: a GPU, or a dry run that stands for one."""

import contextlib
import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

import fastasr
import fastasr.kernels
from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.harness import Variant
from fastasr.ops import _dispatch
from fastasr.testing import samples
from fastasr.testing.speed import Case, Cost, Implementation, computed, costs_of
from fastasr.testing.table import Make, OpTable, Sample, flat, forward_and_backward, table
from fastasr.testing.tape import TapeRecorder
from fastasr.testing.tolerance import JUDGED_DRAWS

FLUSHED_BYTES = 2**30  # more than any L2 cache
MOST_JOBS = 8  # At most this many units share the device.
MEMORY_OF_A_UNIT = 13e9  # Each unit that shares the device has these bytes; a unit that needs more says so.


class Skipped(Exception):
    """Raised where something cannot run on this machine; the message says why."""


def kernels() -> dict[str, str]:
    """Returns op -> the backend of its GPU kernels. layer_norm_lstm, whose programs wait for each other, is last."""
    found = _dispatch.gpu_backends()
    return dict(sorted(found.items(), key=lambda item: (item[0] == "layer_norm_lstm", item[0])))


def _declared(op: str):
    """Returns the module of the op's samples."""
    return import_module(f"{samples.__name__}.{op}")


def to_watch(op: str) -> str:
    """Returns where to look first when an op is wrong or slow: ``WATCH`` beside its samples, or ""."""
    return getattr(_declared(op), "WATCH", "")


class GPU:
    """The current CUDA device."""

    device, dry = "cuda", False
    recorder: type | None = None  # of a model's calls; None: CUDA graphs
    more_draws = JUDGED_DRAWS[:2]  # A call at a shape of training gets these draws if the first one fails.

    def why_not(self) -> str:
        """Says why nothing can run here, or returns ""."""
        if not torch.cuda.is_available():
            built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
            return f"no GPU: torch {torch.__version__}, built for {built}, sees no CUDA device"
        return _dispatch._why_not_triton_on() or _dispatch._why_no_triton()

    def facts(self) -> dict:
        """Returns the facts that results depend on: versions, the device, the native library."""
        properties = torch.cuda.get_device_properties(0)
        smi = shutil.which("nvidia-smi")
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return _versions("cuda") | {
            "driver": subprocess.run(query, capture_output=True, text=True).stdout.strip() if smi else None,
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "devices": torch.cuda.device_count(),
        }

    def jobs(self, cores: int) -> int:
        """Returns how many units may share the device while nothing is timed: compiling takes most of their time."""
        memory = torch.cuda.get_device_properties(0).total_memory
        return max(1, min(MOST_JOBS, cores // 2, int(memory // MEMORY_OF_A_UNIT)))

    def stand_in(self) -> dict:
        """Returns the settings of a fake GPU for which Triton compiles the same code as for this device."""
        properties = torch.cuda.get_device_properties(0)
        return {
            "capability": (properties.major, properties.minor),
            "processors": properties.multi_processor_count,
        }

    @contextlib.contextmanager
    def serving(self, op: str) -> Iterator[None]:
        """Makes the op's GPU kernels serve it or raise an error. Raises ``Skipped`` where this installation has
        none."""
        backend = kernels()[op]
        for row in _dispatch.table():
            if (row["op"], row["backend"]) == (op, backend) and not row["available"]:
                raise Skipped(row["reason"])
        with fastasr.backend(backend):
            yield

    def samples(self, table: OpTable) -> tuple[Sample, ...]:
        """Returns the small calls that an op is checked on."""
        return table.thorough

    def cases(self, op: str) -> tuple[Case, ...]:
        """Returns the op's calls at sizes of training; the first is the one that is checked and timed first."""
        return _declared(op).ON_DEVICE

    def synchronize(self, device: str | None = None) -> None:
        torch.cuda.synchronize(device)

    def captured(self, step: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable]:
        """Captures ``step`` in a CUDA graph. Returns the tensors that a replay writes, and a function that replays."""
        self.on_another_stream(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tensors = step()
        return tensors, graph.replay

    def on_another_stream(self, step: Callable):
        """Returns the result of ``step`` on a stream of its own, which is still busy when ``step`` begins."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # about 10 ms
            made = step()
        torch.cuda.current_stream().wait_stream(stream)
        stream.synchronize()
        return made

    def second_device(self) -> str:
        if torch.cuda.device_count() < 2:
            raise Skipped("there is one device")
        return "cuda:1"

    def milliseconds(self, variant: Variant, warmup: int, calls: int) -> tuple[list[float], list[float]]:
        """Returns the times of calls on the device and on the host, where a call returns before the device is done.

        Caches are cold, as in training where other layers ran in between: a buffer larger than the L2 cache is
        overwritten before each call. Then the device sleeps while the host queues the call, so the events around
        the call measure the device and not Python.
        """
        flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=self.device)
        device, host = [], [1.0]
        for _ in range(warmup + calls):
            state = () if variant.prepare is None else (variant.prepare(),)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            flushed.zero_()
            torch.cuda._sleep(int(4e6 * min(host[-1], 50.0)))  # cycles: at 2 GHz, twice the last call's time
            begin = time.perf_counter()
            start.record()
            variant.run(*state)
            end.record()
            host.append((time.perf_counter() - begin) * 1e3)
            torch.cuda.synchronize()
            device.append(start.elapsed_time(end))
        return device[warmup:], host[1 + warmup :]

    def busy_milliseconds(self, run: Callable) -> float | None:
        """Returns the time of all kernels of a call, or None where the profiler does not see them."""
        return sum(milliseconds for _, _, milliseconds in self.kernels_by_time(run)) or None

    def kernels_by_time(self, run: Callable) -> list[tuple[str, int, float]]:
        """Returns (kernel, launches, milliseconds) of a call, the longest first."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        found = [(e.key[:120], e.count, e.self_device_time_total / 1e3) for e in profile.key_averages()]
        return sorted((f for f in found if f[2]), key=lambda f: -f[2])


class DryRun(GPU):
    """The whole program without a GPU: a fake driver takes the launches of each op, and CPU kernels compute the
    compared values on small tensors. Everything takes 1 ms.
    """

    device, dry = "cpu", True
    recorder = TapeRecorder
    more_draws = JUDGED_DRAWS

    def why_not(self) -> str:
        return _dispatch._why_no_triton()

    def facts(self) -> dict:
        return _versions("cpu") | {"devices": 1}

    def jobs(self, cores: int) -> int:
        return cores

    def stand_in(self) -> dict:
        return {"capability": (9, 0)}

    @contextlib.contextmanager
    def serving(self, op: str) -> Iterator[None]:
        if kernels()[op] == "triton":
            from fastasr.testing.fake_gpu import fake_gpu

            with fake_gpu() as gpu:
                forward_and_backward(table(op), table(op).richest, torch.bfloat16)
            assert gpu.launches, "no kernel was launched"
        yield

    def samples(self, table: OpTable) -> tuple[Sample, ...]:
        return (replace(table.richest, draws=1),)

    def cases(self, op: str) -> tuple[Case, ...]:
        own, cost = table(op), Cost(1024)

        def made(function: Callable, device: str, dtype: torch.dtype) -> Implementation:
            return computed(function, arguments(Make(dtype, device)), result=lambda _, y: flat(y))

        def make(*to) -> dict[str, Callable[[], Implementation]]:
            both = {"eager": own.definition, "fastasr": own.function}
            return {name: partial(made, function, *to) for name, function in both.items()}

        arguments = own.richest.arguments
        small = {"arguments": arguments, "make": make, "costs": lambda _: costs_of(cost, cost)}
        return tuple(replace(case, **small) for case in super().cases(op))

    def synchronize(self, device: str | None = None) -> None:
        pass

    def captured(self, step: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable]:
        tensors = step()

        def replay() -> None:
            for t, again in zip(tensors, step(), strict=True):
                t.copy_(again)

        return tensors, replay

    def on_another_stream(self, step: Callable):
        return step()

    def second_device(self) -> str:
        return "cpu"

    def milliseconds(self, variant: Variant, warmup: int, calls: int) -> tuple[list[float], list[float]]:
        variant.call()
        return [1.0], [1.0]

    def kernels_by_time(self, run: Callable) -> list[tuple[str, int, float]]:
        run()
        return []


def _versions(device: str) -> dict:
    """Returns the environment of a row. Without a checkout the commit is the version and a hash of the package."""
    found = stamp(device)
    if found["commit"].startswith("v"):
        digest, folders = hashlib.sha1(), (Path(p.__path__[0]) for p in (fastasr, fastasr.kernels))
        for file in sorted(f for folder in folders for f in folder.rglob("*") if f.suffix in (".py", ".so")):
            digest.update(file.read_bytes())
        found["commit"] += f"-{digest.hexdigest()[:8]}"
    return found | {"native": _dispatch.native_build_info() or _dispatch.why_not_native()}
