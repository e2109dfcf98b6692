# SPDX-License-Identifier: Apache-2.0
"""Kernels of the LayerNorm-LSTM in the interpreter: their loads and stores, and that their programs wait for each
other.
"""

import os

import pytest
import torch
from triton.runtime import interpreter

from fastasr.kernels import layer_norm_lstm as kernels

# (steps, sequences, units, a state before)
CASES = [(2, 3, 20, True), (1, 18, 7, False), (3, 1, 4, False)]


def _inputs(steps, batch, units, state):
    torch.manual_seed(0)
    forward = [torch.randn(steps, batch, 4 * units), torch.randn(4 * units, units) * units**-0.5]
    forward += [torch.randn(n) for n in (4 * units, 4 * units, units, units)]
    forward += [torch.randn(batch, units) if state else None for _ in range(2)]
    grads = [torch.randn(steps, batch, units), *(torch.randn(batch, units) for _ in range(2))]
    return grads, forward


def _run(grads, forward):
    product, weight, *norms, hidden, cell = forward
    *after, kept = kernels.layer_norm_lstm_forward(product, None, weight, *norms, hidden, cell, 1e-3, True)
    steps, batch = product.shape[:2]
    gradients = kernels.layer_norm_lstm_backward(
        *grads, weight, *norms, cell, kept, steps, batch, 1e-3, hidden is not None
    )
    return *after, *gradients


def _equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_read_past_the_end(case, guarded):
    grads, forward = _inputs(*case)
    expected = _run(grads, forward)
    at_the_end = [t if t is None else guarded(t) for t in forward]
    assert _equal(_run([guarded(t) for t in grads], at_the_end), expected)


def test_no_address_is_stored_twice(writes):
    _run(*_inputs(*CASES[0]))
    assert writes.clashes == 0


def test_gradients_may_be_absent():
    grads, forward = _inputs(2, 2, 4, True)
    zeros = [torch.zeros_like(t) for t in grads]
    for kept in range(3):
        some = [t if i == kept else None for i, t in enumerate(grads)]
        expected = [t if i == kept else zeros[i] for i, t in enumerate(grads)]
        assert _equal(_run(some, forward), _run(expected, forward))


def _run_together(self, *arguments, **options):
    """Launches a kernel whose programs are processes, all running at once."""
    assert options.pop("launch_cooperative_grid", True)
    patched = interpreter._patch_lang(self.fn)
    options = {name: value for name, value in options.items() if name in self.arg_names}
    values = interpreter.inspect.getcallargs(self.fn, *arguments, **options)
    values = {n: v if n in self.constexprs else interpreter._implicit_cvt(v) for n, v in values.items()}
    (programs,) = self.grid
    interpreter.interpreter_builder.set_grid_dim(programs, 1, 1)
    running = []
    for program in range(programs):
        process = os.fork()
        if not process:
            code = 1
            try:
                interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
                self.fn(**values)
                code = 0
            finally:
                os._exit(code)
        running.append(process)
    patched.restore()
    assert [os.waitpid(process, 0)[1] for process in running] == [0] * programs


def test_programs_wait_for_each_other(monkeypatch):
    """One launch over the sequence, a process for each program, gives what a launch for each phase gives."""
    grads, forward = _inputs(*CASES[0])
    expected = _run(grads, forward)
    alone, launches = interpreter.GridExecutor.__call__, []

    def launch(self, *arguments, **options):
        together = options.get("launch_cooperative_grid", False)
        launches.append(together)
        return (_run_together if together else alone)(self, *arguments, **options)

    empty, zeros = torch.empty, torch.zeros
    monkeypatch.setattr(torch, "empty", lambda *shape, **rest: empty(*shape, **rest).share_memory_())
    monkeypatch.setattr(torch, "zeros", lambda *shape, **rest: zeros(*shape, **rest).share_memory_())
    monkeypatch.setattr(torch.Tensor, "clone", lambda t: empty(t.shape).share_memory_().copy_(t))
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(kernels, "_together", lambda: True)
    assert _equal(_run(grads, forward), expected)
    assert launches.count(True) == 2
