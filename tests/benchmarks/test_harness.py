# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: order, statistics, preparation, load, memory, limits."""

import gc
import time

import pytest
import torch

from fastasr.benchmarks import harness, limits
from fastasr.benchmarks.harness import LoadMeter, Timing, Variant, interleave
from fastasr.benchmarks.models import unit


def test_median_and_quartiles():
    timing = Timing([5.0, 1.0, 4.0, 2.0, 3.0])
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert timing.reps == 5
    assert Timing([7.0]).quartiles == (7.0, 7.0)


def test_implementations_take_turns():
    calls = []
    variants = {name: (lambda n=name: calls.append(n)) for name in "abc"}
    interleave(variants, reps=3, warmup=1, max_calls=1)
    rounds = calls[6:]  # a warm-up and a probe each
    assert [sorted(rounds[i : i + 3]) for i in (0, 3, 6)] == [["a", "b", "c"]] * 3
    assert [rounds[i] for i in (0, 3, 6)] == ["a", "b", "c"], "each begins a round once"


def test_a_slower_call_is_measured_slower():
    timings = interleave(
        {"fast": lambda: None, "slow": lambda: time.sleep(0.004)}, reps=3, sample_seconds=0.001
    )
    assert timings["slow"].median >= 0.004 > timings["fast"].median


def test_preparation_is_not_timed():
    variant = Variant(run=lambda state: state, prepare=lambda: time.sleep(0.01))
    assert interleave({"v": variant}, reps=2, warmup=1, sample_seconds=0.0)["v"].median < 0.005


def test_garbage_collection_rests_while_timing_and_comes_back():
    seen = []

    def run():
        seen.append(gc.isenabled())
        if len(seen) == 4:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        interleave({"v": run}, reps=5, warmup=1, sample_seconds=0.0)
    assert seen[-1] is False
    assert gc.isenabled()


def test_no_variants():
    assert interleave({}, reps=2) == {}


def test_load_of_other_processes(monkeypatch):
    """Over two seconds all cores were busy for 3.5 seconds, of which this process took 1.5."""
    counts = iter([(10.0, 100.0, 7.0), (12.0, 103.5, 8.5)])
    monkeypatch.setattr(harness, "_cpu_seconds", lambda: next(counts))
    assert LoadMeter().other_cores() == 1.0


@pytest.mark.parametrize("counts", [(None, None), ((1.0, 2.0, 1.0), (1.0, 2.0, 1.0))])
def test_load_that_cannot_be_read(monkeypatch, counts):
    remaining = iter(counts)
    monkeypatch.setattr(harness, "_cpu_seconds", lambda: next(remaining))
    assert LoadMeter().other_cores() is None


def test_waiting_for_idle_cores_ends(monkeypatch):
    monkeypatch.setattr(LoadMeter, "other_cores", lambda self: 3.0)
    said = []
    assert harness.wait_until_idle(patience=0.05, window=0.01, report=said.append) == 3.0
    assert "waiting" in said[0]
    assert "all the same" in said[-1]
    monkeypatch.setattr(LoadMeter, "other_cores", lambda self: 0.0)
    assert harness.wait_until_idle(window=0.01, report=said.append) == 0.0


def test_peak_memory_sees_an_allocation():
    size = 64 * 2**20
    found = harness.peak_bytes(lambda: torch.ones(size // 4))
    if found is None:
        pytest.skip("the high-water mark cannot be reset here")
    assert 0.9 * size < found < 1.5 * size


def test_products_in_turns(monkeypatch):
    """The machine is four times as slow in the second round: the share is the same."""
    rounds = {"model": harness.Timing([1.0, 4.0]), "": harness.Timing([2.0, 8.0])}
    monkeypatch.setattr(unit, "interleave", lambda variants, **how: dict(rounds))
    monkeypatch.setattr(limits, "large_product", lambda: (lambda: None, 100, 0.1))
    timings, shares, rate = unit.timed_with_products({"model": harness.Variant(print)}, 100, calls=4, reps=2)
    assert timings == {"model": rounds["model"]}
    assert shares == {"model": 0.5}
    assert rate.startswith("GEMM ")


def test_limits_are_measured_once():
    assert limits.copy_seconds(4096, reps=2) == limits.copy_seconds(4096, reps=2) > 0
    source, destination = limits.copy_buffers(4096)
    assert source.nbytes + destination.nbytes == 4096
    assert limits.read_bytes_per_second(1 << 20, reps=2) == limits.read_bytes_per_second(1 << 20, reps=2) > 0
