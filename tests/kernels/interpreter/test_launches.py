# SPDX-License-Identifier: Apache-2.0
"""How many launches a call makes, and programs of one launch that wait for each other."""

import pytest
import torch
from triton.runtime import interpreter

from fastasr.kernels import layer_norm_lstm, segment_attention
from fastasr.ops._segments import rows_of
from tests.kernels.interpreter.test_needs import lstm


def test_segment_attention(monkeypatch):
    """There are one forward and two backward launches, whatever the sizes; a step of a stream is one program per
    head.
    """
    grids = []

    class Recorded:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(segment_attention, f"{name}_kernel")

        def __getitem__(self, grid):
            grids.append((self.name, grid))
            return self.kernel[grid]

    for name in ("forward", "queries", "keys"):
        monkeypatch.setattr(segment_attention, f"{name}_kernel", Recorded(name))
    frames, segment, left, right, memory, *past = 16, 16, 30, 4, 4, 30, 4
    queries, keys = rows_of(frames, segment, right, memory, *past)
    query, key, value, grad = (
        torch.randn(rows, 2, 32, dtype=torch.bfloat16) for rows in (queries, keys, keys, queries)
    )
    sizes = 2, frames, segment, left, right, memory, *past
    call = query, key, value, None, torch.tensor([16, 1]), None, *sizes
    segment_attention.segment_attention_forward(*call)
    segment_attention.segment_attention_backward(grad, *call)
    assert [name for name, _ in grids] == ["forward", "queries", "keys"]
    assert grids[0][1] == (4, 1)


@pytest.mark.parametrize("reason", ["too many blocks in cooperative launch", "operation not supported"])
def test_layer_norm_lstm_without_cooperative_launches(monkeypatch, caplog, reason):
    """Where the driver refuses to run all programs at once, each phase is a launch of its own. A warning says so."""
    grads, run = lstm(2, 3, 20)
    expected = run(grads)
    alone, launches = interpreter.GridExecutor.__call__, []

    def refuse(self, *arguments, **options):
        launches.append(options.pop("launch_cooperative_grid", False))
        if launches[-1]:
            raise RuntimeError(f"Triton Error [CUDA]: {reason}")
        alone(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", refuse)
    monkeypatch.setattr(layer_norm_lstm, "_apart", set())
    for _ in range(2):
        for a, b in zip(run(grads), expected, strict=True):
            assert torch.equal(a, b)
    assert launches.count(True) == 1
    assert [r.message for r in caplog.records] == [
        f"layer_norm_lstm on cpu launches each phase of a step: Triton Error [CUDA]: {reason}"
    ]


def test_programs_of_layer_norm_lstm_wait_for_each_other(monkeypatch):
    """One launch over the sequence gives what a launch for each phase gives."""
    grads, run = lstm(2, 3, 20)
    launch, together = interpreter.GridExecutor.__call__, []

    def count(self, *arguments, **options):
        together.append(options.get("launch_cooperative_grid", False))
        launch(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    found = run(grads)
    assert together.count(True) == 2
    monkeypatch.setattr(layer_norm_lstm, "_apart", {torch.device("cpu")})
    for a, b in zip(found, run(grads), strict=True):
        assert torch.equal(a, b)
    assert together.count(True) == 2
