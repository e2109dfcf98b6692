# SPDX-License-Identifier: Apache-2.0
r"""The lattice of a transducer inside a band: R cells of each frame, as pruning leaves them.

Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training" (2022), section 3. Cell (t, r) of the band is cell
s = ``starts[b, t]`` + r of frame t in the whole lattice, see :mod:`fastasr.ops.rnnt_lattice`; cells outside the band
have no outgoing arcs. With x = ``symbol_logprobs`` and y = ``blank_logprobs``, both (B, T, R), c the cells in which a
frame is entered and d = starts[t+1] - starts[t]:

    regular   p[t,r] = log(e^c[t,r] + e^(p[t,r-1] + x[t,r-1])),  a[t,j] = p[t,j] + y[t,j]
    modified  p[t,r] = c[t,r],  a[t,j] = log(e^(p[t,j-1] + x[t,j-1]) + e^(p[t,j] + y[t,j]))
    c[t+1,r] = a[t,r+d]

a has R + 1 cells: the modified lattice may leave a window at its top, and enter the next one. The whole
lattice, with the band scattered into -inf, gives the same. Bytes per cell of e bytes: forward 2 e (3 e when shares are
kept), backward 3 e. Upstream scatters: ``rnnt_loss_pruned`` of k2 and fast_rnnt.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._dispatch import Kernels
from fastasr.ops._lattice import (
    INF,
    Scores,
    check_boundary,
    launch,
    log_add,
    log_probabilities,
    occupation,
    share,
    values_are_checked,
    whole,
    within,
)
from fastasr.ops._op import Arguments, Op, op


# --------------------------------------------------------------------------- the formula, frame by frame
class _Band:
    def __init__(self, x: Tensor, y: Tensor, starts: Tensor, boundary: Tensor | None, modified: bool) -> None:
        _, frames, window = x.shape
        if boundary is None:
            top = starts[:, -1] + (window - 1) if frames else starts.sum(1)
            boundary = whole(top, frames)
        self.starts, self.modified = starts, modified
        s = starts[..., None] + torch.arange(window + 1, device=x.device, dtype=torch.int64)  # (B, T, R + 1)
        t = torch.arange(frames, device=x.device, dtype=torch.int64)[:, None]
        inside_x, inside_y = within(boundary, s[..., :-1], t, not modified)
        if not modified:
            inside_x = inside_x & (torch.arange(window, device=x.device, dtype=torch.int64) + 1 < window)
        self.inside = inside_x, inside_y
        self.x, self.y, self.poisoned = log_probabilities(x, y, *self.inside)
        s_begin, t_begin, s_end, t_end = (boundary[:, i].view(-1, 1, 1) for i in range(4))
        self.empty = ((s_begin == s_end) & (t_begin == t_end)).view(-1)
        self.begins = (s[..., :-1] == s_begin) & (t == t_begin)
        # The end is a cell of its frame's window; if the window lacks that cell, the last frame's arcs lead to it.
        self.ends = (s[..., :-1] == s_end) & (t == t_end)
        in_window = F.pad(self.ends.any(2, keepdim=True)[:, 1:], (0, 0, 0, 1))
        self.leaves = (s == s_end) & (t + 1 == t_end) & ~in_window

    def _moved(self, cells: Tensor, t: int, to: int, width: int, fill: float) -> Tensor:
        """Returns (B, width): the cells of frame t's window at their places in frame ``to``'s, with ``fill`` beside
        them.
        """
        at = (
            torch.arange(width, device=cells.device, dtype=torch.int64)
            + (self.starts[:, to] - self.starts[:, t])[:, None]
        )
        there = (at >= 0) & (at < cells.shape[1])
        return torch.where(there, cells.gather(1, at.clamp(0, cells.shape[1] - 1)), fill)

    def cells(self) -> tuple[Tensor, Tensor]:
        """Returns (p, a), (B, T, R) and (B, T, R + 1)."""
        batch, frames, window = self.x.shape
        p = self.x.new_full((batch, window), -INF)
        ps: list[Tensor] = []
        leaving: list[Tensor] = []
        for t in range(frames):
            if t:
                p = self._moved(leaving[-1], t - 1, t, window, -INF)
            x, y = self.x[:, t], self.y[:, t]
            p = torch.where(self.begins[:, t], 0.0, p)
            if not self.modified:
                p = self._along_frame(p, x)
            a = F.pad(p + y, (0, 1), value=-INF)
            if self.modified:
                a = log_add(F.pad(p + x, (1, 0), value=-INF), a)
            ps.append(p)
            leaving.append(a)
        if not frames:
            return self.x, F.pad(self.y, (0, 1))
        return torch.stack(ps, 1), torch.stack(leaving, 1)

    @staticmethod
    def _along_frame(p: Tensor, x: Tensor) -> Tensor:
        cells = list(p.unbind(1))
        for r in range(1, len(cells)):
            cells[r] = log_add(cells[r], cells[r - 1] + x[:, r - 1])
        return torch.stack(cells, 1)

    def scores(self, p: Tensor, a: Tensor) -> Tensor:
        scores = torch.where(self.ends, p, 0.0).sum((1, 2)) + torch.where(self.leaves, a, 0.0).sum((1, 2))
        # zeros give gradients even without arcs
        scores = scores + self.x[:, :0].sum((1, 2)) + self.y[:, :0].sum((1, 2))
        reached = (self.ends.any(2) | self.leaves.any(2)).any(1) & (scores != -INF)
        scores = torch.where(reached, scores, -INF)  # no gradient where no path reaches the end
        return torch.where(self.poisoned, float("nan"), torch.where(self.empty, 0.0, scores))

    def occupations(self, p: Tensor, a: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of the scores by x and y."""
        _, frames, window = self.x.shape
        if self.modified:  # the shares are those of the symbol arcs in a, else in p
            shares = share(F.pad(p + self.x, (1, 0), value=-INF), a)
        else:
            shares = share(p[..., :-1] + self.x[..., :-1], p[..., 1:])
        end = scores.isfinite().to(p.dtype)[:, None]
        dx, dy, g = torch.zeros_like(self.x), torch.zeros_like(self.y), None
        for t in range(frames - 1, -1, -1):
            into = end * self.leaves[:, t]
            if g is not None:
                into = into + self._moved(g, t + 1, t, window + 1, 0.0)
            g = end * self.ends[:, t]  # no arc of its frame leads on, but symbols lead along it
            if self.modified:
                symbol = into * shares[:, t]
                dx[:, t], dy[:, t] = symbol[:, 1:], (into - symbol)[:, :-1]
                g = g + dx[:, t] + dy[:, t]
                continue
            dy[:, t] = into[:, :-1]
            g = g + into[:, :-1]
            for r in range(window - 1, 0, -1):
                dx[:, t, r - 1] = symbol = g[:, r] * shares[:, t, r - 1]
                g[:, r] -= symbol
                g[:, r - 1] += symbol
        inside_x, inside_y = self.inside
        return occupation(dx, scores, inside_x), occupation(dy, scores, inside_y)


