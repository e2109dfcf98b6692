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
from torch import Tensor

from fastasr.ops._lattice import check_boundary, values_are_checked
from fastasr.ops._lattice_steps import TdtSteps
from fastasr.ops._op import Arguments, Op, op


# --------------------------------------------------------------------------- kernels
def _check(op: Op, a: Arguments) -> None:
    check_boundary(op, a.boundary, a.symbol_logprobs.shape[2], a.symbol_logprobs.shape[1])
    if values_are_checked(a.durations):
        found = a.durations.tolist()
        if len(set(found)) < len(found) or min(found, default=0) < 0:
            op.fail("durations", "different numbers >= 0", found)


def _kept_shape(backend: str, a: Arguments) -> tuple[int, ...]:
    """Returns the shape of the shares of blank and symbol arcs; C++ reads whole vectors of them."""
    batch, frames, row = a.blank_logprobs.shape
    return batch, frames, 2 * a.durations.shape[0], row if backend == "triton" else (row + 15) // 16 * 16


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    keeps={"shares": Annotated[Tensor, _kept_shape, "wide scores"]},
    backward="grad scores shares durations boundary symbol_logprobs.shape[1] symbol_logprobs.shape[2]",
    check=_check,
)
def tdt_lattice(
    symbol_logprobs: Annotated[Tensor, "B T S"],
    blank_logprobs: Annotated[Tensor, "B T S+1"],
    duration_logprobs: Annotated[Tensor, "B T S+1 N"],
    durations: Annotated[Tensor, "N", torch.int64],
    boundary: Annotated[Tensor, "B 4", torch.int64] | None = None,
) -> Annotated[Tensor, "scores: B", "wide symbol_logprobs + blank_logprobs + duration_logprobs"]:
    """Returns the log of the summed probability of all paths through each lattice of tokens and durations.

    The last arc of a path is a blank that leads to t_end exactly; no symbol leads there.

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
    return TdtSteps(symbol_logprobs, blank_logprobs, duration_logprobs, durations, boundary).scores()
