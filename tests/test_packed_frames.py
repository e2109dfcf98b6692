# SPDX-License-Identifier: Apache-2.0
"""``fastasr.packed`` and ``PackedFrames.unpacked`` against loops over recordings."""

import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastasr
from fastasr.models.e_branchformer import EBranchformerEncoder
from fastasr.models.fast_conformer import FastConformerEncoder
from fastasr.models.zipformer import Conv2dSubsampling, Zipformer
from fastasr.testing.tape import TapeRecorder

CASES = {
    "ragged": ((2, 5, 3), None),
    "exactly full": ((4, 4), 8),
    "frames of nobody": ((3, 1, 4), 20),
    "without frames": ((0, 3, 0, 0, 2, 0), 9),
    "one frame": ((1,), 1),
    "only empty ones": ((0, 0), 4),
    "nothing": ((), 3),
}


def problem(lengths, *width, dtype=torch.float64):
    """Returns a batch, NaN behind the ends, and its lengths."""
    longest = max(lengths, default=0) + 2
    batch = torch.full((len(lengths), longest, *width), math.nan, dtype=dtype)
    for one, length in zip(batch, lengths, strict=True):
        one[:length] = torch.randn(length, *width, dtype=dtype)
    return batch, torch.tensor(lengths, dtype=torch.int64)


def frames_of(batch, lengths):
    return torch.cat(
        [batch[:0].flatten(0, 1), *(x[:n] for x, n in zip(batch, lengths.tolist(), strict=True))]
    )


@pytest.mark.parametrize("width", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, width):
    lengths, frames = CASES[case]
    batch, lengths = problem(lengths, *width)
    total = int(lengths.sum())
    found = fastasr.packed(batch, lengths.int(), frames)
    assert found.lengths.dtype is torch.int64
    assert torch.equal(found.lengths, lengths)
    assert len(found.frames) == (total if frames is None else frames)
    assert torch.equal(found.frames[:total], frames_of(batch, lengths))
    assert not found.frames[total:].any()
    assert torch.equal(found.begins, lengths.cumsum(0) - lengths)
    of_others = found._replace(
        frames=found.frames.index_fill(0, torch.arange(total, len(found.frames)), math.nan)
    )
    assert torch.equal(of_others.unpacked(batch.shape[1]), batch.nan_to_num(0.0))


@pytest.mark.parametrize("case", CASES)
def test_gradients(case):
    lengths, frames = CASES[case]
    batch, lengths = problem(lengths, 3)
    batch.requires_grad_()
    rows = fastasr.packed(batch, lengths, frames).frames
    weights = torch.randn_like(rows)
    total = int(lengths.sum())
    weights[total:] = math.nan  # their gradient reaches nobody
    (grad,) = torch.autograd.grad(rows, batch, weights)
    assert torch.equal(frames_of(grad, lengths), weights[:total])
    assert torch.equal(grad, fastasr.PackedFrames(weights, lengths).unpacked(batch.shape[1]))

    rows = torch.randn(len(rows) + 1, 3, dtype=torch.float64, requires_grad=True)
    unpacked = fastasr.PackedFrames(rows, lengths).unpacked(batch.shape[1])
    weights = torch.full_like(unpacked, math.nan)
    for one, n in zip(weights, lengths.tolist(), strict=True):
        one[:n] = torch.randn(n, 3)
    (grad,) = torch.autograd.grad(unpacked, rows, weights)
    assert torch.equal(grad[:total], frames_of(weights, lengths))
    assert not grad[total:].any()


def test_under_transforms():
    batch, lengths = problem((2, 0, 3), 2)
    batch = batch.nan_to_num()

    def squares(batch):
        return fastasr.packed(batch, lengths, 7).frames.square().sum()

    expected = fastasr.packed(2 * batch, lengths, 7).unpacked(batch.shape[1])
    assert torch.equal(torch.func.grad(squares)(batch), expected)


def test_compiled_without_a_break():
    batch, lengths = problem((2, 0, 3), 2)

    def function(batch, lengths):
        found = fastasr.packed(batch, lengths, 7)
        return found.frames, found.unpacked(5)

    for one, other in zip(
        torch.compile(function, fullgraph=True, backend="aot_eager")(batch, lengths),
        function(batch, lengths),
        strict=True,
    ):
        assert torch.equal(one, other)


