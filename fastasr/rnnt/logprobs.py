# SPDX-License-Identifier: Apache-2.0
r"""From scores to the lattice's log-probabilities (px, py), for every joiner and lattice type.

px[b, s, t] is the log-probability of symbol s + 1 after s symbols at frame t, py[b, s, t] that of blank there.
Lattice types:

- ``regular``: px is (B, S, T + 1). Column T, and with a boundary the column t_end, is −∞: no symbol after the
  last frame.
- ``modified``: px is (B, S, T); a symbol takes its frame along, so there is at most one per frame.
- ``constrained``: as modified, and each symbol also pays for the blank of the next context on its frame,
  px += py[:, 1:].

py is (B, S + 1, T). Half-precision scores give float32 log-probabilities. Names, arguments and results are those of
k2 1.24.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr._transforms import Function, is_transformed
from fastasr.ops._dispatch import forced_backend
from fastasr.packed_frames import PackedFrames
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check
from fastasr.rnnt._frames import Padded, frames_of
from fastasr.rnnt.additive import additive_logprobs
from fastasr.rnnt.rows import row_logprobs


# --------------------------------------------------------------------------- additive joiner
def get_rnnt_logprobs(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    rnnt_type: str = "regular",
    boundary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (px, py) of the joiner whose logits are am[b, t] + lm[b, s].

    Args:
        lm: (B, S + 1, C), the prediction network's part.
        am: (B, T, C), the encoder's part.
        symbols: (B, S), integers in [0, C).
        termination_symbol: blank, in [0, C).
        rnnt_type: regular, modified or constrained.
        boundary: (B, 4), rows [s_begin, t_begin, s_end, t_end]; None: whole sequences.
    """
    return additive(
        "rnnt.get_rnnt_logprobs", lm, am, symbols, termination_symbol, 0.0, 0.0, boundary, rnnt_type
    )


