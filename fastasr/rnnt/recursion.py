# SPDX-License-Identifier: Apache-2.0
"""The recursion over a lattice of log-probabilities, under k2's names. See ``fastasr.ops.rnnt_lattice``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastasr import ops
from fastasr._transforms import refuse_unless_batched
from fastasr.rnnt import _arguments as arguments
from fastasr.rnnt import _check


def mutual_information_recursion(
    px: Tensor, py: Tensor, boundary: Tensor | None = None, return_grad: bool = False
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns p[b, s_end, t_end] of p[s, t] = log(e^(p[s-1, t] + px[s-1, t]) + e^(p[s, t-1] + py[s, t-1])), 0 at the
    beginning.

    Args:
        px: (B, S, T + 1); or (B, S, T), and then a symbol takes a frame along: p[s-1, t-1] + px[s-1, t-1].
        py: (B, S + 1, T).
        boundary: (B, 4), rows [s_begin, t_begin, s_end, t_end]; None: [0, 0, S, T].
        return_grad: also return the occupation probabilities, the gradients of the sum of the result.
    Returns:
        (B,), or ((B,), (like px, like py)). −∞ where no path leads to the end.
    """
    op = "rnnt.mutual_information_recursion"
    px, py, boundary = _checked(op, px, py, boundary)
    if not return_grad:
        return ops.rnnt_lattice(px, py, boundary)
    scores, px_grad, py_grad = ops.rnnt_lattice(px, py, boundary, return_occupation=True)
    return scores, (px_grad, py_grad)


def joint_mutual_information_recursion(
    px: Sequence[Tensor], py: Sequence[Tensor], boundary: Tensor | None = None
) -> Tensor:
    """Runs the recursion on the sums of several px and several py, and splits its result into the contribution of
    each.

    Args:
        px, py: sequences of N tensors, each as in ``mutual_information_recursion``.
    Returns:
        (N, B); its sum over N is the recursion's result. Part n is the sum of px[n] and py[n] over the arcs, weighted
        by their occupation; the first part also holds the difference between the log of a sum and a sum of logs.
    """
    op = "rnnt.joint_mutual_information_recursion"
    if len(px) == 0 or len(px) != len(py):
        raise ValueError(
            f"fastasr.{op}: py: expected as many tensors as px, at least 1, got {len(px)} and {len(py)}"
        )
    for x, y in zip(px, py, strict=True):
        _check.shape(op, "px", x, f"{tuple(px[0].shape)}, as the first", x.shape == px[0].shape)
        _check.shape(op, "py", y, f"{tuple(py[0].shape)}, as the first", y.shape == py[0].shape)
    refuse_unless_batched(op)  # the occupations count as constants
    with torch.no_grad():
        total = _checked(op, sum(px[1:], px[0]), sum(py[1:], py[0]), boundary)
        scores, px_grad, py_grad = ops.rnnt_lattice(*total, return_occupation=True)
    parts = torch.stack([_inner(px_grad, x) + _inner(py_grad, y) for x, y in zip(px, py, strict=True)])
    offset = scores - parts.detach().sum(0)
    return torch.cat(((parts[0] + offset).unsqueeze(0), parts[1:]))


def _inner(occupation: Tensor, x: Tensor) -> Tensor:
    """Returns Σ occupation · x of each sequence; arcs that cannot be taken (−∞) count as 0."""
    return (occupation * x.to(occupation.dtype).masked_fill(x == -torch.inf, 0.0)).flatten(1).sum(1)


def _checked(
    op: str, px: Tensor, py: Tensor, boundary: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    arguments.arcs(op, "px", px, "py", py)
    if px.dtype != py.dtype:
        raise TypeError(f"fastasr.{op}: py: expected px's dtype {px.dtype}, got {py.dtype}")
    (batch, length), frames = px.shape[:2], py.shape[2]
    return px, py, arguments.boundary(op, boundary, batch, length, frames, px)
