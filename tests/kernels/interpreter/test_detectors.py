# SPDX-License-Identifier: Apache-2.0
"""Every launch is checked: an address stored twice is found, and so are one before or behind a tensor and a missing
barrier."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _copy(X, Y, begin, STEP: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, 16)
    tl.store(Y + i, tl.load(X + begin + i))


@triton.jit
def _twice(Y, PLACES: tl.constexpr):
    tl.store(Y + tl.arange(0, 16) % PLACES, 1.0)


@triton.jit
def _masked(X, Y, n):
    i = tl.arange(0, 16)
    tl.store(Y + i, tl.load(X + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def _reverse(X, Y, BARRIER: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(Y + i, tl.load(X + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(X + i, tl.load(Y + 15 - i))


def test_two_programs_on_one_address_are_found():
    x, y = torch.ones(64), torch.empty(64)
    _copy[(3,)](x, y, 0, STEP=16)
    with pytest.raises(AssertionError, match="_copy stores to 2 addresses"):
        _copy[(3,)](x, y, 0, STEP=15)


def test_one_store_to_an_address_twice_is_found():
    _twice[(1,)](torch.empty(16), PLACES=16)
    with pytest.raises(AssertionError, match="_twice stores to 4 addresses"):
        _twice[(1,)](torch.empty(16), PLACES=12)


def test_an_access_outside_of_the_tensors_is_found():
    short, long = torch.ones(10), torch.empty(16)
    _masked[(1,)](short, long, 10)
    for begin in (-1, 1):
        with pytest.raises(triton.runtime.errors.InterpreterError, match="_copy loads outside"):
            _copy[(1,)](torch.ones(16), long, begin, STEP=16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="_masked stores outside"):
        _masked[(1,)](long, short, 11)


def test_a_missing_barrier_is_found():
    x, y = torch.arange(16.0), torch.empty(16)
    _reverse[(1,)](x, y, BARRIER=True)
    assert torch.equal(x, torch.arange(16.0).flip(0))
    with pytest.raises(triton.runtime.errors.InterpreterError, match="_reverse loads what it has stored"):
        _reverse[(1,)](x, y, BARRIER=False)
