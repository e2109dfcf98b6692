# SPDX-License-Identifier: Apache-2.0
"""The FastConformer block as a GPU computes it, with ``ops.add_norm``, against its norms and residuals by torch."""

import pytest
import torch
from steps import close, moved, numbers, seeded

from fastasr.models import fast_conformer
from fastasr.models.fast_conformer import masks

BATCH, FRAMES, WIDTH = 2, 17, 24


def block():
    seeded(0)
    return moved(fast_conformer.FastConformerBlock(WIDTH, 3, 40), 0.1).train()


def step(block, autocast=False):
    """Returns the block's output, and the gradients of its input and parameters."""
    x = (
        torch.randn(BATCH, FRAMES, WIDTH, generator=numbers(1))
        .to(block.norm_out.weight.dtype)
        .requires_grad_()
    )
    positions = fast_conformer.FastConformerPositions(WIDTH)(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = block(x, position_embeddings=positions)
    return y, torch.autograd.grad(y.float().sin().sum(), (x, *block.parameters()))


@pytest.fixture
def as_on_gpu(monkeypatch):
    return lambda: monkeypatch.setattr(masks, "on_gpu", lambda device: True)


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_into_the_positions_stays_with_its_caller(inference):
    module = fast_conformer.FastConformerPositions(WIDTH)
    with torch.inference_mode(inference):
        first = module(torch.zeros(1, FRAMES, WIDTH))
        expected = first.clone()
        first.mul_(2.0)
        for frames in (FRAMES, 1):
            found = module(torch.zeros(1, frames, WIDTH))
            assert torch.equal(found, expected[:, FRAMES - frames : FRAMES + frames - 1])


def test_it_adds_and_normalises_the_same(as_on_gpu):
    y, grads = step(block().double())
    as_on_gpu()
    found, others = step(block().double())
    close(found, y, 1e-12)
    for a, b in zip(others, grads, strict=True):
        close(a, b, 1e-12, least=1e-2)  # some, as that of the keys' bias, are 0 but for rounding


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_autocast_keeps_the_stream_in_float32_and_gives_branches_16_bits(as_on_gpu):
    exact = step(block())
    ours = block()
    by_torch = step(block(), autocast=True)
    seen = []
    branch = ours.conv.forward
    ours.conv.forward = lambda x, **kwargs: (seen.append(x.dtype), branch(x, **kwargs))[1]
    as_on_gpu()
    y, grads = step(ours, autocast=True)
    assert seen == [torch.bfloat16]
    assert y.dtype == torch.float32
    assert distance(y, exact[0]) <= 1.1 * distance(by_torch[0], exact[0])
    assert distance(grads[0], exact[1][0]) <= 1.1 * distance(by_torch[1][0], exact[1][0])


def test_branches_with_hooks_get_what_upstream_gives_them(as_on_gpu):
    ours, seen = block(), []
    ours.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    by_torch = step(ours, autocast=True)
    as_on_gpu()
    y, _ = step(ours, autocast=True)
    assert torch.equal(y, by_torch[0])
    assert torch.equal(seen[0], seen[1])


def test_it_runs_on_the_meta_device():
    ours = block().to("meta")
    x = torch.empty(BATCH, FRAMES, WIDTH, device="meta")
    y = ours(x, position_embeddings=torch.empty(1, 2 * FRAMES - 1, WIDTH, device="meta"))
    assert y.shape == x.shape
