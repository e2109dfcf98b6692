# SPDX-License-Identifier: Apache-2.0
"""A Zipformer's layer in the form in which it is recorded, by kernels, beside the same layer as it is, in eager: on a
padded batch, and on a row of the same recordings."""

import importlib
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from steps import set_batch_count

from fastasr import backend
from fastasr._recording import recorded_by
from fastasr.graphs.recording import Recording
from fastasr.kernels import _jobs
from fastasr.models.common.ragged import in_use
from fastasr.models.common.row import RowFrames, Spans
from fastasr.models.zipformer import attention
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.layer import ZipformerEncoderLayer
from fastasr.models.zipformer.schedules import PiecewiseLinear
from fastasr.models.zipformer.whitening import Whiten
from fastasr.ops import _linear

WIDTHS = 24, 32  # kernels pad the first one; the second one's regularisers and bias sums are jobs


class AtOnce(Recording):
    """Decides where it is asked, as an unrecorded pass does."""

    def numbers(self, plan, count):
        found = super().numbers(plan, count)
        drawn = plan()
        if count:
            self.now[found.place : found.place + count] = drawn
            found.values.data.copy_(torch.tensor(drawn, dtype=torch.float32))
        return found


def layer(width):
    """Returns a layer of which every part acts in about half of the calls."""
    torch.manual_seed(0)
    made = ZipformerEncoderLayer(width, 8, 2, 8, 4, 6, 32, cnn_module_kernel=7)
    for m in set_batch_count(made, 5000).modules():
        if isinstance(m, Whiten):
            m.prob = 0.5
        if isinstance(m, Balancer):
            m.mem_cutoff = lambda _: False
            if isinstance(m.prob, float):
                m.prob = 0.5
            else:
                m.prob.schedule = PiecewiseLinear((0.0, 0.5))
        if isinstance(m, ZipformerEncoderLayer):
            for name in ("const_attention_rate", "attention_skip_rate", "conv_skip_rate", "ff2_skip_rate"):
                getattr(m, name).schedule = PiecewiseLinear((0.0, 0.4))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made


def run(width, seed, recorded, kernels, autocast=False, on_row=False):
    made = layer(width)
    torch.manual_seed(seed)
    random.seed(seed)
    x = (3 * torch.randn(*((32, 1) if on_row else (13, 2)), width)).requires_grad_()
    positions, padding = torch.randn(1, 25, 8), torch.arange(13) >= torch.tensor([[13], [9]])
    row = None
    if on_row:
        row, padding = RowFrames(Spans(torch.tensor([0, 16]), torch.tensor([13, 25])), 32, 13, x), None
    back = AtOnce(x.device, runs=True)
    ahead = AtOnce(x.device, back, runs=True) if recorded else None
    # that of kernels has linear's bias gradient by our own sum too, which it has in recorded calls alone
    seen = ahead or (SimpleNamespace(back=None) if kernels else None)
    sums = mock.patch.object(importlib.import_module("fastasr.ops.linear"), "recording", return_value=seen)
    with backend("triton" if kernels else "eager"):
        with recorded_by(ahead), sums, torch.autocast("cpu", torch.bfloat16, autocast), in_use(row):
            y = made(x, positions, src_key_padding_mask=padding)
        inputs = [x, *(p for p in made.parameters() if p is not made.bypass_scale)]
        cotangent = torch.randn(y.shape)
        if row is not None:
            y = y.masked_fill(row.hidden.T.unsqueeze(-1), 0.0)
        back.begin()
        grads = torch.autograd.grad(y, inputs, cotangent, allow_unused=True)
        back.end()
    return [y, *grads], (random.random(), torch.rand(()).item())


@pytest.mark.parametrize("on_row", [False, True], ids=["padded", "on a row"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_layer_itself(seed, on_row, monkeypatch):
    monkeypatch.setattr(attention, "PENALISED_CALLS", 0.5)
    monkeypatch.setattr(attention, "SCORE_PENALTY", 0.05)
    monkeypatch.setattr(attention, "SCORE_LIMIT", 1.0)
    monkeypatch.setattr(_linear, "MANY_ROWS", 0)
    served = set()
    monkeypatch.setattr(
        _jobs, "run", lambda kernel, *a, run=_jobs.run, **o: served.add(kernel) or run(kernel, *a, **o)
    )
    ways, width = ((False, False), (True, True)), WIDTHS[seed % 2]
    (expected, drawn), (found, again) = (run(width, seed, *way, on_row=on_row) for way in ways)
    assert drawn == again
    assert width == WIDTHS[0] or len(served) == 5
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() < 2e-4 * b.norm() + 1e-6


def joined(tensors):
    return torch.cat([t.detach().float().flatten() for t in tensors if t is not None])


@pytest.mark.parametrize("seed", range(3))
def test_under_autocast(seed):
    """Roundings differ by no more than those of the kernels and of eager, where neither is recorded."""
    ways = ((False, False), (False, True), (True, True))
    runs = (run(WIDTHS[seed % 2], seed, *way, True) for way in ways)
    (eager, drawn), (kernels, _), (recorded, again) = runs
    assert drawn == again
    assert [t is None for t in recorded] == [t is None for t in eager]
    eager, kernels, recorded = map(joined, (eager, kernels, recorded))
    assert (recorded - kernels).norm() <= (kernels - eager).norm()
