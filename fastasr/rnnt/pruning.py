# SPDX-License-Identifier: Apache-2.0
r"""Windows of the lattice that keep most of its mass, from the occupation probabilities of a cheap joiner.

Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training" (2022), section 3.2. For every frame t the
functions choose the window of R positions that holds the most probability: Σ_{s in window} blank occupation, less the
symbol occupation that enters it from below. They then turn the starts into a path that a transducer can follow: the
starts never go back, step by less than R (by at most 1 where a symbol takes a frame), begin at 0 and end with the last
symbol in the window.
"""

import warnings
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.packed_frames import PackedFrames
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check
from fastasr.rnnt._frames import Packed, frames_of


def get_rnnt_prune_ranges(px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int) -> Tensor:
    """Returns the positions (B, T, R) to keep at each frame, int64.

    Args:
        px_grad: (B, S, T + 1) or (B, S, T), occupation of the symbol arcs, as ``return_grad=True`` gives them.
        py_grad: (B, S + 1, T), occupation of the blank arcs.
        boundary: (B, 4), rows [s_begin, t_begin, s_end, t_end].
        s_range: R, positions per frame, at least 2 in a regular lattice; an R above S + 1 counts as S + 1.

    In a regular lattice T frames with windows of R reach at most T (R − 1) symbols. Where a sequence has more, R
    grows to the smallest that reaches them all, with a warning; on a GPU that would mean waiting for the boundary,
    so R stays as it is there, and the pruned loss of such a sequence is infinite (``zero_infinity`` drops it).
    """
    op = "rnnt.get_rnnt_prune_ranges"
    px_grad, py_grad, boundary, s_range = _checked(op, px_grad, py_grad, boundary, s_range)
    length, frames, width = px_grad.shape[1], py_grad.shape[2], px_grad.shape[2]
    if width != frames and not boundary.is_cuda and not torch.compiler.is_compiling():
        least = _least_range(boundary)
        if s_range < least:
            warnings.warn(
                f"fastasr.{op}: s_range {s_range} cannot reach all symbols of a sequence: {least} is taken",
                stacklevel=2,
            )
            s_range = least
    s_range = _clip(op, s_range, length, width != frames)
    kept = py_grad.unfold(1, s_range, 1).movedim(-1, 2).sum(2)  # (B, S + 2 - R, T)
    entering = F.pad(px_grad[:, :, :frames], (0, 0, 1, 0))[:, : kept.shape[1]]
    return _windows(
        torch.argmax(kept - entering, dim=1), boundary, s_range, s_range if width != frames else 2
    )


def get_rnnt_prune_ranges_deprecated(
    px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int
) -> Tensor:
    """Computes windows by the sum of both occupations, as k2's first version did. The arguments are those of
    ``get_rnnt_prune_ranges``.
    """
    op = "rnnt.get_rnnt_prune_ranges_deprecated"
    px_grad, py_grad, boundary, s_range = _checked(op, px_grad, py_grad, boundary, s_range)
    length, frames, width = px_grad.shape[1], py_grad.shape[2], px_grad.shape[2]
    s_range = _clip(op, s_range, length, width != frames)
    mass = F.pad(px_grad, (0, 0, 0, 1)) + F.pad(py_grad, (0, width - frames))
    below = torch.cumsum(F.pad(mass, (0, 0, 1, 0)), dim=1)  # (B, S + 2, width)
    best = torch.argmax(below[:, s_range:] - below[:, :-s_range], dim=1)[:, :frames]
    return _windows(best, boundary, s_range, s_range if width != frames else 2)


@overload
def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]: ...


@overload
def do_rnnt_pruning(am: PackedFrames, lm: Tensor, ranges: Tensor) -> tuple[PackedFrames, PackedFrames]: ...


