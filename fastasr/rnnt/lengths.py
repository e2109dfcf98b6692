# SPDX-License-Identifier: Apache-2.0
"""RNN-T losses of batches that are described by lengths, as torchaudio, transformers, NeMo and warp-rnnt describe them.

``fastasr.compat`` has these packages' functions. Reductions of the losses l_b of sequences with S_b symbols, as in
transformers and NeMo: ``mean`` is the mean of l_b / S_b, ``mean_volume`` Σ l_b / Σ S_b, ``mean_batch`` the mean of l_b,
``sum`` and ``none``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check, logprobs
from fastasr.rnnt.rows import row_logprobs

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
) -> Tensor:
    """Returns the losses (B,) of logits (B, T, U + 1, V) for the function ``op``.

    Args:
        targets: (B, U), integers in [0, V) in front of each sequence's end; the lengths are integers (B,).
        blank: in [-V, V).
        clamp: above 0, the gradients of each loss are clamped to [-clamp, clamp].
        fused_log_softmax: False: the logits are log-probabilities already.
        fastemit_lambda: the gradients of symbol arcs are multiplied by 1 + λ.
    """
    arguments.floating(op, "logits", logits, "(B, T, U + 1, V)")
    batch, frames, positions, classes = logits.shape
    blank = arguments.class_index(op, "blank", _check.integer(op, "blank", blank) % classes, classes)
    limits = boundary(op, logit_lengths, target_lengths, batch, frames, positions - 1, logits)
    targets = arguments.symbols(op, targets, positions - 1, classes, limits, logits)
    factor = 1.0 + _check.number(op, "fastemit_lambda", fastemit_lambda)

    def losses(x: Tensor) -> Tensor:
        rows = F.pad(targets, (0, 1), value=blank).unsqueeze(1).expand(batch, frames, positions)
        if fused_log_softmax:
            px, py = row_logprobs(x, rows, blank)
        else:
            px, py = x.gather(-1, rows.unsqueeze(-1)).squeeze(-1), x[..., blank]
        px, py = px[:, :, :-1].transpose(1, 2), py.transpose(1, 2)
        px, py = logprobs.lattice(op, px, py, limits, "regular", factor, 0.0)
        return -ops.rnnt_lattice(px, py, limits)

    if clamp <= 0 or not (torch.is_grad_enabled() and logits.requires_grad):
        return losses(logits)
    leaf = logits.detach().requires_grad_()
    found = losses(leaf)
    return _Clamped.apply(
        logits, found.detach(), torch.autograd.grad(found.sum(), leaf)[0].clamp_(-clamp, clamp)
    )


class _Clamped(torch.autograd.Function):
    """Gives the losses these gradients, whatever each loss is multiplied with afterwards."""

    @staticmethod
    def forward(ctx, logits: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype).view(-1, 1, 1, 1), None, None


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


def boundary(op, logit_lengths, target_lengths, batch: int, frames: int, length: int, like: Tensor) -> Tensor:
    """Returns the boundary (B, 4) of sequences of these lengths, after checking them."""
    ends = []
    for name, value, most in (
        ("logit_lengths", logit_lengths, frames),
        ("target_lengths", target_lengths, length),
    ):
        value = arguments.integers(op, name, value, (batch,), like, "the logits")
        if arguments.has_values(value):
            arguments.holds(op, name, (value >= 0) & (value <= most), f"lengths in [0, {most}]", value)
        ends.append(value)
    zero = torch.zeros_like(ends[0])
    return torch.stack((zero, zero, ends[1], ends[0]), 1)
