# SPDX-License-Identifier: Apache-2.0
r"""The lattice of a transducer: the log of the summed probability of all paths, and how much each arc takes part.

Graves, "Sequence transduction with recurrent neural networks" (2012); Kuang et al., "Pruned RNN-T" (2022), section 2.
Cells (s, t): s symbols were emitted by frame t. With x = ``symbol_logprobs`` and y = ``blank_logprobs``, p = 0 at the
beginning of the boundary:

    regular   p[s,t] = log(e^(p[s-1,t] + x[s-1,t]) + e^(p[s,t-1] + y[s,t-1])),      x (B, S, T+1), y (B, S+1, T)
    modified  p[s,t] = log(e^(p[s-1,t-1] + x[s-1,t-1]) + e^(p[s,t-1] + y[s,t-1])),  x (B, S, T): a symbol takes a frame

    score = p[s_end, t_end]

The occupation of an arc is the probability that a path takes it, and the gradient of the score. With w the share of the
symbol arc in cell (s, t), w = e^(p[s-1,t] + x[s-1,t] - p[s,t]), and g = 1 at the end, backward from there:

    symbol_occupation = w g          blank_occupation = (1 - w) g          g of a cell = the sum over its outgoing arcs

A forward keeps the shares alone, one number per cell; gradients are products and sums of them. Bytes per cell of e
bytes: forward 2 e (3 e when shares are kept), backward 3 e. Upstream:
``mutual_information_recursion`` of k2 and fast_rnnt.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._lattice import (
    INF,
    check_boundary,
    launch,
    log_add,
    log_probabilities,
    occupation,
    share,
    whole,
    within,
)
from fastasr.ops._op import op


# --------------------------------------------------------------------------- the formula, step by step
class Steps:
    """A batch of lattices by steps k: a regular lattice's anti-diagonals s + t, a modified one's frames. The arcs that
    leave a step are (K, B, S+1) each, by the s they enter.
    """

    def __init__(self, x: Tensor, y: Tensor, boundary: Tensor | None):
        batch, symbols, width = x.shape
        frames = y.shape[2]
        self.regular = width > frames
        self.steps = frames + symbols * self.regular
        if boundary is None:
            boundary = whole(torch.full((batch,), symbols, device=x.device, dtype=torch.int64), frames)
        limits = zip(boundary.unbind(1), (symbols, frames, symbols, frames), strict=True)
        boundary = torch.stack([column.clamp(0, most) for column, most in limits], 1)
        self.row, t = (torch.arange(n, device=x.device, dtype=torch.int64) for n in (symbols + 1, width))
        inside_x, inside_y = within(boundary, self.row[:, None], t, self.regular)
        self.inside = inside_x[:, :-1], inside_y[..., :frames]
        x, y, self.poisoned = log_probabilities(x, y, *self.inside)
        self.x, self.y = F.pad(self._to_steps(x), (1, 0), value=-INF), self._to_steps(y)
        self.begin, self.end = boundary[:, :2], boundary[:, 2:]  # (s, t)

    def _to_steps(self, x: Tensor) -> Tensor:
        """Maps (B, R, W) to (K, B, R): row s of a regular lattice moves s steps on; reading rows of K + 1 as rows of K
        does that.
        """
        if self.regular:
            batch, rows, width = x.shape
            x = F.pad(x, (0, self.steps + 1 - width), value=-INF).flatten(1)
            x = x[:, : rows * self.steps].reshape(batch, rows, self.steps)
        return x.permute(2, 0, 1)

    def _from_steps(self, x: Tensor, width: int) -> Tensor:
        x = x.permute(1, 2, 0)
        if self.regular:
            batch, rows, steps = x.shape
            x = F.pad(x.flatten(1), (0, rows)).reshape(batch, rows, steps + 1)
        return x[..., :width]

    def step_of(self, cell: Tensor) -> Tensor:
        """Returns the step of cells (s, t)."""
        return cell.sum(1) if self.regular else cell[:, 1]

    def _at(self, cell: Tensor, k: int) -> Tensor:
        """Returns (B, S+1): the cell, where it is in step k."""
        return (self.row == cell[:, :1]) & (self.step_of(cell) == k)[:, None]

    def cells(self, add=log_add) -> Tensor:
        """Returns p by steps, (K + 1, B, S + 1). ``add`` joins the symbol arc that enters a cell and the blank arc."""
        p = self.y.new_full((len(self.begin), len(self.row)), -INF)
        cells = []
        for k in range(self.steps + 1):
            if k:
                entering = F.pad(p[:, :-1], (1, 0), value=-INF)
                p = add(entering + self.x[k - 1], p + self.y[k - 1])
            p = torch.where(self._at(self.begin, k), 0.0, p)
            cells.append(p)
        return torch.stack(cells)

    def scores(self, cells: Tensor) -> Tensor:
        batch = torch.arange(len(self.end), device=cells.device, dtype=torch.int64)
        scores = cells[self.step_of(self.end), batch, self.end[:, 0]]
        # zeros give gradients even without arcs
        scores = scores + self.x[:0].sum((0, 2)) + self.y[:0].sum((0, 2))
        return torch.where(self.poisoned, float("nan"), scores)

    def occupations(self, cells: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of the scores by x and y."""
        entering = F.pad(cells[:-1, :, :-1], (1, 0), value=-INF) + self.x
        shares = share(entering, cells[1:])  # shares of the symbol arc in each cell
        dx, dy, g = torch.empty_like(self.x), torch.empty_like(self.y), torch.zeros_like(cells[0])
        for k in range(self.steps - 1, -1, -1):
            g = torch.where(self._at(self.end, k + 1), scores.isfinite().to(g.dtype)[:, None], g)
            dx[k] = g * shares[k]
            dy[k] = g - dx[k]
            g = dy[k] + F.pad(dx[k, :, 1:], (0, 1))
        dx = self._from_steps(dx[..., 1:], self.inside[0].shape[2])
        dy = self._from_steps(dy, self.inside[1].shape[2])
        return occupation(dx, scores, self.inside[0]), occupation(dy, scores, self.inside[1])


