# SPDX-License-Identifier: Apache-2.0
"""Recordings in a row, of which only the device knows where they begin and end: the tables that models ask for, at
every frame rate, as one kernel on CUDA.

Not public. Off CUDA, each function below runs its eager formula.
"""

import importlib
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastasr._tables import share
from fastasr.ops._dispatch import KernelFamily, Kernels, triton_kernels


def _load() -> Kernels:
    """Returns the module of the launchers in place of a forward pass."""
    launchers: Any = importlib.import_module("fastasr.kernels._recordings")
    return Kernels("triton", launchers, None)


FAMILY = KernelFamily("row", (), (replace(triton_kernels("_recordings"), load=_load),))


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
        found: list[tuple[Tensor, ...]] = kernels.forward.tables(begins, ends, frames, factors)
        return [Tables(*each, gaps=True) for each in found]
    return [_tables(begins // f, (ends + (f - 1)) // f, frames // f) for f in factors]


def _tables(begins: Tensor, ends: Tensor, frames: int) -> Tables:
    frame = torch.arange(frames, device=begins.device, dtype=torch.int64)
    recording = torch.searchsorted(begins[1:], frame, right=True)
    left = ends.index_select(0, recording) - frame
    starts = torch.stack([begins, ends], 1).flatten()
    share(starts)
    return Tables(starts, recording, left, (left <= 0)[None], False)
