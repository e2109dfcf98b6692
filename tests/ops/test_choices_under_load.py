# SPDX-License-Identifier: Apache-2.0
"""The choice of a product beside other processes: on a machine of which a test sets the clock, and on this one."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastasr import ops, processor
from fastasr.ops import _conv1d, _conv2d, _gemm

pytestmark = pytest.mark.skipif(bool(_gemm.why_not()), reason=_gemm.why_not())
LOAD = Path("/proc/loadavg")
DAY_S = 86400
IDLE = {"torch": 1e-3, "native": 1.27e-3}  # seconds; torch's product is the faster one
LOADED = {"torch": 2.6e-3, "native": 1.3e-3}


class Machine:
    """The clocks, which only the products move, and the load. ``cost(product, call)`` returns seconds."""

    def __init__(self, facts):
        self._facts = facts
        self.now, self.worked, self.calls = 0.0, 0.0, []
        self.idle()

    def idle(self, cost=IDLE):
        self.waits, self.cost = 0.0, lambda product, call: cost[product]
        self.others(0)

    def others(self, count):
        self._facts.write_text(f"9.00 9.00 9.00 {2 + count}/999 1\n")

    def perf_counter(self):
        return self.now

    def thread_time(self):
        return self.worked

    def time(self):
        return 1.8e9 + self.now

    def product(self, name):
        def run(x, w, b):
            seconds = self.cost(name, len(self.calls))
            self.calls.append(name)
            self.now += seconds
            self.worked += seconds * (1 - self.waits)
            return F.linear(x, w, b)

        return run

    def next_process(self, after=DAY_S):
        self.now += after
        self.calls.clear()
        _gemm.forget()

    def measured(self):
        """Says whether the last calls measured, and forgets them."""
        found = len(self.calls) > 2
        self.calls.clear()
        return found


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Two threads on a machine of two cores, and no choices."""
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTASR_GEMM", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    torch.set_num_threads(2)
    found = Machine(tmp_path / "loadavg")
    monkeypatch.setattr(processor, "crowd", partial(processor.crowd, facts=tmp_path / "loadavg"))
    for module in (_gemm, processor):
        monkeypatch.setattr(module, "time", found)
    for name in ("torch", "native"):
        monkeypatch.setitem(_gemm._PRODUCTS[name], "forward", found.product(name))
    _gemm.forget()
    yield found
    _gemm.forget()


def call(rows=64, op=_gemm.forward):
    return op(torch.ones(rows, 64), torch.ones(64, 64), None)


def entries():
    return [*json.loads(_gemm.cache_file().read_text()).values()]


def crowded(machine):
    machine.others(1)


def waiting(machine):
    machine.waits = 0.2


def uneven(machine):
    cost = machine.cost
    machine.cost = lambda product, call: cost(product, call) * (1 if call % 8 < 2 else 3)


SIGNS = [crowded, waiting, uneven]


@pytest.mark.parametrize("op", [_gemm.forward, ops.linear])
@pytest.mark.parametrize("sign", SIGNS)
def test_a_choice_made_under_load_is_made_again(machine, sign, op):
    machine.idle(LOADED)
    sign(machine)
    call(op=op)
    assert machine.measured()
    (entry,) = entries()
    assert entry["under_load"]
    assert entry["product"] == "native"
    call(op=op)
    assert not machine.measured(), "it holds in this process"
    machine.idle()
    machine.next_process()
    call(op=op)
    assert machine.measured()
    (entry,) = entries()
    assert entry == {"product": "torch", "under_load": False, "times": 2, "at": pytest.approx(machine.time())}
    for _ in range(2):  # for good
        machine.next_process()
        call(op=op)
        assert not machine.measured()


def test_a_choice_of_an_idle_machine_stays(machine):
    call()
    (entry,) = entries()
    assert (entry["product"], entry["under_load"], entry["times"]) == ("torch", False, 1)
    machine.idle(LOADED)
    machine.others(5)
    machine.next_process()
    call()
    assert not machine.measured()
    assert entries() == [entry]


