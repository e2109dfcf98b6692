# SPDX-License-Identifier: Apache-2.0
"""The transducer losses of other packages by their signatures, against the packages where they run."""

import sys

import pytest
import torch
from steps import cotangent

import fastasr.compat.torchaudio
from fastasr import rnnt
from fastasr.compat import nemo, torchaudio, transformers, warp_rnnt


def problem(blank=6):
    logits = torch.randn(3, 9, 5, 7, requires_grad=True)
    targets = torch.randint(0, 6, (3, 4), dtype=torch.int32) + (blank == 0)
    frames, symbols = (torch.tensor(n, dtype=torch.int32) for n in ([9, 6, 7], [4, 2, 3]))
    return logits, targets, frames, symbols


def ours(logits, targets, frames, symbols, blank=6):
    """Returns the losses by k2's function, which other tests compare with k2's goldens."""
    boundary = torch.stack((torch.zeros(3), torch.zeros(3), symbols, frames), 1).long()
    return rnnt.rnnt_loss(logits, targets.long(), blank, boundary, reduction="none")


def by_hand(logits, targets, frames, symbols, fused):
    """Returns the losses in float64 by the recursion itself, cell by cell; blank is the last class."""
    logprobs = logits.double().log_softmax(-1) if fused else logits.double()
    losses = []
    for scores, labels, stop, end in zip(logprobs, targets, frames.tolist(), symbols.tolist(), strict=True):
        alpha = {(0, 0): scores.new_zeros(())}
        for t, s in [(t, s) for t in range(stop) for s in range(end + 1) if t or s]:
            arcs = [alpha[t - 1, s] + scores[t - 1, s, -1]] if t else []
            arcs += [alpha[t, s - 1] + scores[t, s - 1, labels[s - 1]]] if s else []
            alpha[t, s] = torch.stack(arcs).logsumexp(0)
        losses.append(-alpha[stop - 1, end] - scores[stop - 1, end, -1])
    return torch.stack(losses)


def _upstream():
    """Returns torchaudio's own loss, or None where there is no torchaudio with a binary for this torch."""
    try:
        from torchaudio.functional import rnnt_loss
    except (ImportError, OSError):
        return None
    return rnnt_loss if hasattr(torch.ops.torchaudio, "rnnt_loss_forward") else None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clamp", [-1, 0.05])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_torchaudio(reduction, clamp, fused):
    call = problem()
    if not fused:
        call = (call[0].detach().log_softmax(-1).requires_grad_(), *call[1:])
    loss = torchaudio.rnnt_loss(*call, clamp=clamp, reduction=reduction, fused_log_softmax=fused)
    weights = cotangent(loss)
    (found,) = torch.autograd.grad(loss, call[0], weights)
    losses = by_hand(*call, fused)
    expected = {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]
    torch.testing.assert_close(loss, expected.float())
    (gradient,) = torch.autograd.grad(losses.sum(), call[0])  # of each loss, which is what upstream clamps
    gradient = gradient.clamp(-clamp, clamp) if clamp > 0 else gradient
    gradient = gradient * weights.view(-1, 1, 1, 1) / (3 if reduction == "mean" else 1)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    upstream = _upstream()
    if upstream is None:
        return
    theirs = upstream(*call, blank=6, clamp=clamp, reduction=reduction, fused_log_softmax=fused)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(theirs, call[0], weights)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clamp", [-1, 0.05])
