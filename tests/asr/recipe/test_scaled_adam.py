# SPDX-License-Identifier: Apache-2.0
"""ScaledAdam and Eden against those of the package ``zipformer``."""

import copy

import pytest
import torch
from steps import seeded

from fastasr.asr.recipe import checkpoints
from fastasr.asr.recipe.eden import eden
from fastasr.asr.recipe.scaled_adam import ScaledAdam


@pytest.fixture(scope="module")
def upstream():
    return pytest.importorskip("zipformer.modules.optim", exc_type=ImportError)


class _Problem(torch.nn.Module):
    """Holds matrices, vectors, a scalar, one element, and a parameter that has no gradient."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(0.3 * torch.randn(7, 5))
        self.b = torch.nn.Parameter(torch.randn(5))
        self.s = torch.nn.Parameter(torch.tensor(0.7))
        self.one = torch.nn.Parameter(torch.tensor([0.2]))
        self.unused = torch.nn.Parameter(torch.randn(3))
        self.tiny = torch.nn.Parameter(1e-7 * torch.randn(4))

    def forward(self, x, y):
        out = torch.tanh(x @ self.a + self.b) * self.s + self.one
        return ((out - y) ** 2).sum() + (self.tiny * x[:, :4]).sum()


@pytest.mark.parametrize("clipping_scale", [None, 2.0, 0.5])
def test_the_same_parameters_after_every_step(upstream, clipping_scale):
    seeded(0)
    ours = _Problem()
    theirs = copy.deepcopy(ours)
    one = ScaledAdam(ours.parameters(), lr=0.04, clipping_scale=clipping_scale)
    other = upstream.ScaledAdam(theirs.named_parameters(), lr=0.04, clipping_scale=clipping_scale)
    for step in range(130):  # past the early estimates of the norm and one whole period
        x, y = torch.randn(16, 7), torch.randn(16, 5)
        if step % 17 == 5:
            y = y * 50  # clipped
        for model, optimizer in ((ours, one), (theirs, other)):
            model.zero_grad()
            model(x, y).backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.04 / (1 + step / 50)
            optimizer.step()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(
                p, q, rtol=2e-4, atol=2e-6, msg=lambda m, n=name, s=step: f"{n}, {s}: {m}"
            )


def test_gradients_that_are_not_finite_change_nothing_for_good():
    seeded(0)
    model = _Problem()
    optimizer = ScaledAdam(model.parameters(), lr=0.04)
    for step in range(30):
        model.zero_grad()
        model(torch.randn(16, 7), torch.randn(16, 5)).backward()
        if step == 25:
            model.a.grad[0, 0] = float("nan")
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_that_goes_on_from_a_saved_state():
    seeded(0)
    model = _Problem()
    optimizer = ScaledAdam(model.parameters(), lr=0.04)
    data = [(torch.randn(16, 7), torch.randn(16, 5)) for _ in range(24)]

    def steps(model, optimizer, data):
        for x, y in data:
            model.zero_grad()
            model(x, y).backward()
            optimizer.step()

    steps(model, optimizer, data[:13])
    other = copy.deepcopy(model)
    resumed = ScaledAdam(other.parameters(), lr=0.04)
    checkpoints.load_optimizer(resumed, copy.deepcopy(checkpoints.optimizer_state(optimizer)))
    steps(model, optimizer, data[13:])
    steps(other, resumed, data[13:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_bad_arguments():
    p = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="beta1 <= beta2"):
        ScaledAdam(p, betas=(0.99, 0.9))
    with pytest.raises(ValueError, match="one group"):
        ScaledAdam([{"params": p}, {"params": [torch.nn.Parameter(torch.zeros(2))]}])


def test_eden(upstream):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = upstream.Eden(optimizer, 700, 4, warmup_batches=100, warmup_start=0.3)
    for epoch, batch in ((0, 0), (0, 60), (1, 200), (3, 900), (20, 9000)):
        schedule.step_epoch(epoch)
        schedule.step_batch(batch)
        assert eden(0.05, batch, epoch, 700, 4, 100, 0.3) == pytest.approx(schedule.get_last_lr()[0])
