# SPDX-License-Identifier: Apache-2.0
r"""CTC's loss (Graves et al., 2006) as the score of a transducer's lattice.

A path of CTC is in the states l = 0 … 2 S in turn: blank before the labels, label 1, blank, …, label S, blank. Each
frame has a state. The states of labels have a frame or more, and so has the blank between two equal labels; other
blanks may have none. The lattice of ``fastasr.ops.rnnt_lattice`` has these states in place of symbols. Its symbol arcs,
which lead to the next state, stand for the frames that states must have; its blank arcs, which stay, for all others:

    o_l = the frames that states must have until l is reached, frame = t + o_l
    py[l, t] = log p(state l at frame t + o_l)
    px[l, t] = log p(state l + 1 at frame t + o_l) where that state must have a frame, otherwise 0
    loss = −score of the lattice with 2 S symbols and T − o_2S frames; +∞ if T < o_2S

Of the vocabulary's width there are the logits and their gradient, dl = Σ_s g_s e_{y_s} − softmax(l) Σ_s g_s with g the
gradients of the S + 1 scores of a frame. Both passes work on slices of rows. The scores of states are a padded lattice.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr import ops
from fastasr._transforms import Function
from fastasr.packed_frames import PackedFrames
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check, lengths
from fastasr.rnnt._frames import frames_of
from fastasr.rnnt.rows import slices


def ctc_loss(
    logits: Tensor | PackedFrames,
    targets: Tensor,
    logit_lengths: Tensor | None,
    target_lengths: Tensor,
    blank: int = 0,
    reduction: str = "mean",
    *,
    zero_infinity: bool = False,
    longest: int | None = None,
) -> Tensor:
    """Returns ``torch.nn.functional.ctc_loss`` of the log-softmax of logits. Log-probabilities may stand for logits.

    It waits for no GPU, gives the same bits each time, and makes nothing of the logits' size besides their gradient.

    Args:
        logits: (B, T, C), or packed frames (N, C).
        targets: (B, S), integers in [0, C) other than blank in front of each sequence's end.
        logit_lengths, target_lengths: (B,), integers: frames and labels of each sequence. Packed frames have lengths:
            then logit_lengths is None.
        blank: in [0, C).
        reduction: mean, the mean of loss / labels, where no labels count as one; sum; none.
        zero_infinity: a sequence with too few frames for its labels has the loss 0, otherwise +∞. Its gradient is zero.
        longest: see ``fastasr.rnnt.losses``.
    Returns:
        () or (B,), float32, or float64 where logits are.
    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    op = "rnnt.ctc_loss"
    rows, frames = frames_of(op, "logits", logits, "(B, T, C)", longest)
    batch, classes = frames.batch, rows.shape[2]
    arguments.class_index(op, "blank", blank, classes)
    length = arguments.integers(op, "targets", targets, (batch, None), rows, "the logits").shape[1]
    limits = lengths.boundary(op, frames, logit_lengths, target_lengths, length, rows)
    targets = arguments.symbols(op, targets, batch, length, classes, limits, rows)
    ends, stops = limits[:, 2:3], limits[:, 3:]
    number = torch.arange(1, length + 1, device=rows.device, dtype=torch.int64)
    if arguments.has_values(targets):
        right = (targets != blank) | (number > ends)
        arguments.holds(op, "targets", right, "labels other than blank", targets)

    equal_next = F.pad(targets[:, 1:] == targets[:, :-1], (0, 1)) & (number < ends)
    equal_next = equal_next[:, :length]  # without labels there is no last one
    scores = _Scores.apply(
        rows.flatten(0, 1), F.pad(targets, (1, 0), value=blank), frames.recordings(rows.device)
    )
    px, py = _arcs(frames.lattice(scores.view(*rows.shape[:2], length + 1)), number, equal_next)
    room = stops - ends - equal_next.sum(1, keepdim=True)
    fits, zero = room >= 0, torch.zeros_like(ends)
    boundary = torch.cat((zero, zero, 2 * ends * fits, room.clamp(min=0)), 1)
    loss = torch.where(fits[:, 0], -ops.rnnt_lattice(px, py, boundary), math.inf)
    if _check.flag(op, "zero_infinity", zero_infinity):
        loss = torch.where(loss == math.inf, 0.0, loss)
    arguments.choice(op, "reduction", reduction, arguments.REDUCTIONS)
    if reduction == "mean":
        return (loss / ends[:, 0].clamp(min=1)).mean()
    return loss if reduction == "none" else loss.sum()


