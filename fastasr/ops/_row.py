# SPDX-License-Identifier: Apache-2.0
"""Recordings in a row, of which only the device knows where they begin and end: the tables that models ask for, at
every frame rate, moves of recordings, and means over frames, each as one kernel on CUDA.

Not public. Off CUDA, each function below runs its eager formula.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr import packed_frames
from fastasr._tables import share
from fastasr._transforms import Function, is_transformed
from fastasr.ops._dispatch import KernelFamily, triton_launchers

FAMILY = KernelFamily("row", (), (triton_launchers("_row"),))


class Tables(NamedTuple):
    """``starts`` (2R,): where R recordings begin and end, as ``ops.zipformer_attention`` takes it. Of each frame (N,)
    ``recording`` is the number, of a frame of nobody that of the recording before it, and ``left`` the frames of this
    recording that begin with it, 0 or less for frames of nobody, where ``hidden`` (1, N) is True. ``gaps``: attention
    by kernels knows frames of nobody between two recordings. They see nothing, while they see each other elsewhere."""

    starts: Tensor
    recording: Tensor
    left: Tensor
    hidden: Tensor
    gaps: bool


def tables(like: Tensor, begins: Tensor, ends: Tensor, frames: int, factors: tuple[int, ...]) -> list[Tables]:
    """Returns the tables of recordings at [begins, ends), both int64 (R,), in ``frames`` frames, and of these at each
    of the rates of which one frame is ``factor`` of theirs. The first recording begins at 0, the begins do not
    decrease, and recordings do not overlap at any rate. ``like`` is what the frames hold.
    """
    kernels: Any = FAMILY.kernels(like)
    if kernels is not None and len(factors) < 8 and max(factors) < 256:
        found = kernels.forward.tables(begins, ends, frames, factors)
        return [Tables._make((*each, True)) for each in found]
    return [_tables(begins // f, (ends + (f - 1)) // f, frames // f) for f in factors]


def _tables(begins: Tensor, ends: Tensor, frames: int) -> Tables:
    frame = torch.arange(frames, device=begins.device, dtype=torch.int64)
    recording = torch.searchsorted(begins[1:], frame, right=True)
    left = ends.index_select(0, recording) - frame
    starts = torch.stack([begins, ends], 1).flatten()
    share(starts)
    return Tables(starts, recording, left, (left <= 0)[None], False)


def moved(rows: Tensor, before: Tensor, after: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Does what ``packed_frames.moved`` does."""
    if not len(lengths) or FAMILY.kernels(rows) is None:
        return packed_frames.moved(rows, before, after, lengths, count)
    return _Moved.apply(rows, before, after, lengths, count)


class _Moved(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, before: Tensor, after: Tensor, lengths: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(before, after, lengths)
        ctx.count = len(rows)
        return _moved(rows, before, after, lengths, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        before, after, lengths = ctx.saved_tensors
        return _moved(grad, after, before, lengths, ctx.count), None, None, None, None


def _moved(rows: Tensor, *places: Any) -> Tensor:
    kernels: Any = FAMILY.kernels(rows)
    return kernels.forward.moved(rows.contiguous(), *places)


def averaged(rows: Tensor, left: Tensor | None, weights: Tensor) -> Tensor:
    """Returns Σ_i weights[i] rows[F t + i], (⌈N / F⌉, ...), for rows (N, ...) and weights (F,). Behind a recording's
    end its last frame counts again; a sum without frames is 0. ``left`` (N,) is that of :class:`Tables`, or None where
    all frames are one recording.

    With gradient g, c(t, j) = min(j, left[F t] − 1) and left[F t] > 0: d rows[F t + i] = g[t] Σ_j weights[j] [c(t, j) =
    i], d weights[j] = Σ_t g[t] · rows[F t + c(t, j)].
    """
    traced = torch.compiler.is_compiling() or is_transformed()
    if not traced and FAMILY.kernels(rows, weights) is not None:
        return _Averaged.apply(rows, left, weights)
    factor, shares = len(weights), weights
    if left is None:
        missing = -len(rows) % factor
        if missing:
            rows = torch.cat((rows, rows[-1:].expand(missing, *rows.shape[1:])))
    else:
        left = left[::factor]
        number = torch.arange(1, factor + 1, device=left.device, dtype=left.dtype)
        counted = torch.minimum(number, left[:, None])[:, None] == number[:, None]
        shares = (counted * weights).sum(-1)
    shares = shares.view(*shares.shape, *(1,) * (rows.dim() - 1))
    return (rows.reshape(-1, factor, *rows.shape[1:]) * shares).sum(1)


class _Averaged(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, left: Tensor | None, weights: Tensor) -> Tensor:
        rows = rows.contiguous()
        ctx.save_for_backward(rows, left, weights)
        kernels: Any = FAMILY.kernels(rows)
        return kernels.forward.averaged(rows, left, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, left, weights = ctx.saved_tensors
        kernels: Any = FAMILY.kernels(rows)
        drows, dweights = kernels.forward.averaged_gradients(grad.contiguous(), rows, left, weights)
        return drows, None, dweights
