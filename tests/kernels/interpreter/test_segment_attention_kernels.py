# SPDX-License-Identifier: Apache-2.0
"""The kernels of segment_attention in the interpreter: blocks of several segments and parts of one, channels in several
blocks, tiles of every width; what the kernels store and what they read."""

import pytest
import repair
import torch

from fastasr.kernels import segment_attention as kernels
from fastasr.ops import segment_attention
from fastasr.ops.segment_attention import rows_of
from fastasr.testing.tolerance import compare, mean

NAMES = ("y", "dquery", "dkey", "dvalue")
OPTIONS = ("frames", "segment_length", "left_context_length", "right_context_length", "max_memory_size")


def _inputs(
    batch, heads, width, *sizes, past=(0, 0), lengths=None, history=None, dropout=False, dtype, seed=0
):
    """Returns (gradient, arguments of the launchers); ``sizes`` are frames, segment, left, right, memory."""
    torch.manual_seed(seed)
    frames, segment, left, right, memory = sizes
    queries, keys = rows_of(frames, segment, right, memory, *past)
    tensors = [torch.randn(rows, batch, heads * width).to(dtype) for rows in (queries, keys, keys, queries)]
    lengths, history = (t if t is None else torch.tensor(t) for t in (lengths, history))
    keep = (
        (torch.rand(batch, heads, queries, memory + right + left + segment) > 0.2) / 0.8 if dropout else None
    )
    return tensors[3], (*tensors[:3], lengths, history, keep, heads, *sizes, *past)


def _run(grad, arguments):
    return kernels.segment_attention_forward(*arguments), *kernels.segment_attention_backward(
        grad, *arguments
    )


def _expected(grad, arguments, dtype):
    """Returns (y, the three gradients) by autograd through the definition, in ``dtype``."""
    leaves = [t.to(dtype).requires_grad_() for t in arguments[:3]]
    lengths, history, keep, heads, *sizes = arguments[3:]
    y = segment_attention.definition(
        *leaves, num_heads=heads, **dict(zip(OPTIONS, sizes[:5], strict=True)),
        past_frames=sizes[5], past_memory=sizes[6], lengths=lengths, history=history,
        weights_dropout=None if keep is None else keep.to(dtype),
    )  # fmt: skip
    return y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))


@pytest.fixture(autouse=True)
def _products_in_order(monkeypatch):
    """Makes scores computed by rows of queries equal to those computed by keys, as they are on a GPU."""
    monkeypatch.setattr(repair, "IN_ORDER", True)