X = torch.zeros(2, 3, 4)
N = torch.tensor([1, 3])
REFUSED = {
    "list": (TypeError, ([1.0], N), "batch: expected a torch.Tensor, got list"),
    "one dimension": (ValueError, (torch.zeros(2), N), r"batch: expected shape \(B, T, ...\), got \(2,\)"),
    "floating lengths": (TypeError, (X, N.float()), "lengths: expected an integer tensor, got torch.float32"),
    "flags": (TypeError, (X, N > 1), "lengths: expected an integer tensor, got torch.bool"),
    "no tensor": (TypeError, (X, [1, 3]), "lengths: expected an integer tensor, got list"),
    "shape": (ValueError, (X, N[:1]), r"lengths: expected shape \(2,\), got \(1,\)"),
    "device": (ValueError, (X, N.to("meta")), "lengths: expected device cpu .that of batch., got meta"),
    "too long": (ValueError, (X, N + 1), r"lengths: expected lengths in \[0, 3\], got \[2, 4\]"),
    "negative": (ValueError, (X, N - 2), r"lengths: expected lengths in \[0, 3\], got \[-1, 1\]"),
    "capacity": (ValueError, (X, N, 3), r"lengths: expected lengths with a sum of at most 3 frames, got \[1, 3\]"),
    "no number": (TypeError, (X, N, 4.0), "frames: expected an int or None, got float"),
    "negative capacity": (ValueError, (X[:0], N[:0], -1), "frames: expected a number of at least 0, got -1"),
    "two dimensions": (ValueError, (X, N[:, None]), r"lengths: expected shape \(B,\), got \(2, 1\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    error, arguments, message = REFUSED[case]
    with pytest.raises(error, match=rf"fastasr.packed: {message}"):
        fastasr.packed(*arguments)


def test_unpacked_refuses():
    found = fastasr.packed(X, N)
    with pytest.raises(ValueError, match=r"PackedFrames.unpacked: lengths: expected lengths in \[0, 2\]"):
        found.unpacked(2)
    with pytest.raises(
        ValueError, match=r"PackedFrames.unpacked: lengths: expected lengths with a sum of at most 3"
    ):
        found._replace(frames=found.frames[:3]).unpacked(3)
    for longest, error in ((3.0, TypeError), (-1, ValueError)):
        with pytest.raises(error, match=f"PackedFrames.unpacked: longest: expected .*, got {longest}|float"):
            found.unpacked(longest)
    with pytest.raises(
        ValueError, match=r"PackedFrames.unpacked: lengths: expected device cpu \(that of frames\)"
    ):
        found._replace(lengths=N.to("meta")).unpacked(3)


F = torch.zeros(5, 4)
NO_FEATURES = {
    "floating lengths": (TypeError, (F, N.float()), "lengths: expected an integer tensor, got torch.float32"),
    "list": (TypeError, (F, [1, 3]), "lengths: expected an integer tensor, got list"),
    "flags": (TypeError, (F, N > 1), "lengths: expected an integer tensor, got torch.bool"),
    "no lengths": (TypeError, (F, None), "lengths: expected an integer tensor, got NoneType"),
    "two dimensions": (ValueError, (F, N[:, None]), r"lengths: expected shape \(B,\), got \(2, 1\)"),
    "one number": (ValueError, (F, N[0]), r"lengths: expected shape \(B,\), got \(\)"),
    "no recording": (ValueError, (F, N[:0]), r"lengths: expected shape \(B,\) with B >= 1, got \(0,\)"),
    "device": (ValueError, (F, N.to("meta")), r"lengths: expected device cpu \(that of frames\), got meta"),
    "too long": (ValueError, (F, N + 1), r"lengths: expected lengths with a sum of at most 5 frames, got \[2, 4\]"),
    "negative": (ValueError, (F, N - 2), r"lengths: expected lengths in \[0, 5\], got \[-1, 1\]"),
    "batch": (ValueError, (X, N), r"frames: expected shape \(N, features\), got \(2, 3, 4\)"),
    "whole numbers": (TypeError, (F.long(), N), "frames: expected a floating tensor, got torch.int64"),
    "rows of numbers": (TypeError, ([[1.0]], N), "frames: expected a floating tensor, got list"),
}  # fmt: skip


def encoders(features):
    sizes = {"downsampling_factor": (1, 2), "encoder_dim": (features, 8), "encoder_unmasked_dim": 4}
    zipformer = Zipformer(**sizes, num_encoder_layers=1, num_heads=1, feedforward_dim=8, cnn_module_kernel=7)
    yield zipformer, (None,)
    yield Conv2dSubsampling(features, 8), (None,)
    yield FastConformerEncoder(features, width=8, layers=1, heads=1, hidden=8, channels=4), ()
    yield EBranchformerEncoder(features, 8, attention_heads=1, cgmlp_linear_units=8, num_blocks=1), (None,)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("case", NO_FEATURES)
def test_encoders_refuse(case, recorded):
    error, given, message = NO_FEATURES[case]
    for encoder, more in encoders(16):
        encoder.ragged = True
        if recorded:
            options = fastasr.Graphs(frames=20, recordings=2, recorder=TapeRecorder)
            fastasr.accelerate(encoder.eval(), ragged=True, graphs=options)
        with pytest.raises(error, match=f"fastasr.PackedFrames: {message}"):
            encoder(fastasr.PackedFrames(*given), *more)


def test_lengths_of_few_bits():
    """Bytes, which have no -1: a recording without frames has none behind a front end."""
    frames = torch.randn(20, 16)
    lengths = torch.tensor([0, 20, 0])
    for encoder, more in encoders(16):
        encoder.eval().ragged = True
        with torch.no_grad():
            found = [
                encoder(fastasr.PackedFrames(frames, n), *more) for n in (lengths, lengths.to(torch.uint8))
            ]
        for one, other in zip(*map(tree_leaves, found), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("_", range(4))
def test_random_lengths(_):
    batch, lengths = problem(torch.randint(0, 6, (7,)).tolist(), 2, dtype=torch.float32)
    total = int(lengths.sum())
    found = fastasr.packed(batch, lengths, total + int(torch.randint(0, 4, ())))
    assert torch.equal(found.frames[:total], frames_of(batch, lengths))
    assert torch.equal(found.unpacked(batch.shape[1]), batch.nan_to_num())