def test_while_others_run_nothing_is_measured_again(machine):
    machine.others(1)
    call()
    (entry,) = entries()
    machine.next_process()
    machine.calls.clear()
    call()
    assert not machine.measured()
    assert entries() == [entry]


def test_measuring_again_takes_twice_as_long_to_come_each_time(machine):
    """The load shows only in the clocks, as in a sandbox: what was under load again waits twice as long."""
    waiting(machine)
    call()
    for times in range(1, 20):
        wait = 60 * 2 ** min(times - 1, 11)
        machine.next_process(wait - 1)
        call()
        assert not machine.measured()
        machine.next_process(1)
        call()
        assert machine.measured()
        assert entries()[0]["times"] == times + 1


@pytest.mark.parametrize("busy", [False, True])
def test_a_process_measures_again_for_half_a_second(machine, busy):
    """And no more once the machine proves to be busy."""
    classes = [2**i for i in range(5, 13)]
    machine.idle({"torch": 20e-3, "native": 24e-3})
    waiting(machine)
    for rows in classes:
        call(rows)
    counts, machine.waits = [], 0.2 * busy
    for _ in range(3):
        machine.next_process()
        counts.append(0)
        for rows in classes:
            call(rows)
            counts[-1] += machine.measured()
    assert counts == ([1] * 3 if busy else [4, 4, 0])
    assert _gemm.kept() == (len(classes), len(classes) * busy)


@pytest.mark.parametrize("drift", [0.97, 1.03])
@pytest.mark.parametrize("ratio", [1.0, 0.8])
def test_a_clock_that_changes_serves_neither_product(machine, drift, ratio):
    """Each call takes a little less, or more, time than the one before."""
    cost = {"torch": 1e-3, "native": 1e-3 * ratio}
    machine.cost = lambda product, call: cost[product] * drift**call
    call()
    assert entries()[0]["product"] == ("torch" if ratio == 1 else "native")


@pytest.mark.parametrize("sign", [None, *SIGNS])
@pytest.mark.parametrize(
    ("seconds", "idle", "loaded"),
    [(0.98e-3, "torch", "torch"), (0.95e-3, "native", "torch"), (0.85e-3, "native", "native")],
)
def test_under_load_the_margin_is_wider(machine, sign, seconds, idle, loaded):
    machine.idle({"torch": 1e-3, "native": seconds})
    if sign is not None:
        sign(machine)
    call()
    assert entries()[0]["product"] == (idle if sign is None else loaded)


def test_one_lucky_round_does_not_decide(machine):
    machine.cost = lambda product, call: 1e-3 if product == "torch" else 0.5e-3 if call in (4, 5) else 1.05e-3
    call()
    assert entries()[0]["product"] == "torch"


def test_what_another_process_chose_meanwhile_on_an_idle_machine_holds(machine):
    other = {"product": "torch", "under_load": False, "times": 1, "at": 1.8e9}
    call()
    (key,) = json.loads(_gemm.cache_file().read_text())
    _gemm.cache_file().unlink()
    _gemm.forget()

    def written(product, call):
        _gemm.cache_file().write_text(json.dumps({key: other}))
        return LOADED[product]

    machine.cost = written
    machine.others(1)
    call()
    assert machine.measured()
    assert entries() == [other]
    call()
    assert machine.calls == ["torch"]


def test_what_another_process_measured_again_is_not_measured_once_more(machine):
    waiting(machine)
    call()
    machine.idle()
    machine.next_process()
    call(32)  # reads the file
    key, entry = max(json.loads(_gemm.cache_file().read_text()).items())
    entry |= {"product": "native", "under_load": False}
    _gemm.cache_file().write_text(json.dumps({key: entry}))
    machine.calls.clear()
    call()
    assert machine.calls == ["native"]


