# SPDX-License-Identifier: Apache-2.0
"""The formulas of whole lattices, step by step. A step's cells do not depend on each other."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._lattice import INF, log_add, log_probabilities, occupation, share, whole, within


def _inside(boundary: Tensor | None, x: Tensor, symbols: int, frames: int) -> Tensor:
    """Returns the boundary (B, 4) with no cell outside the lattice, by default that of the whole lattice."""
    if boundary is None:
        return whole(torch.full((len(x),), symbols, device=x.device, dtype=torch.int64), frames)
    limits = zip(boundary.unbind(1), (symbols, frames, symbols, frames), strict=True)
    return torch.stack([column.clamp(0, most) for column, most in limits], 1)


class RnntSteps:
    """A batch of lattices by steps k: a regular lattice's anti-diagonals s + t, a modified one's frames. The arcs that
    leave a step are (K, B, S+1) each, by the s they enter.
    """

    def __init__(self, x: Tensor, y: Tensor, boundary: Tensor | None) -> None:
        _, symbols, width = x.shape
        frames = y.shape[2]
        self.regular = width > frames
        self.steps = frames + symbols * self.regular
        boundary = _inside(boundary, x, symbols, frames)
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
        """Returns (B, S+1), True at the cell if it is in step k."""
        return (self.row == cell[:, :1]) & (self.step_of(cell) == k)[:, None]

    def cells(self, add: Callable[[Tensor, Tensor], Tensor] = log_add) -> Tensor:
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


def _log_sum(terms: list[Tensor]) -> Tensor:
    """Returns log Σ e^term, with a gradient of 0 where all are -inf."""
    stacked = torch.stack(terms)
    none = (stacked == -INF).all(0)
    return torch.where(none, -INF, torch.where(none, 0.0, stacked).logsumexp(0))


class TdtSteps:
    """A batch of lattices by steps t + s. The arcs that leave a step are (K, B, S+1), by the s that they leave."""

    def __init__(self, x: Tensor, y: Tensor, z: Tensor, durations: Tensor, boundary: Tensor | None) -> None:
        _, frames, self.row = y.shape
        symbols = self.row - 1
        # on the meta device any numbers give the shapes
        self.durations = list(range(len(durations))) if durations.is_meta else durations.tolist()
        boundary = _inside(boundary, x, symbols, frames)
        self.s = torch.arange(self.row, device=x.device, dtype=torch.int64)
        t = torch.arange(frames, device=x.device, dtype=torch.int64)[:, None]
        t_end = boundary[:, 3].view(-1, 1, 1)
        inside_x, inside_y = within(boundary, self.s, t, False)
        x, y, poisoned = log_probabilities(F.pad(x, (0, 1)), y, inside_x, inside_y)
        every = z.unbind(3)
        pairs = [log_probabilities(one, one, inside_y, inside_y) for one in every]
        self.poisoned = torch.stack([poisoned, *(bad for _, _, bad in pairs)]).any(0)
        self.steps = frames + symbols
        self.symbols, self.blanks = [], []
        for d, (one, _, _) in zip(self.durations, pairs, strict=True):
            self.symbols.append(self._to_steps(torch.where(t + d < t_end, x + one, -INF)))
            self.blanks.append(self._to_steps(torch.where((t + d <= t_end) & (d > 0), y + one, -INF)))
        self.begin, self.end = boundary[:, :2], boundary[:, 2:]  # (s, t)
        # zeros give gradients even without arcs
        self.zero = x[:, :0].sum((1, 2)) + y[:, :0].sum((1, 2)) + z[:, :0].to(x.dtype).sum((1, 2, 3))

    def _to_steps(self, x: Tensor) -> Tensor:
        """Maps (B, T, S+1) to (K, B, S+1)."""
        t = torch.arange(self.steps, device=x.device, dtype=torch.int64)[:, None] - self.s  # [K, S+1]
        frames = x.shape[1]
        if not frames:
            return x.new_full((self.steps, len(x), self.row), -INF)
        found = torch.where((t >= 0) & (t < frames), x[:, t.clamp(0, frames - 1), self.s], -INF)
        return found.transpose(0, 1)

    def arcs(self, k: int) -> list[tuple[int, int, int]]:
        """Returns the arcs that may enter step k, those of each duration, blank before symbol: the duration's index,
        and by how many steps and symbols the arc moves on."""
        arcs = (arc for i, d in enumerate(self.durations) for arc in ((i, d, 0), (i, d + 1, 1)))
        return [arc for arc in arcs if 0 < arc[1] <= k]

    def scores(self, add: Callable[[list[Tensor]], Tensor] = _log_sum) -> Tensor:
        """Returns the scores. ``add`` joins -inf and the terms of the arcs into a cell, in the order of ``arcs``."""
        cells: list[Tensor] = []
        begin = self.begin.sum(1)[:, None]
        nothing = self.zero.new_full((len(self.begin), self.row), -INF)
        for k in range(self.steps + 1):
            terms = [nothing]
            for i, back, symbol in self.arcs(k):
                leaving = cells[k - back] + (self.symbols if symbol else self.blanks)[i][k - back]
                terms.append(F.pad(leaving[:, :-1], (1, 0), value=-INF) if symbol else leaving)
            at_begin = (self.s == self.begin[:, :1]) & (begin == k)
            cells.append(torch.where(at_begin, 0.0, add(terms)))
        batch = torch.arange(len(self.end), device=self.s.device, dtype=torch.int64)
        scores = torch.stack(cells)[self.end.sum(1), batch, self.end[:, 0]] + self.zero
        return torch.where(self.poisoned, float("nan"), scores)
