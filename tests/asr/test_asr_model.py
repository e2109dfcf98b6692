# SPDX-License-Identifier: Apache-2.0
"""Recognisers without upstream's package: the calls they refuse, time warping, consistency-regularised CTC."""

import types

import numpy
import pytest
import torch
from steps import seeded

from fastasr.asr import recogniser
from fastasr.asr.recogniser.time_warp import time_warp

TINY = {
    "feature_dim": 20,
    "downsampling_factor": (1, 2),
    "encoder_dim": (16, 24),
    "num_encoder_layers": 1,
    "encoder_unmasked_dim": 16,
    "query_head_dim": 6,
    "value_head_dim": 4,
    "num_heads": 2,
    "feedforward_dim": 24,
    "cnn_module_kernel": 5,
    "pos_dim": 12,
    "vocab_size": 9,
    "decoder_dim": 16,
    "joiner_dim": 20,
}


@pytest.fixture(scope="module")
def model():
    seeded(0)
    return recogniser.AsrModel(**TINY, use_ctc=True)


def test_arguments_are_ints_tuples_or_strings(model):
    text = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in TINY.items()}
    other = recogniser.AsrModel(**text, use_ctc=True)
    other.load_state_dict(model.state_dict(), strict=True)


def test_gradients_reach_every_parameter(model):
    losses = model.train()(torch.randn(2, 60, 20), torch.tensor([60, 50]), [[1, 2], [3]])
    (losses[0] + losses[1] + losses[2]).backward()
    assert losses[3].numel() == losses[4].numel() == 0
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not [name for name in without if "bypass" not in name], without


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, n: m(x, n, [[1], [9]]), r"tokens must be in \[0, 9\), got 9"),
        (lambda m, x, n: m(x, n, [[1], [-1]]), r"got -1"),
        (lambda m, x, n: m(x, n, [[1]]), "and 1 lists"),
        (lambda m, x, n: m(x[0], n, [[1], [2]]), r"got shapes \(60, 20\)"),
        (lambda m, x, n: m(x, n.new_tensor([60, 8]), [[1], [2]]), "needs 9 frames"),
        (lambda m, x, n: m(x, n, [[1], [2]], use_cr_ctc=True, use_spec_aug=True), "spec_augment"),
    ],
    ids=["token", "negative token", "lists", "shape", "short", "spec_augment"],
)
def test_bad_inputs(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, torch.randn(2, 60, 20), torch.tensor([60, 50]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recogniser.AsrModel(use_transducer=False), "use_transducer or use_ctc"),
        (lambda: recogniser.Decoder(5, 8, 5, 2), r"blank_id must be in \[0, 5\)"),
        (lambda: recogniser.Decoder(5, 6, 0, 2), "multiple of 4"),
        (lambda: recogniser.Decoder(5, 8, 0, 0), "context_size"),
        (
            lambda: recogniser.Decoder(5, 8, 0, 2)(torch.zeros(1, 3), need_pad=False),
            "must have context_size = 2",
        ),
        (
            lambda: recogniser.Joiner(4, 4, 4, 5)(torch.zeros(1, 4), torch.zeros(1, 1, 4)),
            "as many dimensions",
        ),
        (lambda: recogniser.MultiHeadAttention(8, 9, 2), "multiple of num_heads"),
        (lambda: recogniser.LabelSmoothingLoss(label_smoothing=1.0), "label_smoothing"),
        (lambda: recogniser.LabelSmoothingLoss(reduction="max"), "'max'"),
        (lambda: recogniser.DecoderLayer(8, 8, 2, 8, 8)(torch.zeros(1, 1, 8)), "memory"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_row_that_sees_nothing_is_the_output_bias():
    attention = recogniser.MultiHeadAttention(8, 8, 2)
    x = torch.randn(3, 1, 8)
    y = attention(x, x, x, key_padding_mask=torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(y, attention.out_proj.bias.expand(3, 1, 8))


def test_time_warp():
    x = torch.randn(2, 60, 4)
    numpy.random.seed(0)
    y = time_warp(x, p=1.0, time_warp_factor=10, supervision_segments=torch.tensor([[0, 0, 60], [1, 5, 40]]))
    assert y.shape == x.shape
    assert not torch.equal(y[0], x[0])
    assert torch.equal(y[1, :5], x[1, :5])
    assert torch.equal(y[1, 45:], x[1, 45:])
    assert not torch.equal(y[1, 5:45], x[1, 5:45])
    constant = time_warp(torch.ones(1, 60, 4), p=1.0, time_warp_factor=10)
    torch.testing.assert_close(constant, torch.ones(1, 60, 4))
    assert time_warp(x, time_warp_factor=None) is x
    assert torch.equal(time_warp(x[:, :15], p=1.0, time_warp_factor=10), x[:, :15])  # too short


def test_consistency_of_two_masked_copies(model):
    """With equal copies, in eval mode, the consistency loss is 0; with two different masks it is not."""
    model.eval()
    x, lengths, y = torch.randn(2, 60, 20), torch.tensor([60, 50]), [[1, 2], [3]]
    tokens = [list(t) for t in y]
    with torch.no_grad():
        plain = model(x, lengths, y)
        same = model(x, lengths, y, use_cr_ctc=True)

        class Mask(types.SimpleNamespace):
            def __call__(self, x):
                x = x.clone()
                x[: x.shape[0] // 2, 10:30] = 0
                return x

        segments = torch.tensor([[0, 0, 60], [1, 0, 50]])
        arguments = {"use_cr_ctc": True, "use_spec_aug": True, "supervision_segments": segments}
        masked = model(x, lengths, y, spec_augment=Mask(time_warp_factor=0), time_warp_factor=0, **arguments)
        with pytest.raises(ValueError, match="must not warp time"):
            model(x, lengths, y, spec_augment=Mask(time_warp_factor=80), **arguments)
    assert y == tokens  # upstream doubles the caller's list
    torch.testing.assert_close(same[:3], plain[:3])
    assert abs(float(same[4])) < 1e-4
    assert float(masked[4]) > 100 * abs(float(same[4])) + 1e-4
