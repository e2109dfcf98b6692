# SPDX-License-Identifier: Apache-2.0
"""BatchNorm in training with its activation does what torch's module and the activation do, in values, gradients and
running statistics; in eval mode it is part of the convolution before it."""

import copy

import pytest
import torch
from steps import as_near, close

from fastasr import ops
from fastasr.models.common.activations import batch_norm_activated
from fastasr.models.fast_conformer.convolution import convolved, is_batch_norm

ACTIVATIONS = {"silu": torch.nn.SiLU(), "gelu": torch.nn.GELU(), "identity": torch.nn.Identity()}


def norms(momentum=0.1, channels=6):
    norm = torch.nn.BatchNorm1d(channels, eps=1e-3, momentum=momentum).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm, copy.deepcopy(norm)


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_as_torch(name, momentum):
    ours, theirs = norms(momentum)
    for frames in (7, 1, 30):
        z = torch.randn(2, frames, 6).double().requires_grad_()
        y = batch_norm_activated(ours, name, z)
        expected = ACTIVATIONS[name](theirs(z.transpose(1, 2))).transpose(1, 2)
        close(y, expected, 1e-12)
        grad = torch.randn(y.shape).double()
        found = torch.autograd.grad(y, (z, ours.weight, ours.bias), grad)
        wanted = torch.autograd.grad(expected, (z, theirs.weight, theirs.bias), grad)
        close(found, wanted, 1e-10)
        for (key, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            close(a.double(), b.double(), 1e-12, key)


def test_statistics_keep_their_dtype():
    norm = torch.nn.BatchNorm1d(6).bfloat16()
    y = batch_norm_activated(norm, "silu", torch.randn(2, 9, 6).bfloat16())
    assert {y.dtype, norm.running_mean.dtype, norm.running_var.dtype} == {torch.bfloat16}
    assert norm.running_mean.any()


def test_one_frame_has_no_variance():
    norm, _ = norms()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm_activated(norm, "silu", torch.randn(1, 1, 6).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_mean_costs_no_digits(dtype):
    """torch rounds the mean before it subtracts it, and is off by more than a thousand units. The truth for float64 is
    computed in float64 too."""
    x = (0.1 * torch.randn(4, 300, 16, dtype=torch.float64) + 100).to(dtype)
    weight, bias = torch.ones(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    y, mean, variance, _ = ops.batch_norm_activation(x, weight, bias, activation="identity")
    wide = x.double().flatten(0, 1) - 100
    truth = (wide - wide.mean(0)) / (wide.var(0, correction=0) + 1e-5).sqrt()
    eps = torch.finfo(dtype).eps
    assert (y.double().flatten(0, 1) - truth).abs().max() < 64 * eps
    assert (variance.double() / wide.var(0) - 1).abs().max() < 4 * max(eps, 1e-14)
    assert (mean.double() - 100 - wide.mean(0)).abs().max() < 100 * eps


def test_padding_is_not_read():
    x, mask = torch.randn(3, 20, 8), torch.rand(3, 20) < 0.4
    weight, bias = torch.randn(8).requires_grad_(), torch.randn(8).requires_grad_()
    filled = [x.masked_fill(mask[..., None], v).requires_grad_() for v in (0.0, torch.nan)]
    grad = torch.randn(x.shape).masked_fill(mask[..., None], torch.inf)
    found = []
    for t in filled:
        y, *statistics = ops.batch_norm_activation(t, weight, bias, padding_mask=mask)
        found.append((y, *statistics, *torch.autograd.grad(y, (t, weight, bias), grad)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    y, *_, dx, _, _ = found[1]
    assert not y[mask].any()
    assert not dx[mask].any()


def test_another_activation_follows_the_op():
    conv = torch.nn.Conv1d(6, 6, 3, padding=1, groups=6).double()
    norm, other = norms()
    h = torch.randn(2, 9, 12).double()
    y = convolved(h, conv, norm, torch.nn.Softplus())
    u = torch.nn.functional.glu(h, -1).transpose(1, 2)
    close(y, torch.nn.functional.softplus(other(conv(u))).transpose(1, 2), 1e-12)
    close(norm.running_var, other.running_var, 1e-12)
    norm.num_batches_tracked = None
    assert not is_batch_norm(norm)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "16 bits"])
def test_eval_mode_is_as_exact_as_torch(autocast):
    """The convolution's taps with the norm in them are not rounded to 16 bits, nor are their gradients. Frames have
    one gradient, as a loss gives them similar ones: errors that all frames share add up in the sums over frames."""
    channels, dtype = 128, torch.bfloat16
    conv = torch.nn.Conv1d(channels, channels, 9, padding=4, groups=channels)
    norm, act = torch.nn.BatchNorm1d(channels).eval(), torch.nn.SiLU()
    for t in (norm.weight, norm.running_var):
        torch.nn.init.uniform_(t, 0.5, 2.0)
    torch.nn.init.normal_(norm.running_mean)
    modules = torch.nn.ModuleList([conv, norm]).to(torch.float32 if autocast else dtype)
    h = torch.randn(2, 150, 2 * channels).to(dtype)
    grad = torch.randn(channels).expand(2, 150, channels).to(dtype)

    def theirs(h, conv, norm):
        return act(norm(conv(torch.nn.functional.glu(h, -1).transpose(1, 2)))).transpose(1, 2)

    def sums(run, modules, h):
        y = run(h, *modules)
        return y.double().sum((0, 1)), *torch.autograd.grad(y, [*modules.parameters()], grad.to(y.dtype))

    exact = sums(theirs, copy.deepcopy(modules).double(), h.double())
    with torch.autocast("cpu", dtype, enabled=autocast):
        expected = sums(theirs, modules, h)
        found = sums(lambda h, *modules: convolved(h, *modules, act), modules, h)
    for tensors in zip(found, expected, exact, strict=True):
        as_near(*tensors, 1.1)