@pytest.mark.parametrize("apart", [False, True], ids=["rows", "classes apart"])
def test_torchaudio_in_place(fused, clamp, apart):
    leaf, *rest = problem()
    options = {"blank": 6, "clamp": clamp, "reduction": "sum", "fused_log_softmax": fused}
    (expected,) = torch.autograd.grad(torchaudio.rnnt_loss(leaf, *rest, **options), leaf)

    def logits():
        return (leaf.transpose(1, 3) * 1).transpose(1, 3) if apart else leaf * 1

    given = logits()
    loss = torchaudio.RNNTLoss(**options, in_place=True)(given, *rest)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)
    if not (apart and fused):  # torch's copy of these takes the place
        torch.testing.assert_close(given.detach(), expected)
    given = logits()
    other = given.square().sum()  # whose backward pass comes second and needs the logits
    loss = other + torchaudio.rnnt_loss(given, *rest, **options, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torchaudio_in_place_needs_memory_of_its_own():
    logits, *rest = problem()
    with pytest.raises(ValueError, match="in_place: expected logits whose elements have memory of their own"):
        torchaudio.rnnt_loss(logits[:1].expand(3, -1, -1, -1), *rest, in_place=True)


def test_torchaudio_as_a_module_with_a_blank_in_front():
    call = problem(blank=0)
    loss = torchaudio.RNNTLoss(blank=0, reduction="sum")(*call)
    torch.testing.assert_close(loss, ours(*call, blank=0).sum())


@pytest.mark.parametrize("blank", [7, -8])
@pytest.mark.parametrize(
    "loss",
    [
        lambda blank, call: torchaudio.rnnt_loss(*call, blank),
        lambda blank, call: transformers.rnnt_loss(*call, blank),
        lambda blank, call: nemo.RNNTLoss(blank)(*call),
        lambda blank, call: warp_rnnt.rnnt_loss(*call, blank=blank),
    ],
    ids=["torchaudio", "transformers", "NeMo", "warp-rnnt"],
)
def test_a_blank_that_is_no_class(loss, blank):
    with pytest.raises(ValueError, match=rf"blank: expected a class in \[0, 7\), got {blank}"):
        loss(blank, problem())


def test_install_and_uninstall(monkeypatch):
    for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
        monkeypatch.setitem(sys.modules, name, None)  # as where there is none
    for name in ("torchaudio", "torchaudio.functional", "torchaudio.transforms"):
        del sys.modules[name]
    monkeypatch.setattr(
        fastasr.compat.torchaudio.importlib,
        "import_module",
        lambda path: (_ for _ in ()).throw(ImportError(path)),
    )
    torchaudio.install()
    torchaudio.install()
    import torchaudio as installed

    try:
        assert installed.functional.rnnt_loss is torchaudio.rnnt_loss
        from torchaudio.transforms import RNNTLoss

        assert RNNTLoss is torchaudio.RNNTLoss
    finally:
        torchaudio.uninstall()
    assert "torchaudio" not in sys.modules


@pytest.mark.parametrize("reduction", ["mean_volume", "mean_batch", "mean", "sum", "none"])
def test_transformers_and_nemo(reduction):
    call = problem()
    losses, lengths = ours(*call), call[3].float()
    expected = {
        "mean_volume": losses.sum() / lengths.sum(),
        "mean_batch": losses.mean(),
        "mean": (losses / lengths).mean(),
        "sum": losses.sum(),
        "none": losses,
    }[reduction]
    torch.testing.assert_close(transformers.rnnt_loss(*call, 6, reduction), expected)
    torch.testing.assert_close(transformers.ParakeetForRNNTLoss(*call, 6, reduction, other=1), expected)
    torch.testing.assert_close(nemo.RNNTLoss(6, reduction)(*call), expected)


def test_nemos_tdt():
    call, durations = problem(), [0, 1, 2]
    steps = torch.randn(3, 9, 5, 3)
    both = torch.cat((call[0], steps), -1)
    loss = nemo.RNNTLoss(6, "mean_batch", "tdt", {"durations": durations, "sigma": 0.02})
    expected = rnnt.tdt_loss(call[0], steps, *call[1:], 6, durations, 0.02, "mean_batch")
    torch.testing.assert_close(loss(both, *call[1:]), expected)
    torch.testing.assert_close(transformers.ParakeetForTDTLoss(
        call[0], steps, *call[1:], 6, durations, 0.02, "mean_batch", other=1), expected)  # fmt: skip
    plain = nemo.RNNTLoss(6, "sum", "tdt", {"durations": durations, "sigma": 0.02, "omega": 1.1})
    torch.testing.assert_close(plain(both, *call[1:]), ours(*call).sum())
    fast = nemo.RNNTLoss(6, "sum", loss_kwargs={"fastemit_lambda": 0.25})
    torch.testing.assert_close(fast(*call), 1.25 * ours(*call).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_name": "ctc"}, "loss_name: expected one of default"),
        ({"reduction": "average"}, "reduction: expected one of mean_volume"),
        ({"loss_kwargs": {"sigma": 0.1}}, "loss_kwargs: expected one of fastemit_lambda, clamp, got 'sigma'"),
        ({"loss_name": "tdt"}, "loss_kwargs: expected durations for a TDT"),
    ],
    ids=["name", "reduction", "option", "durations"],
)
def test_nemos_loss_refuses_options_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=f"fastasr.compat.nemo.RNNTLoss: {message}"):
        nemo.RNNTLoss(6, **options)


def test_nemos_loss_cuts_off_padding_of_targets():
    logits, targets, *ends = problem()
    padded = torch.cat((targets, torch.zeros_like(targets)), 1)
    loss = nemo.RNNTLoss(6)
    torch.testing.assert_close(loss(logits, padded, *ends), loss(logits, targets, *ends))


def test_warp_rnnt():
    call = problem(blank=0)
    losses = ours(*call, blank=0)
    logprobs = call[0].log_softmax(-1)
    torch.testing.assert_close(warp_rnnt.rnnt_loss(logprobs, *call[1:]), losses)
    torch.testing.assert_close(warp_rnnt.rnnt_loss(logprobs, *call[1:], reduction="mean"), losses.mean())
    averaged = warp_rnnt.rnnt_loss(logprobs, *call[1:], average_frames=True, reduction="sum")
    torch.testing.assert_close(averaged, (losses / call[2]).sum())


def test_speechbrains_joint_with_its_output_layer():
    """What a recipe computes of both: the joint's sum, an output layer of its own, and the loss of the logits."""
    joints = pytest.importorskip("speechbrain.nnet.transducer.transducer_joint")
    linear = pytest.importorskip("speechbrain.nnet.linear")
    _, targets, frames, symbols = problem(blank=0)
    encoded, predicted = (torch.randn(3, n, 10, requires_grad=True) for n in (9, 5))
    joint = joints.Transducer_joint(joint="sum", nonlinearity=torch.nn.Tanh)
    output = linear.Linear(7, input_size=10)
    logits = output(joint(encoded[:, :, None], predicted[:, None]))
    expected = torchaudio.rnnt_loss(logits, targets, frames, symbols, blank=0, reduction="sum")
    boundary = torch.stack((torch.zeros(3), torch.zeros(3), symbols, frames), 1).long()
    call = encoded, predicted, output.w.weight, output.w.bias, targets.long(), 0, boundary
    loss = rnnt.joiner_loss(*call, reduction="sum")
    torch.testing.assert_close(loss, expected)
    leaves = encoded, predicted, *output.parameters()
    for ours_, theirs in zip(*(torch.autograd.grad(x, leaves) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)
