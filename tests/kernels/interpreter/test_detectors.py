# SPDX-License-Identifier: Apache-2.0
"""Every launch is checked: an access outside of the tensors is found, and so is a race even if results are right."""

import re

import pytest
import torch
import triton
import triton.language as tl

from fastasr.kernels import layer_norm_lstm, rnnt_lattice
from tests.kernels.interpreter.memory import Launch
from tests.kernels.interpreter.test_needs import lstm


@triton.jit
def _copy(X, Y, begin, STEP: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, 16)
    tl.store(Y + i, tl.load(X + begin + i))


@triton.jit
def _ones(Y, PLACES: tl.constexpr):
    tl.store(Y + tl.arange(0, 16) % PLACES, 1.0)


@triton.jit
def _masked(X, Y, n):
    i = tl.arange(0, 16)
    tl.store(Y + i, tl.load(X + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _reverse(X, Y, BARRIER: tl.constexpr):
    i = tl.arange(0, 128)
    tl.store(Y + i, tl.load(X + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(X + i, tl.load(Y + 127 - i))


@triton.jit
def _shift(X, SIZE: tl.constexpr, BY: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(X + i, tl.load(X + (i + BY) % SIZE))


@triton.jit
def _read_the_other(X, Y, reader):
    p, i = tl.program_id(0), tl.arange(0, 16)
    if p == reader:
        tl.store(Y + i, tl.load(X + i))
    else:
        tl.store(X + i, 1.0)


@triton.jit
def _narrow_and_wide(X, NARROW):
    if tl.program_id(0) == 0:
        tl.store(X + tl.arange(0, 16), 1.0)
    else:
        tl.store(NARROW + 5, 0.0)


def _race(kernel: str, *accesses: str):
    text = f"{kernel}: nothing orders two accesses to {{}}: program {{}} {{}}, then program {{}} {{}} ("
    return pytest.raises(AssertionError, match=re.escape(text.format(*accesses)))


def test_two_programs_that_store_to_one_address_are_found():
    """They are even where both store the same."""
    x, y = torch.arange(64.0), torch.empty(64)
    _copy[(3,)](x, y, 0, STEP=16)
    with _race("_copy", "Y[15]", 0, "stores", 1, "stores"):
        _copy[(3,)](x, y, 0, STEP=15)
    _ones[(1,)](y, PLACES=16)
    with _race("_ones", "Y[0]", 0, "stores", 1, "stores"):
        _ones[(2,)](y, PLACES=16)


def test_one_store_to_an_address_twice_is_found():
    with _race("_ones", "Y[0]", 0, "stores", 0, "stores"):
        _ones[(1,)](torch.empty(16), PLACES=12)


def test_stores_of_different_widths_to_one_address_are_found():
    x = torch.empty(16)
    with _race("_narrow_and_wide", "X[2]", 0, "stores", 1, "stores"):
        _narrow_and_wide[(2,)](x, x.view(torch.bfloat16))


@pytest.mark.parametrize("reader", [0, 1])
def test_a_program_that_loads_what_another_one_stores_is_found(reader):
    """It is found whether it ran before or after the other one."""
    accesses = (0, "stores", 1, "loads") if reader else (0, "loads", 1, "stores")
    with _race("_read_the_other", "X[0]", *accesses):
        _read_the_other[(2,)](torch.zeros(16), torch.empty(16), reader)


def test_an_access_outside_of_the_tensors_is_found():
    short, long = torch.ones(10), torch.empty(16)
    _masked[(1,)](short, long, 10)
    for begin in (-1, 1):
        with pytest.raises(triton.runtime.errors.InterpreterError, match="_copy loads outside"):
            _copy[(1,)](torch.ones(16), long, begin, STEP=16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="_masked stores outside"):
        _masked[(1,)](long, short, 11)


def test_a_missing_barrier_is_found():
    x, y = torch.arange(128.0), torch.empty(128)
    _reverse[(1,)](x, y, BARRIER=True)
    assert torch.equal(x, torch.arange(128.0).flip(0))
    with _race("_reverse", "Y[0]", 0, "stores", 0, "loads"):
        _reverse[(1,)](x, y, BARRIER=False)


def test_a_store_to_what_another_thread_has_loaded_is_found():
    """A thread may replace what it has loaded itself, unless threads of other warps load the same."""
    _shift[(1,)](torch.ones(128), SIZE=128, BY=0)
    _shift[(1,)](torch.ones(16), SIZE=16, BY=0, num_warps=1)
    with _race("_shift", "X[0]", 0, "loads", 0, "stores"):
        _shift[(1,)](torch.ones(128), SIZE=128, BY=1)
    with _race("_shift", "X[0]", 0, "loads", 0, "stores"):
        _shift[(1,)](torch.ones(64), SIZE=64, BY=0)


# --- programs that wait for each other


@triton.jit
def _exchange(
    X, Y, ARRIVED, absent,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr,
):  # fmt: skip
    p, i = tl.program_id(0), tl.arange(0, 16)
    tl.store(X + 16 * p + i, p)
    if BEFORE:
        tl.debug_barrier()
    if p != absent:
        tl.atomic_add(ARRIVED, 1, sem=RELEASE)
    while tl.atomic_add(ARRIVED, 0, sem=ACQUIRE) < tl.num_programs(0):
        pass
    if AFTER:
        tl.debug_barrier()
    tl.store(Y + 16 * p + i, tl.load(X + 16 * ((p + 1) % tl.num_programs(0)) + i))


@triton.jit
def _arrive(TICKETS, ARRIVED):
    tl.store(TICKETS + tl.atomic_add(ARRIVED, 1), tl.program_id(0))


def _run_exchange(absent=-1, together=True, **options) -> torch.Tensor:
    x, y, arrived = torch.zeros(5, 16), torch.zeros(5, 16), torch.zeros(1, dtype=torch.int32)
    how = {"BEFORE": True, "AFTER": True, "RELEASE": "release", "ACQUIRE": "acquire"} | options
    _exchange[(5,)](x, y, arrived, absent, **how, launch_cooperative_grid=together)
    return y


def test_programs_exchange_through_memory():
    expected = torch.arange(1, 6).remainder(5)[:, None].expand(5, 16)
    assert torch.equal(_run_exchange(), expected.float())
    assert torch.equal(_run_exchange(RELEASE="acq_rel", ACQUIRE="acq_rel"), expected.float())


@pytest.mark.parametrize(
    "fault", [{"BEFORE": False}, {"AFTER": False}, {"RELEASE": "relaxed"}, {"ACQUIRE": "relaxed"}], ids=str
)
def test_each_part_of_waiting_is_needed(fault):
    with pytest.raises(AssertionError, match="_exchange: nothing orders two accesses to X"):
        _run_exchange(**fault)


def test_programs_that_wait_for_ever_are_found():
    with pytest.raises(AssertionError, match=r"_exchange: programs .* wait for ever"):
        _run_exchange(absent=2)
    with pytest.raises(
        triton.runtime.errors.InterpreterError, match="program 0 waits for programs that may not"
    ):
        _run_exchange(together=False)


def test_programs_run_in_random_orders(monkeypatch):
    def order(seed: int) -> tuple[int, ...]:
        monkeypatch.setenv("SEED", str(seed))
        tickets, arrived = torch.zeros(5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        _arrive[(5,)](tickets, arrived, launch_cooperative_grid=True)
        return tuple(tickets.tolist())

    orders = [order(seed) for seed in range(8)]
    assert len(set(orders)) > 4
    assert orders == [order(seed) for seed in range(8)]
    assert all(sorted(found) == list(range(5)) for found in orders)


# --- the barriers of our kernels


def test_phases_of_one_program_without_a_barrier_are_found(monkeypatch):
    """Four units make one program, whose warps hand the gates to each other."""
    grads, run = lstm(2, 3, 4)
    run(grads)
    monkeypatch.setattr(layer_norm_lstm, "_wait", lambda arrived, count: None)
    with pytest.raises(
        AssertionError, match=r"forward_kernel: nothing orders two accesses to (CELL|HIDDEN|RECURRENT)"
    ):
        run(grads)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize("units", [4, 20])
def test_layer_norm_lstm_without_barriers_is_found(monkeypatch, units, pass_):
    """The programs of 20 units still wait for each other."""
    grads, run = lstm(2, 3, units)
    barrier = Launch.barrier

    def skipped(self, program):
        if not self.kernel.startswith(pass_):
            barrier(self, program)

    monkeypatch.setattr(Launch, "barrier", skipped)
    with pytest.raises(AssertionError, match=f"{pass_}_kernel: nothing orders"):
        run(grads)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("modified", [False, True])
def test_blocks_of_columns_without_a_barrier_are_found(monkeypatch, modified):
    x, y = torch.randn(2, 3, 9 + (not modified)), torch.randn(2, 4, 9)
    forward = lambda: rnnt_lattice.rnnt_lattice_forward(x, y, None, True)  # noqa: E731
    scores, shares = forward()
    backward = lambda: rnnt_lattice.rnnt_lattice_backward(None, scores, shares, None, 3, x.shape[2], 9)  # noqa: E731
    backward()
    monkeypatch.setattr(Launch, "barrier", lambda self, program: None)
    for run in (forward, backward):
        with pytest.raises(AssertionError, match="_kernel: nothing orders two accesses to COLUMN"):
            run()
