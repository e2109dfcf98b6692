# SPDX-License-Identifier: Apache-2.0
r"""Transducer losses: −log of the summed probability of all alignments (Graves, 2012), for every joiner.

All of them take these arguments besides their joiner's:

- ``boundary`` (B, 4): rows [s_begin, t_begin, s_end, t_end]; None: whole sequences.
- ``rnnt_type``: regular, modified or constrained, see ``fastasr.rnnt.logprobs``.
- ``delay_penalty`` d: symbol log-probabilities gain d ((T_b − 1)/2 − t), which rewards early symbols.
- ``reduction``: none, mean (over the batch) or sum.
- ``return_grad``: also return the occupation probabilities (px_grad, py_grad) of the symbol and blank arcs, the
  gradients of −loss with respect to (px, py); ``get_rnnt_prune_ranges`` takes them.
- ``zero_infinity``: a sequence that cannot be aligned, because it has more symbols than its frames allow, counts as 0;
  without this flag its loss is +∞. Its gradient is zero either way.
- ``fastemit_lambda`` λ: FastEmit (Yu et al., 2021): gradients through symbol arcs are multiplied by 1 + λ; the value
  of the loss does not change.

In place of a padded am (B, T, C) or padded logits (B, T, ...), losses take packed frames
(``fastasr.PackedFrames``) of (N, C) or (N, ...). Values and gradients are those of the padded batch; frames of nobody
have no part in either, whatever they hold. Nothing as wide as the channels or the vocabulary is padded then: only the
lattice is, (B, S, T) or (B, T, R), which holds a few numbers of each cell. ``longest`` is T there, at least the largest
length; None is the largest length, for which the host waits on a GPU. Losses in windows take T from ``ranges``. Without
a boundary, a recording ends with its last frame, and t_end may be at most its length.

An empty transcript (S = 0) is valid; a sequence without frames has the loss 0 if it has no symbols, and +∞ if it has.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr.packed_frames import PackedFrames
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check, logprobs


def rnnt_loss_simple(
    lm: Tensor,
    am: Tensor | PackedFrames,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str | None = "mean",
    return_grad: bool = False,
    *,
    zero_infinity: bool = False,
    fastemit_lambda: float = 0.0,
    longest: int | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the loss of the joiner whose logits are am[b, t] + lm[b, s]. Besides the gradients it allocates nothing
    of size (B, T, S, C) or (B, T, C).

    Args:
        lm: (B, S + 1, C).
        am: (B, T, C), or packed frames (N, C).
        symbols: (B, S), integers in [0, C).
        termination_symbol: blank, in [0, C).
    """
    op = "rnnt.rnnt_loss_simple"
    delay_penalty, factor = _numbers(op, delay_penalty, fastemit_lambda)
    px, py = logprobs.additive(
        op, lm, am, symbols, termination_symbol, 0.0, 0.0, boundary, rnnt_type, factor, delay_penalty, longest
    )
    return over_lattice(op, px, py, boundary, reduction, return_grad, zero_infinity)