def get_rnnt_logprobs_smoothed(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Returns (px, py) interpolated, in the log domain, between the additive joiner and each of its two models alone.

    lm_only_scale · lm + am_only_scale · am + (1 − lm_only_scale − am_only_scale) · joint; the am alone is weighted with
    the unigram that lm averages to over the whole batch. The other arguments are those of ``get_rnnt_logprobs``.
    """
    op = "rnnt.get_rnnt_logprobs_smoothed"
    return additive(
        op, lm, am, symbols, termination_symbol, lm_only_scale, am_only_scale, boundary, rnnt_type
    )


def additive(
    op: str,
    lm: Tensor,
    am: Tensor | PackedFrames,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float,
    am_only_scale: float,
    boundary: Tensor | None,
    rnnt_type: str,
    symbol_gradient: float = 1.0,
    delay_penalty: float = 0.0,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes (px, py) of the additive joiner for the function ``op``."""
    arguments.floating(op, "lm", lm, "(B, S + 1, C)")
    am, frames = frames_of(op, "am", am, "(B, T, C)", longest)
    batch, positions, classes = lm.shape
    _check.shape(op, "lm", lm, "(B, S + 1, C) with S >= 0, C >= 1", positions >= 1 and classes >= 1)
    fits = frames.batch == batch and am.shape[2] == classes
    _check.shape(op, "am", am, f"({batch}, T, {classes})", fits)
    _check.same_device(op, "am", am, lm, "lm")
    arguments.choice(op, "rnnt_type", rnnt_type, arguments.RNNT_TYPES)
    arguments.class_index(op, "termination_symbol", termination_symbol, classes)
    lm_only_scale = _check.number(op, "lm_only_scale", lm_only_scale)
    am_only_scale = _check.number(op, "am_only_scale", am_only_scale)
    boundary = frames.boundary(op, boundary, positions - 1, lm)
    symbols = arguments.symbols(op, symbols, batch, positions - 1, classes, boundary, lm)
    px, py = additive_logprobs(lm, am, frames, symbols, termination_symbol, lm_only_scale, am_only_scale)
    return lattice(op, px, py, boundary, rnnt_type, symbol_gradient, delay_penalty)


# --------------------------------------------------------------------------- a joiner's logits
def get_rnnt_logprobs_joint(
    logits: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    rnnt_type: str = "regular",
    boundary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (px, py) of logits (B, T, S + 1, C). The other arguments are those of ``get_rnnt_logprobs``.

    fast_rnnt has the last two arguments in the opposite order; this function accepts either order.
    """
    if isinstance(rnnt_type, Tensor) or isinstance(boundary, str):
        rnnt_type, boundary = "regular" if boundary is None else boundary, rnnt_type
    return joint("rnnt.get_rnnt_logprobs_joint", logits, symbols, termination_symbol, boundary, rnnt_type)


def joint(
    op: str,
    logits: Tensor | PackedFrames,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None,
    rnnt_type: str,
    symbol_gradient: float = 1.0,
    delay_penalty: float = 0.0,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes (px, py) of a full joiner's logits for the function ``op``."""
    rows, frames = frames_of(op, "logits", logits, "(B, T, S + 1, C)", longest)
    positions, classes = rows.shape[2:]
    _check.shape(op, "logits", rows, "(B, T, S + 1, C) with S >= 0, C >= 1", positions >= 1 and classes >= 1)
    arguments.choice(op, "rnnt_type", rnnt_type, arguments.RNNT_TYPES)
    arguments.class_index(op, "termination_symbol", termination_symbol, classes)
    boundary = frames.boundary(op, boundary, positions - 1, rows)
    symbols = arguments.symbols(op, symbols, frames.batch, positions - 1, classes, boundary, rows)
    labels = frames.repeated(F.pad(symbols, (0, 1), value=termination_symbol))
    px, py = row_scores(frames, rows, labels, termination_symbol)
    px, py = px[:, :, : positions - 1].transpose(1, 2), py.transpose(1, 2).contiguous()
    return lattice(op, px, py, boundary, rnnt_type, symbol_gradient, delay_penalty)


def row_scores(
    frames: Padded, rows: Tensor, labels: Tensor, blank: int, hat: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns ``row_logprobs`` of the logits of frames as numbers of the lattice."""
    if forced_backend() == "eager" or is_transformed():
        rows = frames.owned(rows)
    px, py = row_logprobs(rows, labels, blank, hat)
    return frames.lattice(px), frames.lattice(py)


def get_rnnt_logprobs_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Returns (px, py) of logits (B, T, R, C) of the cells in ``ranges`` (B, T, R); −∞ elsewhere in the lattice.

    ``ranges`` come from ``get_rnnt_prune_ranges``. The other arguments are those of ``get_rnnt_logprobs``.
    """
    op = "rnnt.get_rnnt_logprobs_pruned"
    return pruned(op, logits, symbols, ranges, termination_symbol, boundary, rnnt_type, False)


def get_hat_logprobs_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Does the same as ``get_rnnt_logprobs_pruned`` for a hybrid autoregressive transducer: blank is a Bernoulli
    variable on its logit, and symbols share 1 − P(blank) by a softmax without it. Any class may be blank (k2: class 0).
    """
    op = "rnnt.get_hat_logprobs_pruned"
    return pruned(op, logits, symbols, ranges, termination_symbol, boundary, rnnt_type, True)


def pruned(
    op: str,
    logits: Tensor | PackedFrames,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None,
    rnnt_type: str,
    hat: bool,
    symbol_gradient: float = 1.0,
    delay_penalty: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Computes (px, py) over the whole lattice of a pruned joiner's logits for the function ``op``."""
    px, py, starts, boundary = pruned_rows(
        op, logits, symbols, ranges, termination_symbol, boundary, rnnt_type, hat
    )
    length = symbols.shape[1]
    px, py = scatter(px, starts, length), scatter(py, starts, length + 1)
    return lattice(op, px, py, boundary, rnnt_type, symbol_gradient, delay_penalty)


def pruned_rows(
    op: str,
    logits: Tensor | PackedFrames,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None,
    rnnt_type: str,
    hat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Checks the arguments and returns (px, py, both (B, T, R), starts, boundary)."""
    longest = ranges.shape[1] if isinstance(logits, PackedFrames) and isinstance(ranges, Tensor) else None
    rows, frames = frames_of(op, "logits", logits, "(B, T, R, C)", longest)
    batch, (width, classes) = frames.batch, rows.shape[2:]
    _check.shape(op, "logits", rows, "(B, T, R, C) with C >= 1", classes >= 1)
    arguments.choice(op, "rnnt_type", rnnt_type, arguments.RNNT_TYPES)
    arguments.class_index(op, "termination_symbol", termination_symbol, classes)
    length = arguments.integers(op, "symbols", symbols, (batch, None), rows, "the scores").shape[1]
    boundary = frames.boundary(op, boundary, length, rows)
    symbols = arguments.symbols(op, symbols, batch, length, classes, boundary, rows)
    starts = arguments.ranges(op, ranges, batch, frames.frames, length, rows)
    _check.shape(
        op,
        "logits",
        rows,
        f"({rows.shape[0]}, {rows.shape[1]}, {ranges.shape[2]}, C)",
        width == ranges.shape[2],
    )
    arguments.wide_enough(op, width, length, rnnt_type)
    index = ranges.reshape(batch, frames.frames * width).to(torch.int64)
    labels = F.pad(symbols, (0, 1), value=termination_symbol).gather(1, index)
    labels = frames.rows(labels.view(batch, frames.frames, width))
    px, py = row_scores(frames, rows, labels, termination_symbol, hat)
    return px, py, starts, boundary


def scatter(band: Tensor, starts: Tensor, rows: int) -> Tensor:
    """Places (B, T, R) at s = starts + r in (B, rows, T), with −∞ outside the band."""
    width = band.shape[2]
    row = torch.arange(rows, device=band.device, dtype=torch.int64).view(1, -1, 1)
    r = row - starts.unsqueeze(1)  # (B, rows, T)
    inside = (r >= 0) & (r < width)
    return torch.where(inside, band.transpose(1, 2).gather(1, r.clamp(0, width - 1)), -math.inf)


# --------------------------------------------------------------------------- lattice types
class _ScaleGradient(Function):
    """Passes x through and multiplies its gradient by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else _ScaleGradient.apply(x, factor)


def delay(px: Tensor, penalty: float, boundary: Tensor | None, frames: int, time: int) -> Tensor:
    """Returns px + penalty · ((T_b − 1) / 2 − t), where t runs over px's dimension of frames."""
    t = torch.arange(px.shape[time], device=px.device, dtype=px.dtype)
    if boundary is None:
        bonus = (frames - 1) / 2 - t.unsqueeze(0)
    else:
        bonus = ((boundary[:, 3:] - 1) / 2).to(px.dtype) - t
    return px + (penalty * bonus).unsqueeze(1 if time == 2 else 2)


def lattice(
    op: str,
    px: Tensor,
    py: Tensor,
    boundary: Tensor | None,
    rnnt_type: str,
    symbol_gradient: float = 1.0,
    delay_penalty: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Returns (px, py) of the lattice type, from the joiner's px (B, S, T) and py (B, S + 1, T).

    ``symbol_gradient`` multiplies the gradient of the joiner's own symbol log-probabilities.
    """
    frames = py.shape[2]
    px = scale_gradient(px, symbol_gradient)
    if delay_penalty:
        px = delay(px, delay_penalty, boundary, frames, 2)
    if rnnt_type == "constrained":
        px = px + py[:, 1:]
    if rnnt_type == "regular":
        px = F.pad(px, (0, 1), value=-math.inf)
        if boundary is not None:
            after = torch.arange(frames + 1, device=px.device, dtype=torch.int64) == boundary[:, 3:]
            px = px.masked_fill(after.unsqueeze(1), -math.inf)
    return px, py
