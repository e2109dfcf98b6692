# SPDX-License-Identifier: Apache-2.0
"""How kernels are interpreted: faster, with the rounding of the hardware, every access to memory checked.

A pytest plugin: ``pytest -p tests.kernels.interpreter.plugin``, with TRITON_INTERPRET=1.
"""

import numpy as np
import pytest
from torch.utils._python_dispatch import _get_current_dispatch_mode
from triton.runtime import interpreter

from fastasr import backend
from fastasr.kernels import layer_norm_lstm
from fastasr.testing.checks import Case, parity
from fastasr.testing.tape import Tape, TapeRecorder, _kept
from tests.kernels import job_tables
from tests.kernels.interpreter import blocks, faster, memory, repair

faster.install()
repair.install()
memory.install()
# Here the programs of a cooperative launch take turns, so they can wait for each other.
layer_norm_lstm._together = lambda device: device not in layer_norm_lstm._apart

# The contract of these ops needs products that are equal to their transposes': the weights of a query that sees one key
# well are 1 as nearly as its scores agree, and dA of such a query is subtracted from itself.
SCORES_TWICE = ("segment_attention", "toeplitz_attention")


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """Silences numpy: NaN and infinity are inputs here, not accidents."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def by_triton():
    with backend("triton"):
        yield


@pytest.fixture
def products_in_order(monkeypatch):
    monkeypatch.setattr(repair, "IN_ORDER", True)


@pytest.fixture
def launches_on_the_tape(monkeypatch):
    """A tape that records notes launches, and its replays run them; they do not run while it records."""
    run, rehearse = interpreter.GridExecutor.__call__, TapeRecorder.rehearse

    def rehearsed(recorder, function):
        before = dict(job_tables.written)
        rehearse(recorder, function)
        job_tables.written.clear()  # a call that keeps tensors is not recorded
        job_tables.written.update(before)

    def call(executor, *arguments, **options):
        tape = _get_current_dispatch_mode()
        if isinstance(tape, Tape):
            kept = _kept(arguments), _kept(options)  # a graph keeps none of them
            tape.calls.append((lambda *a, **o: run(executor, *a, **o), *kept, []))
        else:
            run(executor, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    monkeypatch.setattr(TapeRecorder, "rehearse", rehearsed)


@pytest.fixture
def small_blocks(monkeypatch):
    blocks.shrink(monkeypatch)


@pytest.fixture(autouse=True)
def _as_the_case_needs(request):
    """Gives the contract the blocks of a GPU on thorough samples and in every check but parity, and small ones on the
    other samples.
    """
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if isinstance(case, Case):
        if case.table.op in SCORES_TWICE:
            request.getfixturevalue("products_in_order")
        if case.check.run is parity and not case.sample.thorough:
            request.getfixturevalue("small_blocks")
