# SPDX-License-Identifier: Apache-2.0
"""RNN-T losses of batches described by lengths, as in torchaudio, transformers, NeMo and warp-rnnt.

``fastasr.compat`` has these packages' functions. Reductions of the losses l_b of sequences with S_b symbols, as in
transformers and NeMo: ``mean`` is the mean of l_b / S_b, ``mean_volume`` Σ l_b / Σ S_b, ``mean_batch`` the mean of l_b,
``sum`` and ``none``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr.ops._dispatch import forced_backend
from fastasr.packed_frames import PackedFrames
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check, logits_losses, logprobs
from fastasr.rnnt import rows as row_ops
from fastasr.rnnt._frames import Packed, Padded, frames_of
from fastasr.rnnt.joiner import joiner_loss

REDUCTIONS = ("mean_volume", "mean_batch", "mean", "sum", "none")


def rnnt_losses(
    op: str,
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    *,
    clamp: float = -1,
    fused_log_softmax: bool = True,
    fastemit_lambda: float = 0.0,
    in_place: bool = False,
) -> Tensor:
    """Returns the losses (B,) of logits (B, T, U + 1, V) for the function ``op``.

    Args:
        targets: (B, U), integers in [0, V) in front of each sequence's end; the lengths are integers (B,).
        blank: in [-V, V).
        clamp: above 0, the gradients of each loss are clamped to [-clamp, clamp].
        fused_log_softmax: False: the logits are log-probabilities already.
        fastemit_lambda: the gradients of symbol arcs are multiplied by 1 + λ.
        in_place: the backward pass writes the gradient over the logits, whatever holds them. Under torch.compile
            it takes memory of its own, and under the forced backend "eager" unless ``clamp`` is above 0.
    """
    arguments.floating(op, "logits", logits, "(B, T, U + 1, V)")
    batch, frames, positions, classes = logits.shape
    from_end = -classes <= _check.integer(op, "blank", blank) < 0
    blank = arguments.class_index(op, "blank", blank + classes if from_end else blank, classes)
    limits = boundary(op, Padded(batch, frames), logit_lengths, target_lengths, positions - 1, logits)
    targets = arguments.symbols(op, targets, batch, positions - 1, classes, limits, logits)
    factor = 1.0 + _check.number(op, "fastemit_lambda", fastemit_lambda)
    rows = F.pad(targets, (0, 1), value=blank).unsqueeze(1).expand(batch, frames, positions)
    if forced_backend() == "eager" and clamp <= 0:
        px, py = (
            row_ops.row_logprobs(logits, rows, blank)
            if fused_log_softmax
            else logits_losses.given(logits, rows, blank)
        )
        px, py = px[:, :, :-1].transpose(1, 2), py.transpose(1, 2)
        px, py = logprobs.lattice(op, px, py, limits, "regular", factor, 0.0)
        return -ops.rnnt_lattice(px, py, limits)
    if in_place and 0 in logits.stride():
        expected = "in_place: expected logits whose elements have memory of their own"
        raise ValueError(f"fastasr.{op}: {expected}, got strides {logits.stride()}")
    options = clamp, fused_log_softmax, in_place and not torch.compiler.is_compiling()
    return logits_losses.losses(logits, rows, limits, blank, factor, *options)


def joiner_losses(
    am: Tensor | PackedFrames,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor | None,
    target_lengths: Tensor,
    blank: int,
    longest: int | None = None,
    **options: Any,
) -> Tensor:
    """Returns the losses (B,) of ``joiner_loss``, which takes the other arguments, for targets (B, U). Packed frames
    have their own lengths, so ``logit_lengths`` is None with them."""
    op = "rnnt.joiner_loss"
    rows, frames = frames_of(op, "am", am, "(B, T, D)", longest)
    limits = boundary(op, frames, logit_lengths, target_lengths, targets.shape[1], rows)
    options |= {"longest": frames.frames} if isinstance(am, PackedFrames) else {}
    return joiner_loss(am, lm, weight, bias, targets, blank, limits, reduction="none", **options)


def reduced(op: str, loss: Tensor, target_lengths: Tensor, reduction: str) -> Tensor:
    """Returns the losses (B,) reduced as transformers and NeMo do."""
    arguments.choice(op, "reduction", reduction, REDUCTIONS)
    lengths = target_lengths.to(loss)
    if reduction == "mean_volume":
        return loss.sum() / lengths.sum()
    if reduction == "mean_batch":
        return loss.mean()
    if reduction == "mean":
        return (loss / lengths).mean()
    return loss.sum() if reduction == "sum" else loss


def boundary(
    op: str, frames: Padded, logit_lengths: Tensor | None, target_lengths: Tensor, length: int, like: Tensor
) -> Tensor:
    """Returns the boundary (B, 4) of sequences of these lengths, after checking them. Packed frames have the lengths
    ``logit_lengths``."""
    if isinstance(frames, Packed):
        if logit_lengths is not None:
            raise ValueError(
                f"fastasr.{op}: logit_lengths: expected None, because packed frames have lengths"
            )
        logit_lengths = frames.lengths
    ends, numbers = [], []
    for name, value, most in (
        ("logit_lengths", logit_lengths, frames.frames),
        ("target_lengths", target_lengths, length),
    ):
        ends.append(arguments.checked_integers(op, name, value, (frames.batch,), like, "the logits"))
        numbers.append(arguments.between(op, name, ends[-1], most, f"lengths in [0, {most}]"))
    if None not in numbers:  # One small tensor costs less than the conversions.
        rows = [(0, 0, symbols, stop) for stop, symbols in zip(*numbers, strict=True)]
        return torch.tensor(rows, device="cpu", dtype=torch.int64)
    stop, end = (value.to(torch.int64) for value in ends)
    zero = torch.zeros_like(stop)
    return torch.stack((zero, zero, end, stop), 1)