def do_rnnt_pruning(
    am: Tensor | PackedFrames, lm: Tensor, ranges: Tensor
) -> tuple[Tensor, Tensor] | tuple[PackedFrames, PackedFrames]:
    """Returns am (B, T, C) and lm (B, S + 1, C) at the positions in ``ranges`` (B, T, R): both (B, T, R, C); am's is a
    view. Packed frames am (N, C) give packed frames (N, R, C), 0 at frames of nobody.
    """
    op = "rnnt.do_rnnt_pruning"
    longest = ranges.shape[1] if isinstance(am, PackedFrames) and isinstance(ranges, Tensor) else None
    rows, frames = frames_of(op, "am", am, "(B, T, C)", longest)
    arguments.floating(op, "lm", lm, "(B, S + 1, D)")
    batch, (_, positions, width) = frames.batch, lm.shape
    _check.shape(op, "lm", lm, f"({batch}, S + 1, D)", lm.shape[0] == batch)
    ranges = arguments.integers(op, "ranges", ranges, (batch, frames.frames, None), rows, "am")
    if arguments.has_values(ranges):
        inside = (ranges >= 0) & (ranges < positions)
        arguments.holds(op, "ranges", inside, f"positions in [0, S] = [0, {positions - 1}]", ranges)
    s_range = ranges.shape[2]
    if isinstance(am, PackedFrames) and isinstance(frames, Packed):
        index = frames.rows(ranges)[0] + frames.recording[:, None] * positions
        contexts = lm.flatten(0, 1).index_select(0, index.flatten()).view(1, *index.shape, width)
        found = frames.owned(rows).unsqueeze(2).expand(-1, -1, s_range, -1), frames.owned(contexts)
        of_am, of_lm = (am._replace(frames=t[0]) for t in found)
        return of_am, of_lm
    index = ranges.reshape(batch, frames.frames * s_range, 1).expand(-1, -1, width)
    return (
        rows.unsqueeze(2).expand(-1, -1, s_range, -1),
        lm.gather(1, index).view(batch, frames.frames, s_range, width),
    )


def _checked(
    op: str, px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    arguments.arcs(op, "px_grad", px_grad, "py_grad", py_grad)
    if boundary is None:
        raise TypeError(f"fastasr.{op}: boundary: expected an integer tensor, got None")
    (batch, length), frames = px_grad.shape[:2], py_grad.shape[2]
    boundary = arguments.boundary(op, boundary, batch, length, frames, px_grad)
    return px_grad.detach(), py_grad.detach(), boundary, _check.integer(op, "s_range", s_range)


def _least_range(boundary: Tensor) -> int:
    """Returns the smallest R with T_b (R − 1) >= S_b for every sequence that has frames."""
    if boundary.shape[0] == 0:
        return 1
    symbols, frames = boundary[:, 2], boundary[:, 3]
    reach = torch.div(symbols - 1, frames.clamp(min=1), rounding_mode="trunc") + 2
    return int(torch.where(frames > 0, reach, 1).max())


def _clip(op: str, s_range: int, length: int, regular: bool) -> int:
    least = 2 if regular else 1
    if s_range > length:
        return length + 1
    if s_range < least:
        kind = "regular" if regular else "modified or constrained"
        raise ValueError(
            f"fastasr.{op}: s_range: expected at least {least} for a {kind} lattice, got {s_range}"
        )
    return s_range


def _never_falling(x: Tensor) -> Tensor:
    """Returns the largest sequence below x that does not fall over the last dimension."""
    return x.flip(-1).cummin(-1).values.flip(-1)


def _windows(best: Tensor, boundary: Tensor, s_range: int, step: int) -> Tensor:
    """Returns the windows that begin at ``best`` (B, T), corrected to rise from 0 by less than ``step`` to the last
    symbol.
    """
    t = torch.arange(best.shape[1], device=best.device, dtype=torch.int64)
    final = (boundary[:, 2:3] - s_range + 1).clamp(min=0)
    lower = _never_falling(torch.where(t < boundary[:, 3:] - 1, best, final))
    fastest = t * (step - 1)
    starts = fastest - _never_falling(fastest - lower).clamp(min=0)
    return starts.unsqueeze(2) + torch.arange(s_range, device=best.device, dtype=torch.int64)