CASES = {
    "segments per block": ((1, 2, 16, 50, 4, 30, 1, 4), {"lengths": [47]}),
    "blocks per segment": ((1, 1, 16, 55, 70, 9, 3, 1), {}),
    "blocks of channels": ((1, 1, 150, 14, 9, 6, 2, 1), {"dropout": True}),
    "a step of a stream": ((2, 2, 16, 16, 16, 30, 4, 4), {"past": (30, 4), "history": [16, 1]}),
    "a past of several segments": ((1, 1, 37, 20, 4, 30, 0, 3), {"past": (37, 6), "dropout": True}),
    "no context": ((2, 1, 8, 30, 8, 0, 0, 0), {"lengths": [30, 3]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_is_not_above_that_of_eager(case, dtype):
    shape, options = CASES[case]
    comparisons = [[] for _ in NAMES]
    for seed in range(4 if dtype == torch.float32 else 2):
        draw = _inputs(*shape, **options, dtype=dtype, seed=seed)
        results = zip(_run(*draw), _expected(*draw, dtype), _expected(*draw, torch.float64), strict=True)
        for found, (ours, eager, truth) in zip(comparisons, results, strict=True):
            assert ours.dtype == dtype
            found.append(compare(ours, eager, truth))
    for name, found in zip(NAMES, comparisons, strict=True):
        assert mean(found).ok, f"{name}: {mean(found)}"


def test_what_is_hidden_may_hold_anything():
    """Keys and values of frames beyond a length, and of past rows that do not exist yet, may hold anything; they get no
    gradient.
    """
    shape = (2, 1, 8, 20, 4, 6, 1, 2)
    options = {"past": (6, 2), "history": [3, 1], "lengths": [20, 9], "dtype": torch.float32}
    grad, arguments = _inputs(*shape, **options)
    expected = _run(grad, arguments)
    hidden = torch.zeros(arguments[1].shape[:2], dtype=torch.bool)
    context = 2 + 4 + 5  # behind memory (2 of the past, 4) and right context
    hidden[0], hidden[context : context + 3] = True, True
    hidden[context + 6 + 9 :, 1] = True
    for number in (1, 2):
        arguments[number][hidden] = float("nan")
    found = _run(grad, arguments)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert torch.equal(a, b), name
    for gradient in found[2:]:
        assert not gradient[hidden].any()


def test_a_query_that_sees_nothing():
    """Summaries without frames of their own see nothing; a score of -inf alone is not that."""
    grad, arguments = _inputs(1, 1, 4, 8, 4, 0, 0, 1, lengths=[3], dtype=torch.float32)
    y, dquery, dkey, dvalue = _run(grad, arguments)
    assert not y[9].any()
    assert not dquery[9].any()
    assert y[8].any()
    assert all(t.isfinite().all() for t in (y, dquery, dkey, dvalue))
    arguments[0][0], arguments[1][:, 0] = float("-inf"), arguments[1][:, 0].abs()
    assert kernels.segment_attention_forward(*arguments)[0].isnan().all()


def test_slices_of_a_projection():
    grad, arguments = _inputs(2, 2, 12, 21, 4, 6, 1, 2, dtype=torch.float32)
    both = torch.full((*arguments[1].shape[:2], 60), float("nan"))
    both[..., :24], both[..., 30:54] = arguments[1], arguments[2]
    sliced = _run(grad, (arguments[0], both[..., :24], both[..., 30:54], *arguments[3:]))
    for a, b in zip(sliced, _run(grad, arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2, 2, 8, 0, 4, 6, 1, 2), (0, 2, 8, 7, 4, 6, 1, 2)])
def test_empty(shape):
    grad, arguments = _inputs(*shape, past=(6, 2), dtype=torch.float32)
    y, *gradients = _run(grad, arguments)
    assert y.shape == grad.shape
    for gradient, t in zip(gradients, arguments, strict=False):
        assert torch.equal(gradient, torch.zeros_like(t))


def test_sizes_beyond_what_there_is():
    """Contexts without end see what there is; one segment longer than the utterance is as long as it."""
    grad, arguments = _inputs(1, 1, 8, 9, 4, 20, 1, 9, dtype=torch.float32)
    endless = (*arguments[:8], 4, 1 << 40, 1, 1 << 40, 0, 0)
    for a, b in zip(_run(grad, endless), _run(grad, arguments), strict=True):
        assert torch.equal(a, b)
    grad, arguments = _inputs(1, 1, 8, 9, 9, 5, 1, 2, past=(5, 2), dtype=torch.float32)
    for a, b in zip(
        _run(grad, (*arguments[:8], 1 << 40, *arguments[9:])), _run(grad, arguments), strict=True
    ):
        assert torch.equal(a, b)


def test_launches(monkeypatch):
    """There are one forward and two backward launches, whatever the sizes; a step of a stream is one
    program per head.
    """
    grids = []

    class Recorded:
        def __init__(self, name: str):
            self.name, self.kernel = name, getattr(kernels, f"{name}_kernel")

        def __getitem__(self, grid):
            grids.append((self.name, grid))
            return self.kernel[grid]

    for name in ("forward", "queries", "keys"):
        monkeypatch.setattr(kernels, f"{name}_kernel", Recorded(name))
    shape, options = CASES["a step of a stream"]
    _run(*_inputs(*shape, **options, dtype=torch.bfloat16))
    assert [name for name, _ in grids] == ["forward", "queries", "keys"]
    assert grids[0][1] == (4, 1)


@pytest.mark.parametrize("case", CASES)
def test_stores_and_reads(case, writes, guarded):
    """Every element of the results is stored once, nothing behind the end of a tensor is read."""
    shape, options = CASES[case]
    grad, arguments = _inputs(*shape, **options, dtype=torch.bfloat16)
    again = [guarded(t) if isinstance(t, torch.Tensor) else t for t in arguments]
    results = _run(guarded(grad), again)
    assert writes.clashes == 0
    statistics = 3 * arguments[6] * grad.shape[0] * grad.shape[1]
    assert writes.count == sum(t.numel() for t in results) + statistics
    for a, b in zip(results, _run(grad, arguments), strict=True):
        assert torch.equal(a, b)