def _arcs(scores: Tensor, number: Tensor, equal_next: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (px (B, 2 S, T + 1), py (B, 2 S + 1, T)) of scores (B, T, S + 1) of blank and labels. Label ``number``
    (S,) must have a blank behind it where ``equal_next`` (B, S)."""
    blank, labels = scores[..., :1].mT, scores[..., 1:].mT
    length, frames = labels.shape[1:]
    # the frames that states must have until this label's blank, (B, S)
    behind = number + equal_next.cumsum(1)
    until, before = behind - equal_next.to(torch.int64), F.pad(behind, (1, 0))
    of_blanks = _Shifted.apply(blank.expand(-1, length + 1, -1), before, frames)
    of_labels = _Shifted.apply(labels, until, frames)
    py = torch.cat((torch.stack((of_blanks[:, :-1], of_labels), 2).flatten(1, 2), of_blanks[:, -1:]), 1)
    to_labels = _Shifted.apply(labels, before[:, :-1], frames + 1)
    to_blanks = _Shifted.apply(blank.expand(-1, length, -1), until, frames + 1)
    to_blanks = torch.where(equal_next.unsqueeze(2), to_blanks, 0.0)
    return torch.stack((to_labels, to_blanks), 2).flatten(1, 2), py


class _Shifted(Function):
    """Returns y[b, l, t] = x[b, l, t + o[b, l]] for t < width, and 0 where x ends. The gradient shifts back."""

    @staticmethod
    def formula(x: Tensor, offsets: Tensor, width: int) -> Tensor:
        return _shifted(x, offsets, width)

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.width = x.shape[2]
        return _shifted(x, offsets, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        return _shifted(grad, -offsets, ctx.width), None, None


def _shifted(x: Tensor, offsets: Tensor, width: int) -> Tensor:
    if not x.shape[2]:
        return x.new_zeros(*x.shape[:2], width)
    at = torch.arange(width, device=x.device, dtype=torch.int64) + offsets.unsqueeze(2)
    outside = (at < 0) | (at >= x.shape[2])
    return x.gather(2, at.masked_fill(outside, 0)).masked_fill(outside, 0.0)


class _Scores(Function):
    """Returns log softmax(rows (N, C)) at the labels (B, K) of each row's recording (N,), in float32 or better."""

    @staticmethod
    def formula(rows: Tensor, labels: Tensor, recording: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        return rows.to(wide).log_softmax(1).gather(1, labels[recording])

    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor, recording: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        found = rows.new_empty(len(rows), labels.shape[1], dtype=wide)
        normaliser = rows.new_empty(len(rows), 1, dtype=wide)
        for part in slices(len(rows), rows.shape[1], wide, rows.device.type):
            x = rows[part].to(wide)
            normaliser[part] = x.logsumexp(1, keepdim=True)
            found[part] = x.gather(1, labels[recording[part]]) - normaliser[part]
        ctx.save_for_backward(rows, labels, recording, normaliser)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, labels, recording, normaliser = ctx.saved_tensors
        found, total = torch.empty_like(rows), grad.sum(1, keepdim=True)
        for part in slices(len(rows), rows.shape[1], normaliser.dtype, rows.device.type):
            index = labels[recording[part]]
            d = torch.sub(rows[part].to(normaliser.dtype), normaliser[part]).exp_().mul_(-total[part])
            if d.is_cuda:  # scatter_add_ is not deterministic there
                row = torch.arange(len(d), device=d.device, dtype=torch.int64).unsqueeze(1)
                d.index_put_((row.expand_as(index), index), grad[part], accumulate=True)
            else:
                d.scatter_add_(1, index, grad[part])
            # rows without a part in the loss may hold NaN
            found[part] = d.masked_fill_((grad[part] == 0).all(1, keepdim=True), 0.0)
        return found, None, None