# --------------------------------------------------------------------------- kernels
def _check(op: Op, a: Arguments) -> None:
    starts = a.starts
    if values_are_checked(starts):
        wrong = (starts < 0).any(1) | (starts[:, 1:] < starts[:, :-1]).any(1)
        if wrong.any():
            expected = "numbers >= 0 that do not decrease along a row"
            op.fail("starts", expected, f"others in row {int(wrong.nonzero()[0])}")
    check_boundary(op, a.boundary, None, a.symbol_logprobs.shape[1])


def _kept_shape(backend: str, a: Arguments) -> tuple[int, ...]:
    """Returns the shape of R + 1 shares per frame; the C++ kernels keep sixteen sequences side by side."""
    batch, frames, window = a.symbol_logprobs.shape
    return ((batch + 15) // 16, frames, window + 1, 16) if backend == "cpu" else (batch, frames, window + 1)


def _call(
    kernels: Kernels,
    keep: bool,
    x: Tensor,
    y: Tensor,
    starts: Tensor,
    boundary: Tensor | None,
    modified: bool,
    return_occupation: bool,
) -> tuple[Any, ...]:
    scores, shares = kernels.forward(x, y, starts, boundary, modified, keep or return_occupation)
    if not return_occupation:
        return scores, None, None, shares
    occupations = kernels.backward(None, scores, shares, starts, boundary, x.shape[2], modified)
    return scores, *occupations, shares if keep else None


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> list[Tensor]:
    return launch(_call, kernels, a, dtype, keep)


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    keeps={"shares": Annotated[Tensor, _kept_shape, "wide scores"]},
    forward="symbol_logprobs blank_logprobs starts boundary modified keep",
    backward="grad scores shares starts boundary symbol_logprobs.shape[2] modified",
    check=_check,
    launch=_launch,
    fast=_call,
)
def rnnt_pruned_lattice(
    symbol_logprobs: Annotated[Tensor, "B T R, R >= 1"],
    blank_logprobs: Annotated[Tensor, "B T R"],
    starts: Annotated[Tensor, "B T", torch.int64],
    boundary: Annotated[Tensor, "B 4", torch.int64] | None = None,
    *,
    modified: bool = False,
    return_occupation: bool = False,
) -> (
    Scores
    | tuple[
        Scores,
        Annotated[Tensor, "symbol_occupation: B T R", "wide scores", "constant"],
        Annotated[Tensor, "blank_occupation: B T R", "wide scores", "constant"],
    ]
):
    """Returns the log of the summed probability of all paths through each lattice that stay inside the band.

    Args:
        symbol_logprobs, blank_logprobs: (B, T, R), log probabilities of symbol s+1 and of a blank in cell (s, t),
            s = starts[b, t] + r. float32, bfloat16, float16 or float64; special values as in ``rnnt_lattice``. The
            last column's symbols are not used in the regular lattice: they leave the band.
        starts: (B, T) int64, the first s of each frame's window; it does not decrease along t.
        boundary: (B, 4) int64, [s_begin, t_begin, s_end, t_end]; None: from (0, 0) to the top of the last window,
            [0, 0, starts[b, -1] + R - 1, T].
        modified: a symbol takes a frame.
        return_occupation: return occupations too.
    Returns:
        scores (B,), of float64 if an argument is, else of float32; -inf where no path reaches the end. With
        ``return_occupation`` (scores, symbol_occupation, blank_occupation), see ``rnnt_lattice``.
    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes or devices do not match; on the CPU: starts that decrease or are negative, a boundary that is
            not in order or ends after T. On a GPU these are not checked, because reading them would stall it: nothing
            outside the tensors is read, and the result is unspecified.
    """
    band = _Band(symbol_logprobs, blank_logprobs, starts, boundary, modified)
    cells = band.cells()
    scores = band.scores(*cells)
    if not return_occupation:
        return scores
    with torch.no_grad():
        return scores, *band.occupations(*cells, scores)
