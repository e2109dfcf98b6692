# SPDX-License-Identifier: Apache-2.0
"""rnnt_joiner beyond its samples: chunks, kept logits, rows that are skipped, memory, ragged sequences, threads."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from largest import Largest

from fastasr import ops
from fastasr.ops import _dispatch, _gemm, _joiner_rows
from fastasr.testing import seeded

pytestmark = pytest.mark.skipif(
    bool(_dispatch.why_not_cpu("rnnt_joiner_rows")), reason="needs the native library"
)
definition = ops.rnnt_joiner.definition
OPTIONS = {"s_range": 3, "termination_symbol": 0}


def _inputs(batch=3, frames=11, length=7, d=24, v=37, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seeded(seed))
    shapes = (batch, frames, d), (batch, length + 1, d), (v, d), (v,)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    tensors[2] = tensors[2] / d**0.5
    symbols = torch.randint(0, v, (batch, length), generator=generator)
    starts = (
        (torch.arange(frames) * max(0, length - 2) // max(1, frames - 1)).expand(batch, frames).contiguous()
    )
    return [t.requires_grad_() for t in tensors], (symbols, starts)


def _both(function, tensors, indices, grads=None, **options):
    """Returns values, and gradients for ``grads`` of the two results (-inf gets its own too: it must
    count as 0).
    """
    outputs = function(*tensors, *indices, **OPTIONS, **options)
    if grads is None:
        generator = torch.Generator().manual_seed(seeded(1))
        grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    found = torch.autograd.grad(
        outputs, tensors, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    )
    return *(o.detach() for o in outputs), *found


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(_joiner_rows, "CHUNK_ROWS", 16)


@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("hat", [True, False])
def test_chunks_make_no_difference(keep_logits, hat, small_chunks):
    tensors, indices = _inputs(dtype=torch.float64)
    ours = _both(ops.rnnt_joiner, tensors, indices, hat=hat, keep_logits=keep_logits)
    torch.testing.assert_close(ours, _both(definition, tensors, indices, hat=hat), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep_logits", [True, False])
def test_rows_without_a_gradient_are_left_out(keep_logits, small_chunks, monkeypatch):
    tensors, indices = _inputs(dtype=torch.float64)
    keep = torch.rand(3, 11, 3, generator=torch.Generator().manual_seed(seeded(2))) < 0.4
    keep[1] = False
    grads = torch.randn(2, 3, 11, 3, dtype=torch.float64) * keep
    seen = []
    operator = torch.ops.fastasr_cpu.rnnt_joiner_hidden_gradient
    plain = operator.default

    def counting(dhidden, hidden, rows, *rest):
        seen.append(len(rows))
        return plain(dhidden, hidden, rows, *rest)

    monkeypatch.setattr(operator, "default", counting)
    ours = _both(ops.rnnt_joiner, tensors, indices, grads, keep_logits=keep_logits)
    torch.testing.assert_close(ours, _both(definition, tensors, indices, grads), rtol=1e-12, atol=1e-12)
    s = indices[1].unsqueeze(-1) + torch.arange(3)
    assert sum(seen) == int((keep & (s <= 7)).sum())


def test_a_second_backward_gives_the_same_bits():
    tensors, indices = _inputs()
    outputs = ops.rnnt_joiner(*tensors, *indices, **OPTIONS, keep_logits=True)
    grads = [torch.randn_like(o) for o in outputs]
    first = torch.autograd.grad(outputs, tensors, grads, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(outputs, tensors, grads), strict=True):
        assert torch.equal(a, b)


def test_the_weights_gradient_takes_the_product_of_choice(monkeypatch):
    monkeypatch.setenv("FASTASR_GEMM", "native")
    _gemm.forget()
    added, add_product = [], _gemm.add_product
    monkeypatch.setattr(_gemm, "add_product", lambda *a: added.append(a[0].shape) or add_product(*a))
    tensors, indices = _inputs(v=80)
    _both(ops.rnnt_joiner, tensors, indices)
    assert added == [tensors[2].shape]


def test_one_result_may_go_unused():
    tensors, indices = _inputs(dtype=torch.float64)
    for which in (0, 1):
        ours, theirs = (
            torch.autograd.grad(f(*tensors, *indices, **OPTIONS)[which].exp().sum(), tensors)
            for f in (ops.rnnt_joiner, definition)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_that_are_not_needed(wanted):
    tensors, indices = _inputs()
    expected = _both(ops.rnnt_joiner, tensors, indices)[2 + wanted]
    for i, t in enumerate(tensors):
        t.requires_grad_(i == wanted)
    outputs = ops.rnnt_joiner(*tensors, *indices, **OPTIONS)
    generator = torch.Generator().manual_seed(seeded(1))
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).float() for o in outputs]
    assert torch.equal(torch.autograd.grad(outputs, tensors[wanted], grads)[0], expected)


def test_what_lies_outside_the_boundary_is_not_read():
    tensors, (symbols, starts) = _inputs(batch=2)
    boundary = torch.tensor([[0, 0, 7, 11], [1, 2, 4, 8]])
    clean = _both(ops.rnnt_joiner, tensors, (symbols, starts), boundary=boundary)
    dirty = [t.detach().clone() for t in tensors]
    dirty[0][1, :2], dirty[0][1, 8:] = math.nan, math.nan
    dirty[1][1, 0], dirty[1][1, 5:] = math.nan, math.nan
    symbols, starts = symbols.clone(), starts.clone()
    symbols[1, 4:], starts[1, 8:] = -9, 10**6
    dirty = [t.requires_grad_() for t in dirty]
    for a, b in zip(clean, _both(ops.rnnt_joiner, dirty, (symbols, starts), boundary=boundary), strict=True):
        assert torch.equal(a, b)


def test_compiled_for_every_length():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(ops.rnnt_joiner, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for batch, frames, length in ((5, 11, 7), (6, 13, 9), (9, 17, 14)):
            tensors, indices = _inputs(batch, frames, length)
            for a, b in zip(
                compiled(*tensors, *indices, **OPTIONS),
                ops.rnnt_joiner(*tensors, *indices, **OPTIONS),
                strict=True,
            ):
                assert torch.equal(a, b)
    assert len(graphs) == 1


def test_a_compiled_call_checks_no_values_and_reads_nothing_outside():
    tensors, (symbols, starts) = _inputs(batch=1)
    symbols, starts = symbols.clone(), starts.clone()
    symbols[0, 2], starts[0, 3], starts[0, 4] = 37, -4, 99
    torch._dynamo.reset()
    compiled = torch.compile(ops.rnnt_joiner, fullgraph=True, backend="aot_eager")
    px, py = compiled(*tensors, symbols, starts, **OPTIONS)
    s = starts.unsqueeze(-1) + torch.arange(3)
    assert torch.equal(px.isnan(), s == 2)
    assert torch.equal(py == -math.inf, (s < 0) | (s > 7))


def test_logits_are_neither_made_nor_kept():
    """What a call keeps, and the largest tensor that it makes, do not grow with rows times outputs."""
    tensors, indices = _inputs(batch=4, frames=400, length=20, d=16, v=512)
    rows = 4 * 400 * 3

    def held(keep_logits: bool) -> int:
        outputs = ops.rnnt_joiner(*tensors, *indices, **OPTIONS, keep_logits=keep_logits)
        saved = [t for t in outputs[0].grad_fn.saved_tensors if t is not None]
        kept = [t for s in saved for chunk in getattr(s, "chunks", None) or () for t in chunk]
        found = (*saved, *kept, *outputs)
        return sum(t.numel() * t.element_size() for t in found)

    assert held(True) > rows * 512 * 4
    assert held(False) <= rows * 16 + sum(t.numel() * t.element_size() for t in (*tensors, *indices))
    outputs = ops.rnnt_joiner(*tensors, *indices, **OPTIONS, keep_logits=False)
    with Largest() as largest:
        torch.autograd.grad([o.exp().sum() for o in outputs], tensors)
    assert largest.elements <= _joiner_rows.CHUNK_ROWS * 512


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(
        st.integers(0, 3), st.integers(0, 9), st.integers(0, 6), st.integers(0, 9), st.integers(2, 20)
    ),
    data=st.data(),
    hat=st.booleans(),
    keep_logits=st.booleans(),
)
def test_ragged(sizes, data, hat, keep_logits):
    tensors, (symbols, starts) = _inputs(*sizes, dtype=torch.float64)
    batch, frames, length = sizes[:3]
    boundary = []
    for b in range(batch):
        s_end, t_end = data.draw(st.integers(0, length)), data.draw(st.integers(0, frames))
        boundary.append([data.draw(st.integers(0, s_end)), data.draw(st.integers(0, t_end)), s_end, t_end])
        for t in range(frames):  # in any order
            starts[b, t] = data.draw(st.integers(0, length))
    boundary = torch.tensor(boundary, dtype=torch.int64).reshape(batch, 4)
    options = {"boundary": boundary, "hat": hat}
    ours = _both(ops.rnnt_joiner, tensors, (symbols, starts), keep_logits=keep_logits, **options)
    torch.testing.assert_close(
        ours, _both(definition, tensors, (symbols, starts), **options), rtol=1e-10, atol=1e-11
    )


def test_the_passes_do_not_depend_on_the_number_of_threads():
    (am, lm, weight, _), (symbols, starts) = _inputs(batch=4, frames=60, length=30, d=96, v=200)
    native, found = torch.ops.fastasr_cpu, []
    rows = native.rnnt_joiner_rows(starts, symbols, None, 3, 200, None, None)
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        hidden = torch.empty(len(rows), 96)
        native.rnnt_joiner_hidden(am, lm, rows, 3, hidden)
        logits = (hidden.double() @ weight.double().T).float() if n == 1 else found[0][1].clone()
        px, py, grads = torch.empty(4, 60, 3), torch.empty(4, 60, 3), torch.ones(4, 60, 3)
        total = torch.zeros(4, 60, 3, dtype=torch.float64)
        d = torch.empty_like(logits)
        dbias = torch.zeros(200)
        dbias = dbias.double()
        none = torch.empty(4, 60, 3, 0)
        native.rnnt_joiner_scores(logits, rows, 0, False, px, py, none, total)
        native.rnnt_joiner_logits_gradient(logits, rows, total, grads, grads, none, 0, False, d, dbias)
        dam, dlm = torch.zeros_like(am), torch.zeros_like(lm)
        native.rnnt_joiner_hidden_gradient(hidden, hidden, rows, 3, dam, dlm)
        found.append((hidden, logits, px, py, total, d, dbias, dam, dlm))
    for other in found[1:]:
        assert all(torch.equal(a.detach(), b.detach()) for a, b in zip(found[0], other, strict=True))
