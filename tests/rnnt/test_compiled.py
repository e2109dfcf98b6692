# SPDX-License-Identifier: Apache-2.0
"""The losses under torch.compile without a graph break, and the operators behind them."""

import pytest
import torch
from problems import TYPES, random_problem

from fastasr import rnnt
from fastasr.rnnt import additive, rows


def both(function, *leaves):
    """Compares values and gradients, plain and compiled for any shape."""
    torch._dynamo.reset()
    results = []
    for call in (function, torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")):
        inputs = [x.detach().clone().requires_grad_() for x in leaves]
        loss = call(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*results)


def traced(kind):
    """Returns the types, all but one for the long run: a trace takes seconds, and parity compares every type."""
    return [kind, *(pytest.param(other, marks=pytest.mark.long) for other in TYPES if other != kind)]


@pytest.mark.parametrize("rnnt_type", traced("constrained"))
def test_the_three_steps(rnnt_type):
    p = random_problem(7)
    weight, bias = torch.randn(9, p.am.shape[2], dtype=torch.float64), torch.randn(9, dtype=torch.float64)

    def three_steps(lm, am, weight, bias):
        simple, occupation = rnnt.rnnt_loss_smoothed(
            lm, am, p.symbols, p.blank, 0.25, 0.1, p.boundary, rnnt_type, 0.1, "sum", return_grad=True
        )
        ranges = rnnt.get_rnnt_prune_ranges(*occupation, p.boundary, 3)
        fused = rnnt.pruned_joiner_loss(
            am, lm, weight, bias, p.symbols, ranges, p.blank, p.boundary, rnnt_type, 0.1, fastemit_lambda=0.1
        )
        am_pruned, lm_pruned = rnnt.do_rnnt_pruning(am, lm, ranges)
        logits = torch.nn.functional.linear(torch.tanh(am_pruned + lm_pruned), weight, bias)
        pruned = rnnt.rnnt_loss_pruned(
            logits, p.symbols, ranges, p.blank, p.boundary, rnnt_type, zero_infinity=True
        )
        return 0.5 * simple + fused + pruned

    both(three_steps, p.lm, p.am, weight, bias)


@pytest.mark.parametrize("rnnt_type", traced("regular"))
def test_the_whole_lattice(rnnt_type):
    p = random_problem(7)
    weight = torch.randn(9, p.am.shape[2], dtype=torch.float64)

    def losses(lm, am, weight):
        tail = p.symbols, p.blank, p.boundary, rnnt_type
        logits = torch.tanh(am.unsqueeze(2) + lm.unsqueeze(1))
        return (
            rnnt.rnnt_loss_simple(lm, am, *tail)
            + rnnt.rnnt_loss(logits, *tail)
            + rnnt.joiner_loss(am, lm, weight, None, *tail)
        )

    both(losses, p.lm, p.am, weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_operators(dtype):
    p = random_problem(3)
    lm, am = (x.to(dtype).requires_grad_() for x in (p.lm, p.am))
    packed, lengths = am.detach().flatten(0, 1)[None].requires_grad_(), torch.full(am.shape[:1], am.shape[1])
    for scales in ((0.0, 0.0), (0.25, 0.1)):
        for frames in ((am, None), (packed, lengths)):
            call = lm, frames[0], p.symbols, p.blank, *scales, frames[1], am.shape[1]
            torch.library.opcheck(additive._OP, call)
    logits = p.full.to(dtype)[:, :, :-1].detach().requires_grad_()
    symbols = p.symbols.unsqueeze(1).expand(-1, p.am.shape[1], -1).contiguous()
    for hat in (False, True):
        torch.library.opcheck(rows.OP, (logits, symbols, p.blank, hat))


def test_autocast_leaves_the_precision_alone():
    p = random_problem(3, dtype=torch.float32)
    tail = p.symbols, p.blank
    expected = rnnt.rnnt_loss_smoothed(p.lm, p.am, *tail)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rnnt.rnnt_loss_smoothed(p.lm, p.am, *tail), expected)
        assert torch.equal(rnnt.rnnt_loss(p.full, *tail), rnnt.rnnt_loss(p.full.clone(), *tail))


def test_slices_do_not_show(monkeypatch):
    """One slice of frames or rows gives the same as one slice for each."""
    p = random_problem(6)

    def losses():
        lm, am, logits = (x.detach().clone().requires_grad_() for x in (p.lm, p.am.repeat(1, 5, 1), p.full))
        loss = rnnt.rnnt_loss_smoothed(lm, am, p.symbols, p.blank) + rnnt.rnnt_loss(
            logits, p.symbols, p.blank
        )
        return loss.detach(), *torch.autograd.grad(loss, (lm, am, logits))

    whole = losses()
    monkeypatch.setattr(additive, "_SLICE_BYTES", {"cpu": 1})
    monkeypatch.setattr(rows, "_SLICE_BYTES", {"cpu": 1})
    monkeypatch.setattr(rows, "_kernels", lambda logits: [])
    torch.testing.assert_close(losses(), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.25, 0.0), (0.2, 0.3)])
def test_the_gpu_s_products_on_the_cpu(monkeypatch, scales):
    """The GPU's path multiplies over the whole batch and uses one-hot matrices in place of sums by index."""
    p = random_problem(6)

    def losses():
        lm, am = (x.detach().clone().requires_grad_() for x in (p.lm, p.am))
        loss = rnnt.rnnt_loss_smoothed(lm, am, p.symbols, p.blank, *scales, p.boundary)
        return loss.detach(), *torch.autograd.grad(loss, (lm, am))

    expected = losses()
    monkeypatch.setattr(additive, "_batched", lambda x: True)
    monkeypatch.setattr(additive, "_SLICE_BYTES", {"cpu": 1})
    torch.testing.assert_close(losses(), expected, rtol=1e-12, atol=1e-12)


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the sizes of all tensors that operators make."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves(args)
            if torch.is_tensor(t)
        }
        for t in torch.utils._pytree.tree_leaves(made):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in inputs:
                self.sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return made


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("batched", [False, True], ids=["CPU", "GPU"])
def test_nothing_of_the_size_of_am_is_made_but_its_gradient(monkeypatch, batched, packed):
    batch, frames, length, classes = 2, 128, 6, 50
    lm, am = torch.randn(batch, length + 1, classes), torch.randn(batch, frames, classes)
    symbols = torch.randint(0, classes, (batch, length))
    monkeypatch.setattr(additive, "_batched", lambda x: batched)
    monkeypatch.setattr(additive, "_SLICE_BYTES", {"cpu": am.nbytes // 8})
    lengths = None
    if packed:
        lengths = torch.tensor([frames, frames // 2])
        am = am.flatten(0, 1)[None, : int(lengths.sum())]
    options = 0, 0.2, 0.1, lengths, frames
    with _Largest() as forward:
        px, py, sums = additive.forward(lm, am, symbols, *options)
    with _Largest() as backward:
        additive.backward(px, py, lm, am, symbols, sums, *options)
    assert max(forward.sizes) < am.numel() / 3
    large = [size for size in backward.sizes if size > am.numel() / 3]
    assert large == [am.numel() + packed * classes]
