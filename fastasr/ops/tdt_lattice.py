# SPDX-License-Identifier: Apache-2.0
r"""The lattice of a token-and-duration transducer (TDT): the log of the summed probability of all its paths.

Xu et al., "Efficient sequence transduction by jointly predicting tokens and durations" (2023). Each arc emits a symbol
or blank, and moves on by one of the ``durations`` d_i. In cell (t, s), s symbols were emitted by frame t. With
x = ``symbol_logprobs``, y = ``blank_logprobs``, z_i = ``duration_logprobs[..., i]`` and p = 0 at the beginning of the
boundary:

    p[t,s] = log( Σ_{d_i > 0} e^((p + y + z_i)[t-d_i, s]) + Σ_i e^((p + x + z_i)[t-d_i, s-1]) ),      t < t_end
    score = log Σ_{d_i > 0} e^((p + y + z_i)[t_end - d_i, s_end])

The last arc is a blank that leads to t_end exactly; no symbol leads there. A blank of duration 0 does not exist.

The occupation of an arc, the probability that a path takes it, is the gradient of the score. The share of an arc is the
part that it has in the cell where it leads, w = e^(p + x + z - p'). With g = 1 at the end, backward from there: the
occupation of an arc is w g', and g of a cell is the sum over the arcs that leave it. Gradients of x and y are sums over
the durations, those of z_i over symbol and blank.

A forward keeps the shares, 2 N numbers per cell for N durations; a backward multiplies and adds. Bytes per cell of e
bytes: forward (N + 2) e, and 2 N e where shares are kept; backward (3 N + 2) e. Upstream: transformers' ``tdt_loss``.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._lattice import INF, check_boundary, log_probabilities, values_are_checked, whole, within
from fastasr.ops._op import op


# --------------------------------------------------------------------------- the formula, step by step
def _log_sum(terms: list[Tensor]) -> Tensor:
    """Returns log Σ e^term, with a gradient of 0 where all are -inf."""
    stacked = torch.stack(terms)
    none = (stacked == -INF).all(0)
    return torch.where(none, -INF, torch.where(none, 0.0, stacked).logsumexp(0))


class Steps:
    """A batch of lattices by steps t + s. The arcs that leave a step are (K, B, S+1), by the s that they leave."""

    def __init__(self, x: Tensor, y: Tensor, z: Tensor, durations: Tensor, boundary: Tensor | None):
        batch, frames, self.row = y.shape
        symbols, self.durations = self.row - 1, durations.tolist()
        if boundary is None:
            boundary = whole(torch.full((batch,), symbols, device=x.device, dtype=torch.int64), frames)
        limits = zip(boundary.unbind(1), (symbols, frames, symbols, frames), strict=True)
        boundary = torch.stack([column.clamp(0, most) for column, most in limits], 1)
        self.s = torch.arange(self.row, device=x.device, dtype=torch.int64)
        t, t_end = (
            torch.arange(frames, device=x.device, dtype=torch.int64)[:, None],
            boundary[:, 3].view(-1, 1, 1),
        )
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

    def scores(self, add=_log_sum) -> Tensor:
        """Returns the scores. ``add`` joins -inf and what the arcs that enter a cell give, in the order of ``arcs``."""
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


# --------------------------------------------------------------------------- kernels
def _check(op, a) -> None:
    check_boundary(op, a.boundary, a.symbol_logprobs.shape[2], a.symbol_logprobs.shape[1])
    if values_are_checked(a.durations):
        found = a.durations.tolist()
        if len(set(found)) < len(found) or min(found, default=0) < 0:
            op.fail("durations", "different numbers >= 0", found)


def _kept_shape(backend: str, a) -> tuple[int, ...]:
    """Returns the shape of the shares of blank and symbol arcs; C++ reads whole vectors of them."""
    batch, frames, row = a.blank_logprobs.shape
    return batch, frames, 2 * a.durations.shape[0], row if backend == "triton" else (row + 15) // 16 * 16


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    returns="scores",
    keeps={"shares": Annotated[Tensor, _kept_shape, "wide scores"]},
    saves="symbol_logprobs blank_logprobs duration_logprobs durations boundary scores shares",
    unread="symbol_logprobs blank_logprobs duration_logprobs",
    backward="grad scores shares durations boundary blank_logprobs.shape[1] blank_logprobs.shape[2]",
    check=_check,
)
def tdt_lattice(
    symbol_logprobs: Annotated[Tensor, "B T S"],
    blank_logprobs: Annotated[Tensor, "B T S+1"],
    duration_logprobs: Annotated[Tensor, "B T S+1 N"],
    durations: Annotated[Tensor, "N", torch.int64],
    boundary: Annotated[Tensor, "B 4", torch.int64] | None = None,
) -> Annotated[Tensor, "B", "wide symbol_logprobs + blank_logprobs + duration_logprobs"]:
    """Returns the log of the summed probability of all paths through each lattice of tokens and durations.

    Args:
        symbol_logprobs: (B, T, S), log probability of symbol s+1 in cell (t, s). float32, bfloat16, float16 or float64;
            special values as in ``rnnt_lattice``.
        blank_logprobs: (B, T, S+1), log probability of a blank in cell (t, s).
        duration_logprobs: (B, T, S+1, N), log probability of each duration.
        durations: (N,) int64, different numbers of frames, in any order, with or without 0.
        boundary: (B, 4) int64, [s_begin, t_begin, s_end, t_end] of each sequence; None: [0, 0, S, T].
    Returns:
        scores (B,), of float64 if an argument is, else of float32; -inf where no path reaches the end, with gradients
        of 0. A sequence without frames scores 0 without symbols, else -inf.
    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes or devices do not match; on the CPU: a boundary that is not inside the lattice, durations
            that are negative or equal (on a GPU the boundary is moved inside, and nothing leads along a negative
            duration).
    """
    return Steps(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary).scores()
