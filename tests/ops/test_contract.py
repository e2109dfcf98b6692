# SPDX-License-Identifier: Apache-2.0
"""The op contract, for every op, from its sample table alone: a new op needs no code here.

With FASTASR_TEST_BACKEND set the ops are forced onto that backend: tests/ops/test_contract_interpreted.py runs this
file so, with Triton's interpreter. Thorough samples then run in one 16-bit type too, which the run's seed chooses.
"""

import os

import pytest
import torch

import fastasr
from fastasr import ops
from fastasr.ops import _dispatch
from fastasr.testing.checks import cases, refuses
from fastasr.testing.table import table, tables

OP = os.environ.get("OP")
FORCED = os.environ.get("FASTASR_TEST_BACKEND")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() and not FORCED else ("cpu",)


def _served(name: str) -> bool:
    if OP and name != OP:
        return False  # tests/conftest.py would leave these cases out, but only once they are made
    return not FORCED or any(
        i.backend == FORCED for f in _dispatch.FAMILIES.values() if name in f.ops for i in f.implementations
    )


CASES = [
    pytest.param(case, id=case.id, marks=pytest.mark.long if case.long else ())
    for name in ops.NAMES
    if _served(name)
    for device in DEVICES
    for case in cases(table(name), device, forced=bool(FORCED))
]


@pytest.mark.parametrize("case", CASES)
def test_contract(case):
    with fastasr.backend(FORCED or "auto"):
        case()


if not FORCED:  # calls are refused before a backend is chosen

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("name", filter(_served, ops.NAMES))
    def test_refuses(name, device):
        """All refusals of an op are one test: there are thousands."""
        failures = []
        for label, run in refuses(table(name), device):
            try:
                run()
            except Exception as error:
                failures.append(f"{label}: {type(error).__name__}: {error}")
        assert not failures, "\n".join(failures)


def test_every_public_op_has_a_table():
    assert {*tables(), *ops.GRADIENTS} == {table(name).op for name in ops.NAMES} == set(ops.NAMES)
    assert set(ops.NAMES) == set(ops.__all__)
    assert {op for f in _dispatch.FAMILIES.values() for op in f.ops} == set(ops.NAMES)
    for name in ops.NAMES:
        assert getattr(ops, name).__doc__, f"{name} has no docstring"
        assert getattr(torch.ops.fastasr, name), f"{name} is not registered"
