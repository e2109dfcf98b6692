# SPDX-License-Identifier: Apache-2.0
r"""A transducer's joiner and its loss in one operation, which never holds the logits.

logits[b, t, s] = activation(am[b, t] + lm[b, s]) Wᵀ + bias for the cells in the pruning windows, or for all.
The lattice reads two numbers of each cell, which ``fastasr.ops.rnnt_joiner`` returns; ``fastasr.ops.rnnt_lattice`` and
``rnnt_pruned_lattice`` sum over the paths. Gradients of am, lm, weight and bias are exact and deterministic; cells
outside the boundary, or with no part in any path, are left out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr._transforms import Function
from fastasr.ops import _activation, _weights_dropout
from fastasr.ops._dispatch import PLAIN, forced_backend
from fastasr.ops._joiner import ACTIVATIONS, Activation
from fastasr.ops._register import autocast_dtype
from fastasr.packed_frames import PackedFrames
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check, logits_losses, logprobs, losses
from fastasr.rnnt._frames import Padded, frames_of

SMALL = 1 << 18  # A small joiner has at most this many hidden values and logits.


def pruned_joiner_loss(
    am: Tensor | PackedFrames,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    use_hat_loss: bool = False,
    reduction: str | None = "mean",
    activation: Activation = "tanh",
    *,
    keep_logits: bool | None = None,
    zero_infinity: bool = False,
    fastemit_lambda: float = 0.0,
) -> Tensor:
    """Computes ``do_rnnt_pruning``, the joiner activation(am + lm) Wᵀ + bias, and ``rnnt_loss_pruned``, without the
    logits.

    Args:
        am: (B, T, D), the encoder's output after the joiner's projection, or packed frames (N, D).
        lm: (B, S + 1, D), the prediction network's output after the joiner's projection.
        weight: (V, D); bias: (V,) or None. The joiner's output layer.
        symbols: (B, S), integers in [0, V).
        ranges: (B, T, R) from ``get_rnnt_prune_ranges``.
        termination_symbol: blank, in [0, V).
        activation: tanh or relu.
        keep_logits: whether to keep logits for the backward pass instead of computing them again, which is faster and
            needs B T R V more numbers; None decides by their size.
        boundary, rnnt_type, delay_penalty, reduction, zero_infinity, fastemit_lambda: see ``fastasr.rnnt.losses``.
        use_hat_loss: see ``get_hat_logprobs_pruned``.
    """
    op = "rnnt.pruned_joiner_loss"
    longest = ranges.shape[1] if isinstance(am, PackedFrames) and isinstance(ranges, Tensor) else None
    am, frames, length, symbols, boundary = _checked(
        op, am, lm, weight, symbols, termination_symbol, boundary, rnnt_type, longest
    )
    starts = arguments.ranges(op, ranges, frames.batch, frames.frames, length, am)
    arguments.wide_enough(op, ranges.shape[2], length, rnnt_type)
    delay_penalty, factor = losses._numbers(op, delay_penalty, fastemit_lambda)
    contexts, line, places, inside = frames.joined(lm, symbols, frames.rows(starts), boundary)
    px, py = ops.rnnt_joiner(
        *(am, contexts, weight, bias, line, places),
        s_range=ranges.shape[2],
        termination_symbol=termination_symbol,
        boundary=inside,
        activation=activation,
        hat=_check.flag(op, "use_hat_loss", use_hat_loss),
        keep_logits=keep_logits,
    )
    px, py = negligible(frames.lattice(px), frames.lattice(py))
    return losses.over_band(
        op, px, py, starts, length, boundary, rnnt_type, delay_penalty, factor, reduction, zero_infinity
    )


def joiner_loss(
    am: Tensor | PackedFrames,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    use_hat_loss: bool = False,
    reduction: str | None = "mean",
    activation: Activation = "tanh",
    dropout_p: float = 0.0,
    *,
    keep_logits: bool | None = None,
    zero_infinity: bool = False,
    fastemit_lambda: float = 0.0,
    longest: int | None = None,
) -> Tensor:
    """Computes ``rnnt_loss`` of the joiner dropout(activation(am + lm)) Wᵀ + bias over the whole lattice, without its
    (B, T, S + 1, V) logits.

    A short utterance with few outputs (up to 1 MiB of logits and hidden values in float32) is the exception on the CPU:
    there the loss is computed from the logits, since that takes fewer calls.

    Args:
        dropout_p: dropout before the output layer, with random numbers of its own.
        longest: see ``fastasr.rnnt.losses``.
        The other arguments are those of ``pruned_joiner_loss``.
    """
    op = "rnnt.joiner_loss"
    delay_penalty, factor = losses._numbers(op, delay_penalty, fastemit_lambda)
    plain = rnnt_type == "regular" and delay_penalty == dropout_p == 0 and use_hat_loss is False
    may_be_small = plain and keep_logits is not False and activation in ACTIVATIONS
    if may_be_small and not isinstance(am, PackedFrames) and _is_small(am, lm, weight, bias):
        am, _, _, symbols, boundary = _checked(
            op, am, lm, weight, symbols, termination_symbol, boundary, rnnt_type, longest
        )
        if boundary is not None:
            s_begin, t_begin, s_end, t_end = boundary.unbind(1)
            am, lm = _cleared(am, t_begin, t_end - 1), _cleared(lm, s_begin, s_end)
        logits = F.linear(_activation.FUNCTIONS[activation](am.unsqueeze(2) + lm.unsqueeze(1)), weight, bias)
        rows = F.pad(symbols, (0, 1), value=termination_symbol).unsqueeze(1).expand(logits.shape[:3])
        loss = logits_losses.losses(logits, rows, boundary, termination_symbol, factor)
        return losses.reduced(op, loss, reduction, zero_infinity)
    px, py, boundary = logprobs_of_joiner(
        op, am, lm, weight, bias, symbols, termination_symbol, boundary, rnnt_type, use_hat_loss, activation,
        keep_logits, dropout_p, longest,
    )  # fmt: skip
    px, py = logprobs.lattice(op, px, py, boundary, rnnt_type, factor, delay_penalty)
    return losses.reduced(op, -ops.rnnt_lattice(px, py, boundary), reduction, zero_infinity)


def _is_small(am: Tensor, lm: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Says whether the logits are so few that calls cost more than the arithmetic: then eager products and one node for
    the loss are faster."""
    operands = (am, lm, weight) if bias is None else (am, lm, weight, bias)
    if not all(type(t) in PLAIN and t.dtype is torch.float32 and t.is_cpu for t in operands):
        return False
    if am.dim() != 3 or lm.dim() != 3 or weight.dim() != 2 or lm.shape[0] != am.shape[0]:
        return False
    rows = am.shape[0] * am.shape[1] * lm.shape[1]
    fits = bias is None or bias.shape == weight.shape[:1]
    calls = forced_backend() == "auto" and autocast_dtype(am) is None and not torch.compiler.is_compiling()
    return calls and fits and 0 < rows * sum(weight.shape) <= SMALL


