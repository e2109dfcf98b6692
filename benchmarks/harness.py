# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every implementation takes its turn in every round, so a slow minute of the machine affects all
of them. Results are medians and quartiles over the rounds.

Each implementation allocates as it does in real use, page faults included: nothing is reused between calls
that the caller of the op would not reuse. Preparation (a forward before a timed backward) is not timed.
"""

import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Variant:
    """One implementation: ``run(prepare())`` is timed from the moment ``prepare`` has returned."""

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None

    def call(self) -> Any:
        return self.run() if self.prepare is None else self.run(self.prepare())


@dataclass
class Timing:
    """Seconds per call, one figure per round."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Returns lower and upper quartile; of a single sample, that sample twice."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return lower, upper

    @property
    def reps(self) -> int:
        return len(self.samples)


def synchronize(device: str = "cpu") -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _sample(variant: Variant, calls: int, device: str) -> float:
    """Returns mean seconds per call over ``calls`` calls."""
    if variant.prepare is None:
        run = variant.run
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - start) / calls
    total = 0.0
    for _ in range(calls):
        state = variant.prepare()
        synchronize(device)
        start = time.perf_counter()
        variant.run(state)
        synchronize(device)
        total += time.perf_counter() - start
    return total / calls


def interleave(
    variants: Mapping[str, Variant | Callable[[], Any]],
    *,
    reps: int = 15,
    warmup: int = 3,
    sample_seconds: float = 0.02,
    max_calls: int = 1000,
    seconds: float = math.inf,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Times ``variants`` in turn, ``reps`` rounds of one sample each, or three once they take more than ``seconds``.

    A sample is the mean of as many calls as fill ``sample_seconds`` (one at least, ``max_calls`` at most),
    so that the timer's own cost does not show. The order of the implementations rotates by one each round: none always
    runs after the same neighbour, whose data would be in the caches.
    """
    ready = {name: v if isinstance(v, Variant) else Variant(v) for name, v in variants.items()}
    calls = {}
    for name, variant in ready.items():
        for _ in range(max(warmup, 1)):
            variant.call()
        once = _sample(variant, 1, device)
        calls[name] = max(1, min(max_calls, int(sample_seconds / max(once, 1e-9))))
    timings = {name: Timing() for name in ready}
    names = list(ready)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    end = time.monotonic() + seconds
    try:
        for round_ in range(reps):
            if round_ >= 3 and time.monotonic() > end:
                break
            turn = round_ % len(names) if names else 0
            for name in names[turn:] + names[:turn]:
                timings[name].samples.append(_sample(ready[name], calls[name], device))
            if progress is not None:
                progress(round_ + 1, reps)
    finally:
        if collecting:
            gc.enable()
    return timings


# --- other load on the machine


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Returns (wall clock, busy CPU seconds of the machine, CPU seconds of this process), or None without /proc."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(v) for v in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    busy = sum(ticks) - ticks[3] - ticks[4]  # everything but idle and iowait
    own = os.times()
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own.user + own.system


class LoadMeter:
    """Counts the cores that other processes kept busy since ``start``."""

    def __init__(self):
        self._start = _cpu_seconds()

    def other_cores(self) -> float | None:
        now = _cpu_seconds()
        if self._start is None or now is None or now[0] <= self._start[0]:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, round((busy - own) / wall, 2))


IDLE = 0.15  # cores that other processes may use


def wait_until_idle(
    patience: float = 60.0, window: float = 0.5, report: Callable[[str], None] | None = None
) -> float | None:
    """Waits until other processes use less than ``IDLE`` cores over ``window`` seconds, for at most ``patience``
    seconds. Returns the last load seen, in cores (None where it cannot be read).
    """
    end = time.monotonic() + patience
    told = False
    while True:
        meter = LoadMeter()
        time.sleep(window)
        load = meter.other_cores()
        if load is None or load < IDLE:
            return load
        if time.monotonic() >= end:
            if report is not None:
                report(
                    f"other processes still use {load:.1f} cores: measuring all the same; such figures tell little"
                )
            return load
        if report is not None and not told:
            until = f"waiting up to {patience:.0f} s for idle ones (--patience 0: none)"
            report(f"other processes use {load:.1f} cores: {until}")
            told = True


# --- a process of its own


def in_fresh_process(
    module: str, *arguments: object, timeout: float | None = None, **environment: str
) -> Any:
    """Returns what the last line says, as JSON, that ``python -m module`` prints on as many threads as torch has here.
    Raises ``RuntimeError`` with the last line of its errors if it fails or takes longer than ``timeout`` seconds.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it takes more than {timeout:g} s") from None
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- peak memory


def _status_bytes(key: str) -> int | None:
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _reset_high_water_mark() -> bool:
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def limit_memory(more: int) -> None:
    """Lets this process take no more than ``more`` bytes beyond its present memory, if the system tells that: a larger
    allocation raises an error instead of stopping the machine."""
    held = _status_bytes("VmSize")
    if held is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (held + more, resource.RLIM_INFINITY))


def peak_bytes(variant: Variant | Callable[[], Any], device: str = "cpu", rounds: int = 2) -> int | None:
    """Returns the memory that one call needs beyond the memory held before it, the least of ``rounds`` calls.

    On the CPU it is the resident set's high-water mark (whole pages; blocks the allocator kept may hide small needs),
    on CUDA the caching allocator's peak. It is None where neither can be read.
    """
    variant = variant if isinstance(variant, Variant) else Variant(variant)
    found = []
    for _ in range(rounds):
        state = () if variant.prepare is None else (variant.prepare(),)
        gc.collect()
        if torch.device(device).type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            out = variant.run(*state)
            synchronize(device)
            found.append(torch.cuda.max_memory_allocated(device) - before)
        else:
            if not _reset_high_water_mark():
                return None
            before = _status_bytes("VmRSS")
            out = variant.run(*state)
            peak = _status_bytes("VmHWM")
            if before is None or peak is None:
                return None
            found.append(max(0, peak - before))
        del out, state
    return min(found)
