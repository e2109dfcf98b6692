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

from typing import Annotated, Any

import torch
from torch import Tensor

from fastasr.ops._dispatch import Kernels
from fastasr.ops._lattice import Scores, check_boundary, launch
from fastasr.ops._lattice_steps import RnntSteps
from fastasr.ops._op import Arguments, Op, op


# --------------------------------------------------------------------------- kernels
def _check(op: Op, a: Arguments) -> None:
    x, frames = a.symbol_logprobs, a.blank_logprobs.shape[2]
    if x.shape[2] - frames not in (0, 1):
        expected = "shape (B, S, T+1) or (B, S, T), T being that of blank_logprobs"
        op.fail("symbol_logprobs", expected, tuple(x.shape))
    check_boundary(op, a.boundary, x.shape[1], frames)


def _kept_shape(backend: str, a: Arguments) -> tuple[int, int, int]:
    """Returns the shape of S + 1 shares per step (C++) or frame (Triton), padded to what the kernels read fastest."""
    batch, symbols, width = a.symbol_logprobs.shape
    frames = a.blank_logprobs.shape[2]
    if backend == "triton":
        return batch, symbols + 1, (frames + 16) // 16 * 16
    row = (symbols + 16) // 16 * 16
    if width == frames:
        return batch, frames, row
    return batch, frames + symbols, torch.sym_min(row, (frames + 63) // 16 * 16)


def _call(
    kernels: Kernels, keep: bool, x: Tensor, y: Tensor, boundary: Tensor | None, return_occupation: bool
) -> tuple[Any, ...]:
    scores, shares = kernels.forward(x, y, boundary, keep or return_occupation)
    if not return_occupation:
        return scores, None, None, shares
    sizes = x.shape[1], x.shape[2], y.shape[2]
    return scores, *kernels.backward(None, scores, shares, boundary, *sizes), shares if keep else None


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> list[Tensor]:
    return launch(_call, kernels, a, dtype, keep)


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    keeps={"shares": Annotated[Tensor, _kept_shape, "wide scores"]},
    forward="symbol_logprobs blank_logprobs boundary keep",
    backward="grad scores shares boundary "
    "symbol_logprobs.shape[1] symbol_logprobs.shape[2] blank_logprobs.shape[2]",
    check=_check,
    launch=_launch,
    fast=_call,
)
def rnnt_lattice(
    symbol_logprobs: Annotated[Tensor, "B S W"],
    blank_logprobs: Annotated[Tensor, "B S+1 T"],
    boundary: Annotated[Tensor, "B 4", torch.int64] | None = None,
    *,
    return_occupation: bool = False,
) -> (
    Scores
    | tuple[
        Scores,
        Annotated[Tensor, "symbol_occupation: B S W", "wide scores", "constant"],
        Annotated[Tensor, "blank_occupation: B S+1 T", "wide scores", "constant"],
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
            inside instead: reading it would stall the GPU).
    """
    lattice = RnntSteps(symbol_logprobs, blank_logprobs, boundary)
    cells = lattice.cells()
    scores = lattice.scores(cells)
    if not return_occupation:
        return scores
    with torch.no_grad():
        return scores, *lattice.occupations(cells, scores)
