# SPDX-License-Identifier: Apache-2.0
"""The exact losses of logits (B, T, U + 1, V) as one node of autograd's graph."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr._transforms import Function, transform
from fastasr.rnnt import logprobs
from fastasr.rnnt import rows as row_ops

# of ``losses``: blank, factor, clamp, fused_log_softmax, in_place; and whether there are gradients
Options = tuple[int, float, float, bool, bool, bool]


def losses(
    logits: Tensor,
    rows: Tensor,
    limits: Tensor | None,
    blank: int,
    factor: float = 1.0,
    clamp: float = -1.0,
    fused_log_softmax: bool = True,
    in_place: bool = False,
) -> Tensor:
    """Returns the losses (B,). The caller has checked the arguments.

    Args:
        rows: int64 (B, T, U + 1), the symbol of each row of logits.
        limits: int64 (B, 4), the boundary; None: whole sequences.
        factor: the gradients of symbol arcs are multiplied by it.
        clamp, fused_log_softmax, in_place: see ``fastasr.rnnt.lengths.rnnt_losses``.
    """
    differentiates = torch.is_grad_enabled() and logits.requires_grad
    options = blank, factor, clamp, fused_log_softmax, in_place, differentiates
    return _Losses.apply(logits, rows, limits, options)


def given(logprobs: Tensor, rows: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Returns (px, py) of log-probabilities (B, T, U + 1, V)."""
    return logprobs.gather(-1, rows.unsqueeze(-1)).squeeze(-1), logprobs[..., blank]


class _Losses(Function):
    """The losses as one node of autograd's graph: for a short sequence, nodes cost more than the lattice.

    With the occupations ox and oy of the lattice's arcs, which are the gradients of its score, the loss has
    dpx = −(1 + λ) ox and dpy = −oy.
    """

    @staticmethod
    def formula(logits: Tensor, rows: Tensor, limits: Tensor | None, options: Options) -> Tensor:
        blank, factor, clamp, fused, in_place, _ = options
        if clamp > 0 or in_place:
            raise RuntimeError(
                f"fastasr.rnnt: a loss with clamp or in_place is not possible under {transform()}: both change "
                "gradients alone"
            )
        px, py = row_ops.row_logprobs(logits, rows, blank) if fused else given(logits, rows, blank)
        px, py = px[:, :, :-1].transpose(1, 2), py.transpose(1, 2).contiguous()
        px, py = logprobs.lattice("rnnt_lattice", px, py, limits, "regular", factor)
        return -ops.rnnt_lattice(px, py, limits)

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, limits: Tensor | None, options: Options) -> Tensor:
        blank, factor, clamp, fused, in_place, differentiates = options
        if fused:
            row_logprobs = row_ops.OP if torch.compiler.is_compiling() else row_ops.forward
            px, py, normaliser = row_logprobs(logits, rows, blank, False)
        else:
            px, py, normaliser = *given(logits, rows, blank), None
        px, py = px[:, :, :-1].transpose(1, 2), py.transpose(1, 2).contiguous()
        px, py = logprobs.lattice("rnnt_lattice", px, py, limits, "regular")
        if not differentiates:
            return -ops.rnnt_lattice(px, py, limits)
        scores, ox, oy = ops.rnnt_lattice(px, py, limits, return_occupation=True)
        ctx.save_for_backward(logits, rows, normaliser, ox, oy)
        ctx.rest = blank, factor, clamp, in_place
        return -scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # This happens under create_graph=True alone.
            raise RuntimeError("fastasr.rnnt: gradients of this loss's gradients are not implemented")
        logits, rows, normaliser, ox, oy = ctx.saved_tensors
        blank, factor, clamp, in_place = ctx.rest
        if in_place:  # Other nodes that keep the logits for their backward pass get torch's error.
            logits = logits.detach()
            torch.autograd.graph.increment_version(logits)
        scale = -grad.view(-1, 1, 1) if clamp <= 0 else -1.0
        gx = F.pad((ox[:, :, :-1] * (scale * factor if factor != 1.0 else scale)).transpose(1, 2), (0, 1))
        gy = (oy * scale).transpose(1, 2)
        if normaliser is None:
            found = logits.zero_() if in_place else torch.zeros_like(logits)
            found.scatter_(-1, rows.unsqueeze(-1), gx.to(logits.dtype).unsqueeze(-1))
            found[..., blank] += gy
        else:
            call = gx, gy, logits, rows, normaliser, blank, False
            compiling = torch.compiler.is_compiling()
            found = row_ops.BACKWARD_OP(*call) if compiling else row_ops.backward(*call, in_place)
        if clamp > 0:
            found = found.clamp_(-clamp, clamp).mul_(grad.view(-1, 1, 1, 1))
        return found, None, None, None