# --------------------------------------------------------------------------- kernels
def _check(op, a) -> None:
    x, frames = a.symbol_logprobs, a.blank_logprobs.shape[2]
    if x.shape[2] - frames not in (0, 1):
        expected = "shape (B, S, T+1) or (B, S, T), T being that of blank_logprobs"
        op.fail("symbol_logprobs", expected, tuple(x.shape))
    check_boundary(op, a.boundary, x.shape[1], frames)


def _kept_shape(backend: str, a) -> tuple[int, int, int]:
    """Returns the shape of S + 1 shares per step (C++) or frame (Triton), padded to what the kernels read fastest."""
    batch, symbols, width = a.symbol_logprobs.shape
    frames = a.blank_logprobs.shape[2]
    if backend == "triton":
        return batch, symbols + 1, (frames + 16) // 16 * 16
    row = (symbols + 16) // 16 * 16
    if width == frames:
        return batch, frames, row
    return batch, frames + symbols, torch.sym_min(row, (frames + 63) // 16 * 16)


def _call(kernels, keep: bool, x, y, boundary, return_occupation: bool):
    scores, shares = kernels.forward(x, y, boundary, keep or return_occupation)
    if not return_occupation:
        return scores, None, None, shares
    sizes = x.shape[1], x.shape[2], y.shape[2]
    return scores, *kernels.backward(None, scores, shares, boundary, *sizes), shares if keep else None


def _launch(op, kernels, a, dtype: torch.dtype, keep: bool) -> list[Tensor]:
    return launch(_call, kernels, a, dtype, keep)


def _fast(kernels, keep: bool, symbol_logprobs, blank_logprobs, boundary, return_occupation: bool):
    if return_occupation:
        return _call(kernels, keep, symbol_logprobs, blank_logprobs, boundary, True)
    scores, shares = kernels.forward(symbol_logprobs, blank_logprobs, boundary, keep)
    return scores, None, None, shares


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    returns="scores symbol_occupation blank_occupation",
    keeps={"shares": Annotated[Tensor, _kept_shape, "wide scores"]},
    saves="symbol_logprobs blank_logprobs boundary scores shares",
    unread="symbol_logprobs blank_logprobs",
    backward="grad scores shares boundary "
    "symbol_logprobs.shape[1] symbol_logprobs.shape[2] blank_logprobs.shape[2]",
    check=_check,
    launch=_launch,
    fast=_fast,
)
def rnnt_lattice(
    symbol_logprobs: Annotated[Tensor, "B S W"],
    blank_logprobs: Annotated[Tensor, "B S+1 T"],
    boundary: Annotated[Tensor, "B 4", torch.int64] | None = None,
    *,
    return_occupation: bool = False,
) -> (
    Annotated[Tensor, "B", "wide symbol_logprobs + blank_logprobs"]
    | tuple[
        Annotated[Tensor, "B", "wide symbol_logprobs + blank_logprobs"],
        Annotated[Tensor, "B S W", "wide scores", "constant"],
        Annotated[Tensor, "B S+1 T", "wide scores", "constant"],
    ]
):
    """Returns the log of the summed probability of all paths through each lattice.

    Args:
        symbol_logprobs: (B, S, T+1) for the regular lattice, (B, S, T) for the modified one, where a symbol takes a
            frame: log probability of symbol s+1 in cell (s, t). float32, bfloat16, float16 or float64. Values below
            -2^80 count as -inf; a NaN or +inf inside the boundary makes the sequence's score and occupations NaN.
        blank_logprobs: (B, S+1, T), log probability of a blank in cell (s, t).
        boundary: (B, 4) int64, [s_begin, t_begin, s_end, t_end] of each sequence; None: [0, 0, S, T]. The symbol arcs
            of frame t_end are part of a regular lattice.
        return_occupation: return occupations too.
    Returns:
        scores (B,), of float64 if an argument is, else of float32; -inf where no path reaches the end. With
        ``return_occupation`` (scores, symbol_occupation, blank_occupation): the gradients of the scores in the scores'
        dtype and the arguments' shapes, 0 outside the boundary and where no path reaches the end. They are constants
        for autograd; the scores are differentiable.
    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes or devices do not match; a boundary that is not inside the lattice (on a GPU it is moved
            inside instead: to look at it would stall the GPU).
    """
    lattice = Steps(symbol_logprobs, blank_logprobs, boundary)
    cells = lattice.cells()
    scores = lattice.scores(cells)
    if not return_occupation:
        return scores
    with torch.no_grad():
        return scores, *lattice.occupations(cells, scores)
