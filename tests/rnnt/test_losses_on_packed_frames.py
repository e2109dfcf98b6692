# SPDX-License-Identifier: Apache-2.0
"""Losses on packed frames against the same losses on the padded batch and on each recording alone."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import fastasr
from fastasr import rnnt
from fastasr.rnnt import additive
from fastasr.rnnt import lengths as by_lengths

WIDTH, CLASSES, BLANK = 5, 7, 2
DURATIONS = [0, 1, 2, 4]
LENGTHS = {
    "ragged": ([6, 3, 9, 5], [2, 1, 4, 0]),
    "without frames": ([0, 5, 0, 3], [0, 2, 1, 3]),
    "one frame": ([1], [1]),
    "equal": ([4, 4], [2, 2]),
}


@dataclass
class Problem:
    frames: Tensor  # (B, T, C), or packed (N, C)
    lm: Tensor  # (B, S + 1, C)
    weight: Tensor
    bias: Tensor
    symbols: Tensor
    lengths: Tensor
    ends: Tensor  # symbols of each recording

    @property
    def boundary(self):
        zero = torch.zeros_like(self.ends)
        return torch.stack((zero, zero, self.ends, self.lengths), 1)

    @property
    def joiner(self):
        return self.frames, self.lm, self.weight, self.bias, self.symbols

    def leaves(self):
        frames = self.frames.frames if isinstance(self.frames, fastasr.PackedFrames) else self.frames
        return [frames, self.lm, self.weight, self.bias]

    def logits(self, outputs):
        """Returns logits (B, T, S + 1, V) of a joiner, packed if the frames are, NaN at frames of nobody."""
        head = torch.nn.functional.linear
        if not isinstance(self.frames, fastasr.PackedFrames):
            return head(torch.tanh(self.frames.unsqueeze(2) + self.lm.unsqueeze(1)), outputs)
        frames, lengths = self.frames
        recording = torch.arange(len(lengths)).repeat_interleave(lengths)
        nobody = torch.arange(len(frames)) >= len(recording)
        lm = self.lm[torch.cat([recording, recording.new_zeros(len(frames) - len(recording))])]
        hidden = torch.tanh(frames.masked_fill(nobody[:, None], 0.0).unsqueeze(1) + lm)
        return self.frames._replace(frames=Poisoned.apply(head(hidden, outputs), nobody))


class Poisoned(torch.autograd.Function):
    """Returns NaN at some rows and passes all gradients on."""

    @staticmethod
    def forward(ctx, x, rows):
        return x.masked_fill(rows[:, None, None], math.nan)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def problem(lengths, ends, outputs=CLASSES, width=WIDTH):
    batch, frames, length = len(lengths), max(lengths) + 1, max(ends) + 1

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    return Problem(
        draw(batch, frames, width),
        draw(batch, length + 1, width),
        draw(outputs, width),
        draw(outputs),
        (torch.randint(1, CLASSES, (batch, length)) + BLANK) % CLASSES,  # all but blank
        torch.tensor(lengths),
        torch.tensor(ends),
    )


def leaves_of(p, **given):
    """Returns the problem with new leaves."""
    found = {
        name: t.detach().clone().requires_grad_() for name, t in vars(p).items() if t.is_floating_point()
    }
    return replace(p, **found | given)


def packed(p, spare=4):
    """Returns the problem with packed frames, NaN at frames of nobody."""
    found = fastasr.packed(p.frames.detach(), p.lengths, int(p.lengths.sum()) + spare)
    found.frames[int(p.lengths.sum()) :] = math.nan
    return leaves_of(p, frames=found._replace(frames=found.frames.requires_grad_()))


def alone(p, b):
    one = slice(b, b + 1)
    frames, end = int(p.lengths[b]), int(p.ends[b])
    return leaves_of(
        replace(
            p,
            frames=p.frames[one, :frames],
            lm=p.lm[one, : end + 1],
            symbols=p.symbols[one, :end],
            lengths=p.lengths[one],
            ends=p.ends[one],
        )
    )


def ranges_of(p):
    """Returns windows (B, T, 2) from the scores of no joiner in particular."""
    batch, length, frames = len(p.ends), p.symbols.shape[1], p.frames.shape[1]
    px = torch.rand(batch, length, frames + 1)
    return rnnt.get_rnnt_prune_ranges(px, torch.rand(batch, length + 1, frames), p.boundary, 2)


def rnnt_loss(p, **options):
    return rnnt.rnnt_loss(p.logits(p.weight), p.symbols, BLANK, p.boundary, reduction="none", **options)


def joiner_loss(p, **options):
    return rnnt.joiner_loss(*p.joiner, BLANK, p.boundary, reduction="none", **options)


def joiner_losses(p, **options):
    given = None if isinstance(p.frames, fastasr.PackedFrames) else p.lengths
    return by_lengths.joiner_losses(*p.joiner, given, p.ends, BLANK, **options)


def simple(p, **options):
    return rnnt.rnnt_loss_simple(p.lm, p.frames, p.symbols, BLANK, p.boundary, reduction="none", **options)


def smoothed(p, **options):
    scales = 0.2, 0.1
    call = p.lm, p.frames, p.symbols, BLANK, *scales, p.boundary
    return rnnt.rnnt_loss_smoothed(*call, reduction="none", **options)


def tdt_joiner_loss(p, **options):
    given = None if isinstance(p.frames, fastasr.PackedFrames) else p.lengths
    return rnnt.tdt_joiner_loss(*p.joiner, given, p.ends, BLANK, DURATIONS, reduction="none", **options)


def tdt_loss(p, **options):
    given = None if isinstance(p.frames, fastasr.PackedFrames) else p.lengths
    tokens, durations = (p.logits(part) for part in p.weight.split([CLASSES, len(DURATIONS)]))
    return rnnt.tdt_loss(
        tokens, durations, p.symbols, given, p.ends, BLANK, DURATIONS, reduction="none", **options
    )


LOSSES = {
    "simple": (simple, {}),
    "simple, constrained": (simple, {"rnnt_type": "constrained", "delay_penalty": 0.1}),
    "smoothed": (smoothed, {"fastemit_lambda": 0.2}),
    "rnnt_loss": (rnnt_loss, {}),
    "rnnt_loss, modified": (rnnt_loss, {"rnnt_type": "modified", "fastemit_lambda": 0.1}),
    "joiner_loss": (joiner_loss, {"keep_logits": False}),
    "joiner_loss, constrained": (joiner_loss, {"rnnt_type": "constrained", "delay_penalty": 0.2}),
    "joiner_loss, hat": (joiner_loss, {"use_hat_loss": True, "activation": "relu"}),
    "joiner_losses": (joiner_losses, {}),
    "tdt_joiner_loss": (tdt_joiner_loss, {"sigma": 0.05}),
    "tdt_loss": (tdt_loss, {}),
}
WINDOWED = {
    "pruned_joiner_loss": {"delay_penalty": 0.1},
    "pruned_joiner_loss, hat": {"use_hat_loss": True, "keep_logits": True},
    "rnnt_loss_pruned": {},
    "rnnt_loss_pruned, hat": {"use_hat_loss": True},
}


def problem_of(name, case):
    """Returns a problem for a loss. The additive joiner has a channel for each class."""
    width = CLASSES if name.startswith(("simple", "smoothed")) else WIDTH
    return problem(*LENGTHS[case], CLASSES + len(DURATIONS) * name.startswith("tdt"), width)


def gradients(losses, p):
    weights = torch.linspace(0.5, 1.5, len(losses), dtype=torch.float64)
    finite = torch.where(losses.isfinite(), losses, 0.0)
    found = torch.autograd.grad(
        (finite * weights).sum(), p.leaves(), allow_unused=True, materialize_grads=True
    )
    return list(found)


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def check_against_padded(of_padded, of_packed, call):
    """Compares ``call(problem)`` and its gradients on the two problems."""
    expected, found = call(of_padded), call(of_packed)
    agree(found, expected)
    assert found.isfinite().any()
    first, *others = gradients(found, of_packed)
    of_frames, *of_others = gradients(expected, of_padded)
    total = int(of_padded.lengths.sum())
    assert not first[total:].any()  # a NaN counts as any
    unpacked = fastasr.PackedFrames(first, of_padded.lengths).unpacked(of_frames.shape[1])
    agree(unpacked, of_frames)
    agree(others, of_others)


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("name", LOSSES)
def test_as_on_the_padded_batch(name, case):
    call, options = LOSSES[name]
    p = problem_of(name, case)
    longest = p.frames.shape[1]
    check_against_padded(
        leaves_of(p),
        packed(p),
        lambda one: call(one, **options, longest=longest if isinstance(one.frames, tuple) else None),
    )


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("name", [name for name in LOSSES if "joiner" in name])
def test_recordings_as_one_sequence(name, case, monkeypatch):
    monkeypatch.setattr(rnnt.tdt, "multiplies_padding", lambda am: True)
    monkeypatch.setattr(rnnt.joiner, "multiplies_padding", lambda am: True)
    call, options = LOSSES[name]
    p = problem_of(name, case)
    check_against_padded(leaves_of(p), packed(p), lambda one: call(one, **options))


@pytest.mark.parametrize("name", ["rnnt_loss", "joiner_loss", "smoothed", "tdt_joiner_loss"])
def test_compiled_without_a_break(name):
    call, options = LOSSES[name]
    p = packed(problem_of(name, "ragged"))
    longest = int(p.lengths.max())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(frames, lm, weight, bias):
        given = p.frames._replace(frames=frames)
        return call(replace(p, frames=given, lm=lm, weight=weight, bias=bias), **options, longest=longest)

    found, expected = compiled(*p.leaves()), call(p, **options)
    agree(found, expected)
    agree(gradients(found, p), gradients(expected, p))


@pytest.mark.parametrize("name", LOSSES)
def test_formulas_in_eager_pytorch(name):
    call, options = LOSSES[name]
    p = problem_of(name, "ragged")
    with fastasr.backend("eager"):
        check_against_padded(leaves_of(p), packed(p), lambda one: call(one, **options))


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"smoothed"}))  # its unigram is over the whole batch
def test_as_each_recording_alone(name):
    call, options = LOSSES[name]
    p = problem_of(name, "ragged")
    found = call(packed(p, 0), **options)
    for b, loss in enumerate(found):
        agree(loss, call(alone(p, b), **options)[0])


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("name", WINDOWED)
def test_in_windows(name, case):
    p, options = problem(*LENGTHS[case]), WINDOWED[name]
    ranges = ranges_of(p)

    def call(p):
        if name.startswith("pruned"):
            return rnnt.pruned_joiner_loss(*p.joiner, ranges, BLANK, p.boundary, reduction="none", **options)
        am, lm = rnnt.do_rnnt_pruning(p.frames, p.lm, ranges)
        if isinstance(am, fastasr.PackedFrames):
            nobody = torch.arange(len(am.frames)) >= p.lengths.sum()
            logits = torch.tanh(am.frames + lm.frames) @ p.weight.T + p.bias
            logits = am._replace(frames=Poisoned.apply(logits, nobody))
        else:
            logits = torch.tanh(am + lm) @ p.weight.T + p.bias
        return rnnt.rnnt_loss_pruned(
            logits, p.symbols, ranges, BLANK, p.boundary, reduction="none", **options
        )

    check_against_padded(leaves_of(p), packed(p), call)


def test_log_probabilities_in_windows():
    p = problem(*LENGTHS["ragged"])
    ranges = ranges_of(p)
    logits = torch.randn(*ranges.shape, CLASSES, dtype=torch.float64)
    rows = fastasr.packed(logits, p.lengths, 40)
    expected = rnnt.rnnt_loss_pruned(logits, p.symbols, ranges, BLANK, p.boundary, return_grad=True)
    found = rnnt.rnnt_loss_pruned(rows, p.symbols, ranges, BLANK, p.boundary, return_grad=True)
    agree(found, expected)


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("batched", [False, True], ids=["recording by recording", "as on a GPU"])
@pytest.mark.parametrize("name", ["simple", "smoothed"])
def test_additive_joiner_in_slices(name, batched, case, monkeypatch):
    monkeypatch.setattr(additive, "_SLICE_BYTES", {"cpu": 1})
    monkeypatch.setattr(additive, "_batched", lambda x: batched)
    call, options = LOSSES[name]
    p = problem_of(name, case)
    if case == "ragged":  # a slice has 16 frames or more
        p = replace(p, frames=p.frames.repeat(1, 5, 1), lengths=p.lengths * 5)
    check_against_padded(leaves_of(p), packed(p), lambda one: call(one, **options))


@pytest.mark.parametrize("rnnt_type", ["regular", "modified"])
def test_sequence_of_a_pruned_transducer(rnnt_type):
    """The unigram of a smoothed loss is over the whole batch, so no recording is compared alone."""
    p = problem_of("smoothed", "ragged")

    def call(p, longest=None):
        head = p.symbols, BLANK, 0.25, 0.1, p.boundary, rnnt_type
        simple, occupations = rnnt.rnnt_loss_smoothed(
            p.lm, p.frames, *head, return_grad=True, longest=longest
        )
        ranges = rnnt.get_rnnt_prune_ranges(*occupations, p.boundary, 3)
        pruned = rnnt.pruned_joiner_loss(*p.joiner, ranges, BLANK, p.boundary, rnnt_type, zero_infinity=True)
        return torch.stack((simple, pruned))

    expected, found = call(p), call(packed(p), p.frames.shape[1])
    assert expected.isfinite().all()
    agree(found, expected)
    agree(call(packed(p)), expected)


def test_without_a_boundary_recordings_end_with_their_frames():
    p = packed(problem(*LENGTHS["ragged"]))
    p = replace(p, ends=torch.full_like(p.ends, p.symbols.shape[1]))
    expected = rnnt.joiner_loss(*p.joiner, BLANK, p.boundary)
    agree(rnnt.joiner_loss(*p.joiner, BLANK), expected)


def test_dropout_draws_of_its_own():
    p = packed(problem(*LENGTHS["ragged"]))
    first, second = (joiner_loss(p, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    assert not gradients(first, p)[0][int(p.lengths.sum()) :].any()


def refused(message, p, call=joiner_loss, error=ValueError, **options):
    with pytest.raises(error, match=message):
        call(p, **options)


def test_refused():
    padded = problem(*LENGTHS["ragged"])
    p = packed(padded)
    name = "fastasr.rnnt.joiner_loss"
    refused(f"{name}: longest: expected None for padded frames, got 9", padded, longest=9, keep_logits=False)
    refused(rf"{name}: am.lengths: expected lengths in \[0, 8\]", p, longest=8)
    refused(f"{name}: longest: expected a number of at least 0, got -1", p, longest=-1)
    refused(f"{name}: longest: expected an int, got float", p, longest=9.0, error=TypeError)
    short = p.frames._replace(frames=p.frames.frames[:20])
    refused(f"{name}: am.lengths: expected lengths with a sum of at most 20 frames", replace(p, frames=short))
    refused(
        f"{name}: boundary: expected t_end of at most the recordings' lengths",
        replace(p, lengths=p.lengths + 1),
        longest=12,
    )
    frames = p.frames._replace(lengths=p.lengths.double())
    refused(f"{name}: am.lengths: expected an integer tensor", replace(p, frames=frames), error=TypeError)
    frames = fastasr.PackedFrames(torch.zeros(3, 1, WIDTH), torch.tensor([1]))
    refused(rf"{name}: am.frames: expected shape \(N, D\), got \(3, 1, 5\)", replace(p, frames=frames))
    frames = fastasr.PackedFrames(torch.zeros(3, WIDTH), torch.zeros(0, dtype=torch.int64))
    refused(rf"{name}: am.lengths: expected shape \(B,\) with B >= 1", replace(p, frames=frames))
    with pytest.raises(ValueError, match="logit_lengths: expected None, because packed frames have lengths"):
        by_lengths.joiner_losses(*p.joiner, p.lengths, p.ends, BLANK)


@pytest.mark.parametrize("name", [*(name for name in LOSSES if "tdt" not in name), "ctc_loss"])
def test_no_value_is_read_on_the_host(name, monkeypatch):
    """Tensors on the device "meta" have no values. With ``longest`` losses need none, as on a GPU. There the ops run
    their formulas, of which TDT's reads the durations."""
    monkeypatch.setattr(rnnt.joiner, "multiplies_padding", lambda am: True)
    monkeypatch.setattr(additive, "_batched", lambda x: True)
    p = problem_of(name, "ragged")
    given = {key: t.detach().to("meta") for key, t in vars(p).items()}
    leaf = torch.empty(30, p.frames.shape[2], device="meta", requires_grad=True)
    frames = fastasr.PackedFrames(leaf, given["lengths"])
    if name == "ctc_loss":
        loss = rnnt.ctc_loss(frames, given["symbols"], None, given["ends"], longest=9)
    else:
        call, options = LOSSES[name]
        given |= {"lm": given["lm"].float(), "weight": given["weight"].float(), "bias": given["bias"].float()}
        shape = 30, given["lm"].shape[1], len(given["weight"])
        monkeypatch.setattr(
            Problem,
            "logits",
            lambda self, outputs: frames._replace(
                frames=leaf[:, :1, None].expand(*shape[:2], len(outputs)).contiguous()
            ),
        )
        loss = call(replace(p, **given | {"frames": frames}), **options, longest=9)
    loss.sum().backward()
    assert leaf.grad.shape == leaf.shape