def _cleared(x: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Returns x (B, N, D) with zeros outside [first, last] of each sequence: there x may hold anything."""
    at = torch.arange(x.shape[1], device=x.device, dtype=torch.int64)
    outside = (at < first.unsqueeze(1)) | (at > last.unsqueeze(1))
    return x.masked_fill(outside.unsqueeze(2), 0.0)


def logprobs_of_joiner(
    op: str, am: Tensor | PackedFrames, lm: Tensor, weight: Tensor, bias: Tensor | None, symbols: Tensor,
    termination_symbol: int, boundary: Tensor | None, rnnt_type: str, hat: bool, activation: Activation,
    keep_logits: bool | None, dropout_p: float = 0.0, longest: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Checks the arguments of the function ``op`` and returns the joiner's px (B, S, T) and py (B, S + 1, T), and the
    boundary."""
    am, frames, length, symbols, boundary = _checked(
        op, am, lm, weight, symbols, termination_symbol, boundary, rnnt_type, longest
    )
    if not multiplies_padding(am):
        am, frames = frames.lattice(am), Padded(frames.batch, frames.frames)
    starts = torch.zeros(am.shape[:2], dtype=torch.int64, device=am.device)
    contexts, line, starts, inside = frames.joined(lm, symbols, starts, boundary)
    px, py = ops.rnnt_joiner(
        *(am, contexts, weight, bias, line, starts),
        s_range=length + 1,
        termination_symbol=termination_symbol,
        boundary=inside,
        activation=activation,
        hat=_check.flag(op, "use_hat_loss", hat),
        keep_logits=keep_logits,
        dropout_p=float(dropout_p),
        dropout_seed=_weights_dropout.draw_seed(am.device) if dropout_p else None,
    )
    px, py = negligible(frames.lattice(px), frames.lattice(py))
    return px[:, :, :length].transpose(1, 2), py.transpose(1, 2), boundary


def multiplies_padding(am: Tensor) -> bool:
    """Says whether matrix products over the whole lattice hold rows outside the boundary. On a CPU they do not, so
    there packed frames are unpacked: as one sequence, recordings would have rows of labels that are padding."""
    return am.is_cuda


class _Negligible(Function):
    """Passes (px, py), and durations (..., N), through unchanged. In their gradients, cells with almost no
    part in any path count as having none, so that the joiner's backward pass leaves them out.

    A cell's part is |gx| + |gy|; the part of a sequence's first cell is the whole. A part below 1/64 of the dtype's
    rounding error (2e-9 in float32) of the whole does not show in sums over cells. With windows of 5 and random
    weights 43 % of the cells are below it.
    """

    @staticmethod
    def formula(*given: Tensor) -> tuple[Tensor, ...]:
        return given

    @staticmethod
    def forward(ctx: Any, px: Tensor, py: Tensor, *durations: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in (px, py, *durations))

    @staticmethod
    def backward(ctx: Any, gx: Tensor, gy: Tensor, *gd: Tensor) -> tuple[Tensor, ...]:
        part = F.pad(gx.abs(), (0, gy.shape[2] - gx.shape[2])) + gy.abs()
        if part.numel() == 0:
            return gx, gy, *gd
        negligible = part <= part.amax((1, 2), keepdim=True) * (torch.finfo(part.dtype).eps / 64)
        return (
            gx.masked_fill(negligible[:, :, : gx.shape[2]], 0.0),
            gy.masked_fill(negligible, 0.0),
            *(g.masked_fill(negligible.unsqueeze(-1), 0.0) for g in gd),
        )


negligible = _Negligible.apply


def _checked(
    op: str,
    am: Tensor | PackedFrames,
    lm: Tensor,
    weight: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None,
    rnnt_type: str,
    longest: int | None,
) -> tuple[Tensor, Padded, int, Tensor, Tensor | None]:
    """Returns (am (B, T, D) or (1, N, D), its layout, S, symbols, boundary)."""
    am, frames = frames_of(op, "am", am, "(B, T, D)", longest)
    arguments.floating(op, "lm", lm, "(B, S + 1, D)")
    arguments.floating(op, "weight", weight, "(V, D)")
    batch, channels, positions = frames.batch, am.shape[2], lm.shape[1]
    fits = lm.shape[0] == batch and lm.shape[2] == channels and positions >= 1
    _check.shape(op, "lm", lm, f"({batch}, S + 1, {channels}) with S >= 0", fits)
    _check.shape(
        op, "weight", weight, f"(V, {channels}) with V >= 1", weight.shape[1] == channels and len(weight) > 0
    )
    arguments.class_index(op, "termination_symbol", termination_symbol, weight.shape[0])
    boundary = frames.boundary(op, boundary, positions - 1, am)
    symbols = arguments.symbols(op, symbols, batch, positions - 1, len(weight), boundary, am)
    arguments.choice(op, "rnnt_type", rnnt_type, arguments.RNNT_TYPES)
    return frames.owned(am), frames, positions - 1, symbols, boundary
