# SPDX-License-Identifier: Apache-2.0
"""What a call does not need is not computed, and what it is not given counts as zeros."""

import torch

from fastasr import ops
from fastasr.kernels import depthwise_conv2d, layer_norm_lstm, linear_activation, rnnt_joiner


def _equal(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_of_depthwise_conv2d():
    x, weight, grad = torch.randn(2, 5, 4, 70), torch.randn(70, 1, 3, 3), torch.randn(2, 5, 4, 70)

    def run(*needs):
        return depthwise_conv2d.depthwise_conv2d_backward(grad, x, weight, 1, 1, *needs)

    everything = run(True, True, True)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        for need, a, b in zip(needs, run(*needs), everything, strict=True):
            assert torch.equal(a, b) if need else not a.numel()


def test_linear_activation_in_place_and_without_the_sum():
    gelu = 4
    z, grad = torch.randn(5, 70), torch.randn(5, 70)
    y = linear_activation.linear_activation_forward(z, gelu, False)
    dz, _ = linear_activation.linear_activation_backward(grad, z, gelu, True)
    alone, nothing = linear_activation.linear_activation_backward(grad, z, gelu, False)
    assert torch.equal(alone, dz)
    assert not nothing.numel()
    assert linear_activation.linear_activation_forward(z, gelu, True).data_ptr() == z.data_ptr()
    assert torch.equal(z, y)


def lstm(steps: int, batch: int, units: int):
    """Returns (gradients, arguments) of a layer with a state, and a function that runs both passes on them."""
    forward = [torch.randn(steps, batch, 4 * units), torch.randn(4 * units, units) * units**-0.5]
    forward += [torch.randn(n) for n in (4 * units, 4 * units, units, units)]
    forward += [torch.randn(batch, units) for _ in range(2)]
    grads = [torch.randn(steps, batch, units), *(torch.randn(batch, units) for _ in range(2))]

    def run(grads):
        product, weight, *norms, hidden, cell = forward
        call = product, None, weight, *norms, hidden, cell, 1e-3, True
        *after, kept = layer_norm_lstm.layer_norm_lstm_forward(*call)
        gradients = layer_norm_lstm.layer_norm_lstm_backward(
            *grads, weight, *norms, cell, kept, steps, batch, 1e-3, True
        )
        return *after, *gradients

    return grads, run


def test_gradients_of_layer_norm_lstm_may_be_absent():
    grads, run = lstm(2, 2, 4)
    for kept in range(3):
        some = [t if i == kept else None for i, t in enumerate(grads)]
        assert _equal(run(some), run([t if i == kept else torch.zeros_like(t) for i, t in enumerate(grads)]))


def test_rows_of_the_joiner_without_a_gradient_add_nothing():
    batch, frames, length, d, v = 2, 9, 6, 20, 35
    leaves = [torch.randn(s) for s in ((batch, frames, d), (batch, length + 1, d), (v, d), (v,))]
    symbols = torch.randint(1, v, (batch, length))
    starts = (torch.arange(frames) * (length - 1) // (frames - 1)).expand(batch, frames).contiguous()
    boundary = torch.tensor([[0, 0, length, frames], [1, 2, length - 2, frames - 1]])
    keep = torch.rand(batch, frames, 3) < 0.3
    keep[0] = False
    grads = [g * keep for g in torch.randn(2, batch, frames, 3).unbind(0)]
    call = *leaves, symbols, starts, boundary, None, 3, 0, 3, False, 0, 0.0
    normaliser, hidden = rnnt_joiner.rnnt_joiner_forward(*call, True, True)[3:]
    found = rnnt_joiner.rnnt_joiner_backward(*grads, None, *call, normaliser, (True,) * 4, hidden)
    again = rnnt_joiner.rnnt_joiner_backward(*grads, None, *call, normaliser, (True,) * 4, None)
    assert hidden.shape == (batch * frames * 3, 32)
    assert _equal(found, again)  # the hidden rows are computed again
    for keep_hidden in ((True, False), (False, True)):
        assert rnnt_joiner.rnnt_joiner_forward(*call, *keep_hidden)[4] is None
    alone = rnnt_joiner.rnnt_joiner_backward(
        *grads, None, *call, normaliser, (False, False, True, True), hidden
    )
    assert _equal(alone[2:], found[2:])
    wide = [t.double().requires_grad_() for t in leaves]
    outputs = ops.rnnt_joiner.definition(
        *wide, symbols, starts, s_range=3, termination_symbol=0, boundary=boundary
    )
    truth = torch.autograd.grad(outputs, wide, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    assert not found[0][0].any()
    for a, t in zip(found, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-5, atol=1e-6)