def test_every_operation_is_measured_again(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTASR_GEMM", raising=False)
    monkeypatch.setattr(processor, "crowd", lambda threads: 0)
    monkeypatch.setattr(processor.Load, "is_high", lambda *_: False)
    _gemm.forget()
    x, w, b = torch.ones(2, 40, 192), torch.ones(192, 192).requires_grad_(), torch.ones(192)
    image, kernel = torch.ones(1, 3, 9, 9), torch.ones(4, 3, 3, 3)
    grad = F.conv2d(image, kernel)
    maps, taps = torch.ones(1, 16, 11, 11), torch.ones(32, 16, 3, 3)
    frames, filters = torch.ones(1, 16, 99), torch.ones(64, 16, 3)

    def run():
        for _ in range(2):  # before the second call the products of the passes are known
            ops.linear(x, w, b).sum().backward()
        _gemm.input_grad(x, w.detach())
        _gemm.conv2d_grads(grad, image, kernel, (1, 1), (0, 0), (False, True, True))
        _conv2d.is_faster(maps, taps, None, (2, 2), (1, 1))
        _conv1d.is_faster(frames, filters, None, 2, 1, 1)

    run()
    first = json.loads(_gemm.cache_file().read_text())
    assert {key.split()[0] for key in first} >= set(_gemm._PRODUCTS["native"]) - {"step"}
    _gemm.cache_file().write_text(
        json.dumps({key: entry | {"under_load": True, "at": 0.0} for key, entry in first.items()})
    )
    _gemm.forget()
    run()
    again = json.loads(_gemm.cache_file().read_text())
    assert {key for key, entry in again.items() if entry["times"] == 2} >= set(first)
    assert not any(entry["under_load"] for entry in again.values())
    _gemm.forget()


@pytest.mark.parametrize(
    ("text", "threads", "crowds", "free"),
    [
        ("0.00 0.00 0.00 1/100 9", 1, 0, 8),
        ("0.00 0.00 0.00 4/100 9", 4, 0, 5),
        ("0.00 0.00 0.00 2/100 9", 1, 0.5, 7),  # of 8 cores: two others do no harm
        ("0.00 0.00 0.00 9/100 9", 8, 2, 1),  # the other one waits for a core of ours
        ("0.00 0.00 0.00 30/100 9", 8, 44, 1),
        ("9.00 9.00 9.00 0/0 0", 1, 0, 8),
        ("9.00 9.00 9.00", 1, 0, 8),
        ("", 1, 0, 8),
        (None, 1, 0, 8),
    ],
)
def test_threads_of_others(monkeypatch, tmp_path, text, threads, crowds, free):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if text is not None:
        (tmp_path / "loadavg").write_text(text)
    assert processor.crowd(threads, tmp_path / "loadavg") == crowds
    assert processor.free_cores(tmp_path / "loadavg") == free


@pytest.mark.skipif(not LOAD.exists(), reason="the system does not count the threads that run")
def test_beside_a_process_that_computes(monkeypatch, tmp_path):
    """On this machine, whatever else it does."""
    monkeypatch.setenv("FASTASR_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTASR_GEMM", raising=False)
    torch.set_num_threads(1)
    _gemm.forget()
    code = "print(flush=True)\nwhile True: pass"
    busy = [
        subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE)
        for _ in range(os.cpu_count() // 4 + 1)
    ]
    try:
        for process in busy:
            process.stdout.readline()
        call(256)
    finally:
        for process in busy:
            process.kill()
            process.communicate()
    (entry,) = entries()
    assert entry["under_load"]
    _gemm.forget()
    monkeypatch.setattr(_gemm, "_AGAIN_S", 0)
    monkeypatch.setattr(processor, "crowd", lambda threads: 0)  # other tests may run beside this one
    call(256)
    assert entries()[0]["times"] == 2
    _gemm.forget()
