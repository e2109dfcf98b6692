# SPDX-License-Identifier: Apache-2.0
"""``rnnt.ctc_loss`` against torch's in float64: values, gradients, defined results and errors."""

import math

import pytest
import torch

import fastasr
from fastasr import rnnt
from fastasr.rnnt import rows

CASES = {
    "ragged": ([6, 3, 9, 5], [[1, 3], [4], [5, 1, 2, 1], []]),
    "equal neighbours": ([9, 8, 5, 4], [[1, 1, 1], [3, 3, 1, 1, 4], [2, 2, 2], [4, 5, 4]]),
    "just enough frames": ([3, 5, 1], [[1, 2, 3], [1, 1, 1], [2]]),
    "too few frames": ([2, 4, 0, 0], [[1, 2, 3], [1, 1, 1], [2], []]),
    "no labels": ([2, 0], [[], []]),
}


def problem(case, blank=0, classes=6, dtype=torch.float64):
    lengths, labels = CASES[case]
    longest = max(lengths)
    most = max(map(len, labels))
    targets = torch.full((len(labels), most), -1)  # padding may be anything
    for row, one in zip(targets, labels, strict=True):
        row[: len(one)] = (
            torch.tensor(one, dtype=torch.int64).sub(1 - (blank + 1)) % classes if one else row[:0]
        )
    logits = torch.randn(len(lengths), longest, classes, dtype=dtype)
    return logits, targets, torch.tensor(lengths), torch.tensor([len(one) for one in labels])


def of_torch(logits, targets, lengths, ends, blank, **options):
    log_probs = logits.double().log_softmax(-1).transpose(0, 1)
    return torch.nn.functional.ctc_loss(log_probs, targets.clamp(min=0), lengths, ends, blank, **options)


def value_and_gradient(call, logits):
    logits = logits.detach().clone().requires_grad_()
    loss = call(logits)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (grad,) = torch.autograd.grad((torch.where(loss.isfinite(), loss, 0.0) * weights).sum(), logits)
    return loss.detach(), grad


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("blank", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_as_torch(case, blank, packed):
    logits, targets, lengths, ends = problem(case, blank)
    expected, of_frames = value_and_gradient(
        lambda x: of_torch(x, targets, lengths, ends, blank, reduction="none"), logits
    )
    behind = torch.arange(logits.shape[1]) >= lengths[:, None]
    unreachable = expected.isinf()
    of_frames[behind | unreachable[:, None]] = 0.0  # torch's is NaN where there is no path
    if packed:
        total = int(lengths.sum())
        frames, _ = fastasr.packed(logits, lengths, total + 3)
        frames[total:] = math.nan
        found, grad = value_and_gradient(
            lambda x: rnnt.ctc_loss(
                fastasr.PackedFrames(x, lengths),
                targets,
                None,
                ends,
                blank,
                "none",
                longest=logits.shape[1] + 1,
            ),
            frames,
        )
        assert not grad[total:].any()  # a NaN counts as any
        grad = fastasr.PackedFrames(grad, lengths).unpacked(logits.shape[1])
    else:
        logits[behind] = math.nan
        found, grad = value_and_gradient(
            lambda x: rnnt.ctc_loss(x, targets, lengths, ends, blank, "none"), logits
        )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad, of_frames, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", ["ragged", "too few frames"])
def test_reductions(case, reduction, zero_infinity):
    logits, targets, lengths, ends = problem(case)
    options = {"reduction": reduction, "zero_infinity": zero_infinity}
    expected = of_torch(logits, targets, lengths, ends, 0, **options)
    packed = fastasr.packed(logits, lengths)
    torch.testing.assert_close(rnnt.ctc_loss(packed, targets, None, ends, **options), expected)


def test_random_problems():
    lengths, ends = torch.randint(0, 30, (8,)), torch.randint(0, 9, (8,))
    targets = torch.randint(1, 4, (8, 9))  # equal neighbours are frequent
    logits = torch.randn(8, 30, 4, dtype=torch.float64)
    packed = fastasr.packed(logits, lengths)
    expected = of_torch(logits, targets, lengths, ends, 0, reduction="none")
    torch.testing.assert_close(rnnt.ctc_loss(packed, targets, None, ends, 0, "none"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    logits, targets, lengths, ends = problem("ragged", dtype=dtype)
    expected, of_frames = value_and_gradient(
        lambda x: of_torch(x, targets, lengths, ends, 0, reduction="none"), logits
    )
    found, grad = value_and_gradient(
        lambda x: rnnt.ctc_loss(fastasr.packed(x, lengths), targets, None, ends, 0, "none"), logits
    )
    assert found.dtype is torch.float32
    assert grad.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, of_frames)


def test_log_probabilities_stand_for_logits():
    logits, targets, lengths, ends = problem("ragged")
    call = targets, lengths, ends, 0, "none"
    torch.testing.assert_close(rnnt.ctc_loss(logits.log_softmax(-1), *call), rnnt.ctc_loss(logits, *call))


def test_slices_do_not_show(monkeypatch):
    logits, targets, lengths, ends = problem("equal neighbours")
    packed = fastasr.packed(logits, lengths)

    def run():
        return value_and_gradient(
            lambda x: rnnt.ctc_loss(packed._replace(frames=x), targets, None, ends), packed.frames
        )

    expected = run()
    monkeypatch.setattr(rows, "_SLICE_BYTES", {"cpu": 1})
    torch.testing.assert_close(run(), expected, rtol=1e-12, atol=1e-12)


def test_compiled_without_a_break():
    logits, targets, lengths, ends = problem("equal neighbours")
    packed = fastasr.packed(logits, lengths, 30)

    def loss(x):
        return rnnt.ctc_loss(packed._replace(frames=x), targets, None, ends, longest=9)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradient(compiled, packed.frames), value_and_gradient(loss, packed.frames)
    )


def test_under_transforms():
    logits, targets, lengths, ends = problem("ragged")
    packed = fastasr.packed(logits, lengths)

    def loss(x):
        return rnnt.ctc_loss(packed._replace(frames=x), targets, None, ends, longest=9)

    _, expected = value_and_gradient(loss, packed.frames)
    torch.testing.assert_close(torch.func.grad(loss)(packed.frames) * 0.5, expected)


def refused(message, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=f"fastasr.rnnt.ctc_loss: {message}"):
        rnnt.ctc_loss(*arguments, **options)


def test_refused():
    logits, targets, lengths, ends = problem("ragged")
    packed = fastasr.packed(logits, lengths)
    refused("logits: expected a torch.Tensor, got list", [1.0], targets, lengths, ends, error=TypeError)
    refused(
        "logit_lengths: expected None, because packed frames have lengths", packed, targets, lengths, ends
    )
    refused(r"target_lengths: expected lengths in \[0, 4\]", packed, targets, None, ends + 1)
    refused(r"logit_lengths: expected lengths in \[0, 9\]", logits, targets, lengths + 1, ends)
    refused(r"blank: expected a class in \[0, 6\), got 6", packed, targets, None, ends, 6)
    refused("targets: expected labels other than blank", packed, targets, None, ends, 1)
    refused(r"symbols: expected classes in \[0, 6\)", packed, targets + 5, None, ends)
    refused("reduction: expected one of none, mean, sum, got 'all'", packed, targets, None, ends, 0, "all")
    refused(
        "zero_infinity: expected a bool, got int",
        packed,
        targets,
        None,
        ends,
        error=TypeError,
        zero_infinity=1,
    )
