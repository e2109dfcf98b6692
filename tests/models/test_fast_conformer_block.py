# SPDX-License-Identifier: Apache-2.0
"""The FastConformer block as a GPU computes it, with ``ops.add_norm``, against its norms and residuals by torch."""

from functools import partial

import pytest
import torch
from steps import close, moved, numbers, relative, seeded

from fastasr import ops
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
    close(others, grads, 1e-12, least=1e-2)  # some, as that of the keys' bias, are 0 but for rounding


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
    assert relative(y, exact[0]) <= 1.1 * relative(by_torch[0], exact[0])
    assert relative(grads[0], exact[1][0]) <= 1.1 * relative(by_torch[1][0], exact[1][0])


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


@pytest.fixture
def joints(monkeypatch):
    """Returns the first norms that one kernel computes with the last norm of the block before, as they are made."""
    found, op = [], ops.add_two_norms
    monkeypatch.setattr(ops, "add_two_norms", lambda *args: (found.append(args[4]), op(*args))[1])
    return found


def encoder(**rates):
    still = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout", "layer_drop"), 0.0)
    seeded(0)
    sizes = {"mel_bins": 16, "width": WIDTH, "layers": 3, "heads": 3, "hidden": 40, "channels": 4}
    return moved(fast_conformer.FastConformerEncoder(**sizes, **still | rates), 0.1).train()


def step_of_encoder(encoder, autocast=False):
    x = torch.randn(BATCH, 8 * FRAMES, 16, generator=numbers(1)).to(encoder.subsampling.linear.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = encoder(x)[0]
    return y, torch.autograd.grad(y.float().sin().sum(), list(encoder.layers.parameters()))


def test_one_kernel_computes_two_norms_between_blocks(as_on_gpu, joints):
    y, grads = step_of_encoder(encoder().double())
    assert not joints
    as_on_gpu()
    ours = encoder().double()
    found, others = step_of_encoder(ours)
    assert list(map(id, joints)) == [id(layer.norm_feed_forward1.weight) for layer in ours.layers[1:]]
    close(found, y, 1e-12)
    close(others, grads, 1e-10, least=1e-2)


def test_two_norms_between_blocks_under_autocast(as_on_gpu, joints):
    exact = step_of_encoder(encoder())
    as_on_gpu()
    found = step_of_encoder(encoder(), autocast=True)
    assert len(joints) == 2
    apart = encoder()
    for layer in apart.layers:
        layer.register_forward_hook(lambda *args: None)
    expected = step_of_encoder(apart, autocast=True)
    assert len(joints) == 2
    assert found[0].dtype == torch.float32
    # They differ by how often one of them rounds to the next number of 16 bits.
    assert relative(found[0], expected[0]) <= 0.5 * relative(expected[0], exact[0])
    for a, b, c in zip(found[1], expected[1], exact[1], strict=True):
        assert a.dtype == b.dtype == torch.float32
        if c.norm() > 1e-3:
            assert relative(a, b) <= 0.5 * relative(b, c)


CHANGES = {
    "a hook": lambda layer: layer.register_forward_hook(lambda *args: None),
    "a hook of the first branch": lambda layer: layer.feed_forward1.register_forward_hook(lambda *args: None),
    "checkpointing": lambda layer: setattr(layer, "gradient_checkpointing", True),
    "a forward": lambda layer: setattr(layer, "forward", partial(type(layer).forward, layer)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_block_is_called(change, as_on_gpu, joints):
    ours = encoder()
    CHANGES[change](ours.layers[2])
    as_on_gpu()
    step_of_encoder(ours, autocast=True)
    assert list(map(id, joints)) == [id(ours.layers[1].norm_feed_forward1.weight)]


def test_blocks_that_are_left_out_have_no_followers(as_on_gpu, joints):
    as_on_gpu()
    ours = encoder(layer_drop=0.5)
    expected = 0
    for _ in range(8):
        state = torch.get_rng_state()
        ran = sum(torch.rand([]).item() >= 0.5 for _ in range(3))
        torch.set_rng_state(state)
        ours(torch.randn(1, 8 * FRAMES, 16, generator=numbers(1)))
        expected += max(0, ran - 1)
        assert len(joints) == expected
