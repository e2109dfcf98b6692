# SPDX-License-Identifier: Apache-2.0
"""A GPU leaves out upstream's values of padding queries. Nothing that a valid frame depends on reads them."""

import copy

import pytest
import torch
from steps import close, cotangent, seeded

import fastasr
from fastasr.models.common.ragged import padded
from fastasr.models.fast_conformer import FastConformerCTC, FastConformerEncoder, attention, block, masks

BINS, FRAMES, LENGTHS = 16, 80, (80, 45, 1, 0)


@pytest.fixture(autouse=True)
def norms_by_torch(monkeypatch):
    """A GPU adds and normalises by a kernel, which rounds otherwise."""
    monkeypatch.setattr(block, "_is_fused", lambda *arguments: False)


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr(masks, "on_gpu", lambda device: True)


@pytest.fixture
def means(monkeypatch):
    """The calls of ``mean_of_values``."""
    calls, mean = [], attention.mean_of_values
    monkeypatch.setattr(attention, "mean_of_values", lambda *arguments: calls.append(1) or mean(*arguments))
    return calls


def encoder(**options):
    seeded(0)
    rates = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout", "layer_drop"), 0.1)
    sizes = {"mel_bins": BINS, "width": 24, "layers": 3, "heads": 2, "hidden": 40, "channels": 8, "factor": 4}
    return FastConformerEncoder(**sizes, **rates, **options).double()


def step(model, seed=1):
    """Returns values at valid frames, their gradients by all parameters and features, and BatchNorm's statistics."""
    model = copy.deepcopy(model)
    seeded(seed)
    x = torch.randn(len(LENGTHS), FRAMES, BINS, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(FRAMES) < torch.tensor(LENGTHS)[:, None]
    y, mask = model(x, valid)
    found = y[mask]
    seeded(seed)
    gradients = torch.autograd.grad(found, [x, *model.parameters()], cotangent(found), allow_unused=True)
    return y, [found, *(g for g in gradients if g is not None), *model.buffers()]


@pytest.mark.parametrize("head", [False, True], ids=["encoder", "with a CTC head"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_valid_frames_are_the_same_to_the_bit(training, head, means, monkeypatch):
    model = (FastConformerCTC(encoder(), 7).double() if head else encoder()).train(training)
    y, expected = step(model)
    assert means
    means.clear()
    monkeypatch.setattr(masks, "on_gpu", lambda device: True)
    other, found = step(model)
    assert not means
    assert not torch.equal(y, other)  # at padding
    assert other.isfinite().all()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_verify_sees_upstreams_values(as_on_gpu, means):
    model = encoder().train()
    with padded():
        y, _ = step(model)
    assert means
    assert not torch.equal(y, step(model)[0])


def test_rows_without_keys_of_other_masks_are_upstreams(as_on_gpu, means):
    """Only a mask of lengths says that such a row is padding."""
    model = encoder().eval()
    block, x = model.layers[0], torch.randn(1, 7, 24, dtype=torch.float64)
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    mask[0, 0, 3] = False
    block(x, mask, model.encode_positions(x))
    assert len(means) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_formed_weights_of_rows_without_keys(dtype):
    """The content of such a row, added to float16's lowest number, would be infinite."""
    seeded(0)
    module = attention.FastConformerAttention(24, 2).to(dtype)
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[:, 0, 3] = False
    q, k, v = (30 * torch.randn(2, 9, 2, 12).to(dtype) for _ in range(3))
    y = attention._with_weights(module, q, k, v, torch.randn(2, 17, 2, 12).to(dtype), mask, 0.0, True)
    assert y.isfinite().all()
    close(y[:, 3], v.mean(1), 4 * torch.finfo(dtype).eps)


def test_the_mask_is_not_waited_for(as_on_gpu):
    valid = torch.ones(2, 5, dtype=torch.bool)
    by = masks.seen(valid)
    assert by.by_length
    assert not by.empty_rows.any()
    assert masks.seen(valid) is by


def test_a_mask_of_a_window():
    """The window and hidden keys say what the mask does, or the mask stays."""
    offsets = torch.arange(9) - torch.arange(9)[:, None]
    within = (offsets >= -3) & (offsets <= 1)
    mask = (within & (torch.arange(9) < torch.tensor([9, 6])[:, None, None])).unsqueeze(1)
    by = masks.seen(mask.clone(), window=(3, 1))
    hidden = masks.of_kernel(mask, by)
    assert (hidden.pop("context"), hidden.pop("chunk_size")) == ((3, 1), 1)
    assert hidden["key_padding_mask"].sum(1).tolist() == [0, 3]
    assert masks.seen(mask.clone(), window=(3, 2)).context == {}
    assert masks.seen(mask.clone()).context == {}


def test_gradients_of_rows_without_keys_in_16_bits():
    """Products of 16 bits stand for the gradient of a softmax, which upstream computes in float32."""
    seeded(0)
    leaves = [t.requires_grad_() for t in torch.randn(3, 2, 300, 2, 12).bfloat16()]

    def gradients(dtype):
        with torch.autocast("cpu", torch.bfloat16):
            y = attention.mean_of_values(*(t.to(dtype) for t in leaves), 0.0)
        return torch.autograd.grad(y, leaves, cotangent(y))

    for found, exact in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert (found - exact).norm() < 1e-3 * exact.norm()


def test_second_derivatives_of_rows_without_keys():
    """The eager backend serves gradients of gradients."""
    seeded(0)
    leaves = [t.requires_grad_() for t in torch.randn(3, 2, 7, 2, 12).double()]

    def masked(q, k, v, bias):
        scores = torch.einsum("bthd,bjhd->bhtj", q + bias, k) * 12**-0.5 + torch.finfo(q.dtype).min
        return torch.einsum("bhtj,bjhe->bthe", scores.softmax(-1), v)

    def second(function):
        with fastasr.backend("eager"):
            y = function(*leaves, 0.3)
        first = torch.autograd.grad(y, leaves, cotangent(y), create_graph=True)
        total = sum((t * cotangent(t, "second")).sum() for t in first)
        return [y.expand(2, 7, 2, 12).detach(), *first, *torch.autograd.grad(total, leaves)]

    close(second(attention.mean_of_values), second(masked), 1e-12)
