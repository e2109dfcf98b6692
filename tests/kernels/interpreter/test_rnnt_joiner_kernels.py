# SPDX-License-Identifier: Apache-2.0
"""The kernels of rnnt_joiner in the interpreter: several chunks, ragged sequences, values out of range."""

import math

import pytest
import torch

from fastasr import ops
from fastasr.kernels import rnnt_joiner as kernels
from fastasr.testing.tolerance import compare

TANH, RELU = 3, 2
NAMES = ("symbol", "blank", "am", "lm", "weight", "bias")


def _inputs(dtype=torch.float32, batch=2, frames=9, length=6, d=20, v=35):
    torch.manual_seed(0)
    tensors = [torch.randn(s).to(dtype) for s in ((batch, frames, d), (batch, length + 1, d), (v, d), (v,))]
    tensors[2] *= d**-0.5
    symbols = torch.randint(1, v, (batch, length))
    starts = (torch.arange(frames) * (length - 1) // (frames - 1)).expand(batch, frames).contiguous()
    boundary = torch.tensor([[0, 0, length, frames], [1, 2, length - 2, frames - 1]])
    grads = torch.randn(2, batch, frames, 3).unbind(0)
    return grads, [*tensors, symbols, starts, boundary]


def _run(grads, tensors, activation=TANH, hat=False):
    rest = 3, 0, activation, hat
    px, py, normaliser, _ = kernels.rnnt_joiner_forward(*tensors, *rest, True, False)
    found = kernels.rnnt_joiner_backward(*grads, *tensors, normaliser, *rest, (True,) * 4, None)
    return px, py, *found


def _expected(grads, tensors, dtype, activation, hat):
    leaves = [t.to(dtype).requires_grad_() for t in tensors[:4]]
    outputs = ops.rnnt_joiner.definition(
        *leaves,
        *tensors[4:6],
        s_range=3,
        termination_symbol=0,
        boundary=tensors[6],
        activation="tanh" if activation == TANH else "relu",
        hat=hat,
    )
    grads = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return *(o.detach() for o in outputs), *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("float32", "bfloat16"))
@pytest.mark.parametrize(("activation", "hat"), [(TANH, False), (RELU, True)], ids=("tanh", "relu, HAT"))
def test_several_chunks(dtype, activation, hat, monkeypatch):
    grads, tensors = _inputs(dtype)
    whole = _run(grads, tensors, activation, hat)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)  # a frame each
    apart = _run(grads, tensors, activation, hat)
    # The results are not equal: the interpreter may round the product of a tile by where in it a row lies.
    torch.testing.assert_close(apart[:2], whole[:2], rtol=2e-6, atol=2e-6)
    own, exact = (_expected(grads, tensors, t, activation, hat) for t in (dtype, torch.float64))
    for name, *found in zip(NAMES, whole, apart, own, exact, strict=True):
        for result in found[:2]:
            comparison = compare(result, *found[2:])
            assert comparison.ok, f"{name}: {comparison}"


def test_rows_without_a_gradient_add_nothing():
    (gx, gy), tensors = _inputs()
    keep = torch.rand(gx.shape) < 0.3
    keep[0] = False
    found = _run((gx * keep, gy * keep), tensors)
    expected = _expected((gx * keep, gy * keep), tensors, torch.float64, TANH, False)
    assert not found[2][0].any()
    for name, ours, theirs in list(zip(NAMES, found, expected, strict=True))[2:]:
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_values_out_of_range_touch_nothing(guarded):
    grads, tensors = _inputs()
    tensors[6] = None
    tensors[4] = tensors[4].clone()
    tensors[5] = tensors[5].clone()
    tensors[4][1, 2] = 35
    tensors[4][1, 3] = -1
    tensors[5][0, 1], tensors[5][0, 2], tensors[5][0, 3] = 7, -5, 1 << 62
    px, py, *found = _run([guarded(g) for g in grads], [t if t is None else guarded(t) for t in tensors])
    assert (px[0, 1:4] == -math.inf).all()
    assert (py[0, 1:4] == -math.inf).all()
    s = tensors[5][1].unsqueeze(1) + torch.arange(3)
    unknown = (s == 2) | (s == 3)
    assert torch.equal(px[1].isnan(), unknown), "an unknown symbol is NaN"
    assert torch.equal(py[1].isfinite(), s <= 6)
    assert all(t.shape == u.shape for t, u in zip(found, tensors[:4], strict=True))


def test_no_address_is_stored_twice(writes):
    grads, tensors = _inputs()
    _run(grads, tensors)
    assert writes.clashes == 0