def rnnt_loss_smoothed(
    lm: Tensor,
    am: Tensor | PackedFrames,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str | None = "mean",
    return_grad: bool = False,
    *,
    zero_infinity: bool = False,
    fastemit_lambda: float = 0.0,
    longest: int | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the loss of ``rnnt_loss_simple`` with log-probabilities interpolated by
    ``get_rnnt_logprobs_smoothed``.
    """
    op = "rnnt.rnnt_loss_smoothed"
    delay_penalty, factor = _numbers(op, delay_penalty, fastemit_lambda)
    scales = lm_only_scale, am_only_scale
    px, py = logprobs.additive(
        op, lm, am, symbols, termination_symbol, *scales, boundary, rnnt_type, factor, delay_penalty, longest
    )
    return over_lattice(op, px, py, boundary, reduction, return_grad, zero_infinity)


def rnnt_loss(
    logits: Tensor | PackedFrames,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str | None = "mean",
    return_grad: bool = False,
    *,
    zero_infinity: bool = False,
    fastemit_lambda: float = 0.0,
    longest: int | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the loss of a full joiner's logits (B, T, S + 1, C), or packed ones (N, S + 1, C)."""
    op = "rnnt.rnnt_loss"
    delay_penalty, factor = _numbers(op, delay_penalty, fastemit_lambda)
    px, py = logprobs.joint(
        op, logits, symbols, termination_symbol, boundary, rnnt_type, factor, delay_penalty, longest
    )
    return over_lattice(op, px, py, boundary, reduction, return_grad, zero_infinity)


def rnnt_loss_pruned(
    logits: Tensor | PackedFrames,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str | None = "mean",
    use_hat_loss: bool = False,
    return_grad: bool = False,
    *,
    zero_infinity: bool = False,
    fastemit_lambda: float = 0.0,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the loss of a pruned joiner's logits (B, T, R, C), or packed ones (N, R, C), at the positions in
    ``ranges`` (B, T, R).

    Paths outside the windows have no probability. ``use_hat_loss``: see ``get_hat_logprobs_pruned``. ``return_grad``
    gives occupations over the whole lattice, (B, S, T + 1) or (B, S, T) and (B, S + 1, T).
    """
    op = "rnnt.rnnt_loss_pruned"
    delay_penalty, factor = _numbers(op, delay_penalty, fastemit_lambda)
    use_hat_loss = _check.flag(op, "use_hat_loss", use_hat_loss)
    head = logits, symbols, ranges, termination_symbol, boundary, rnnt_type, use_hat_loss
    if return_grad:
        px, py = logprobs.pruned(op, *head, factor, delay_penalty)
        return over_lattice(op, px, py, boundary, reduction, True, zero_infinity)
    px, py, starts, boundary = logprobs.pruned_rows(op, *head)
    band = px, py, starts, symbols.shape[1], boundary
    return over_band(op, *band, rnnt_type, delay_penalty, factor, reduction, zero_infinity)


# --------------------------------------------------------------------------- shared code
def over_lattice(
    op: str,
    px: Tensor,
    py: Tensor,
    boundary: Tensor | None,
    reduction: str | None,
    return_grad: bool,
    zero_infinity: bool,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the loss of a lattice that ``logprobs.lattice`` made."""
    if boundary is not None:
        boundary = boundary.to(torch.int64)
    if not return_grad:
        return reduced(op, -ops.rnnt_lattice(px, py, boundary), reduction, zero_infinity)
    scores, px_grad, py_grad = ops.rnnt_lattice(px, py, boundary, return_occupation=True)
    return reduced(op, -scores, reduction, zero_infinity), (px_grad, py_grad)


def over_band(
    op: str,
    px: Tensor,
    py: Tensor,
    starts: Tensor,
    length: int,
    boundary: Tensor | None,
    rnnt_type: str,
    delay_penalty: float,
    symbol_gradient: float,
    reduction: str | None,
    zero_infinity: bool,
) -> Tensor:
    """Returns the loss of a joiner's px and py (B, T, R) in windows that begin at ``starts`` (B, T)."""
    frames, width = px.shape[1:]
    px = logprobs.scale_gradient(px, symbol_gradient)
    if delay_penalty:
        px = logprobs.delay(px, delay_penalty, boundary, frames, 1)
    if rnnt_type == "constrained":
        px = px + F.pad(py[..., 1:], (0, 1), value=-math.inf)
    lane = torch.arange(width, device=px.device, dtype=torch.int64)
    over = starts.unsqueeze(2) + lane >= length  # no symbol after the last
    if rnnt_type == "regular" and boundary is not None:
        over = over | (
            torch.arange(frames, device=px.device, dtype=torch.int64) >= boundary[:, 3:]
        ).unsqueeze(2)
    px = px.masked_fill(over, -math.inf)
    if boundary is None:
        begin = starts.new_zeros(starts.shape[0], 1)
        boundary = torch.cat((begin, begin, begin + length, begin + frames), 1)
    scores = ops.rnnt_pruned_lattice(px, py, starts, boundary, modified=rnnt_type != "regular")
    return reduced(op, -scores, reduction, zero_infinity)


def reduced(op: str, loss: Tensor, reduction: str | None, zero_infinity: bool) -> Tensor:
    """Returns the losses (B,), reduced over the batch."""
    arguments.choice(op, "reduction", reduction, arguments.REDUCTIONS)
    if _check.flag(op, "zero_infinity", zero_infinity):
        loss = torch.where(loss == math.inf, 0.0, loss)
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()


def _numbers(op: str, delay_penalty: float, fastemit_lambda: float) -> tuple[float, float]:
    """Returns (delay_penalty, 1 + λ)."""
    delay_penalty = _check.number(op, "delay_penalty", delay_penalty)
    return delay_penalty, 1.0 + _check.number(op, "fastemit_lambda", fastemit_lambda)
