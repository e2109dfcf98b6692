# SPDX-License-Identifier: Apache-2.0
"""Padding of ragged sequences, and the masks of padding and of future positions."""

import torch
from torch import Tensor

MIN_FRAMES = 9  # with fewer frames of features, the Zipformer's front end gives no frame


def check_frames(name: str, x: Tensor, x_lens: Tensor) -> None:
    """Raises ValueError if a sequence of features x (batch, time, ...) is too short for a frame of output."""
    frames = min(x.shape[1], int(x_lens.min())) if x_lens.numel() else x.shape[1]
    if frames < MIN_FRAMES:
        raise ValueError(
            f"{name}: a sequence needs {MIN_FRAMES} frames of features at least, got {frames} "
            f"(x {tuple(x.shape)}, lengths {x_lens.tolist()})"
        )


def pad_sequences(
    seq: list[list[int]],
    padding_value: int,
    sos_id: int | None = None,
    eos_id: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the sequences as (batch, longest), int64, filled up with ``padding_value``, and their lengths (batch,).

    Args:
        seq: one list of ints per sequence.
        sos_id, eos_id: tokens to put before and after every sequence, which the lengths count; None for none.
        device: that of the results; None for the CPU.
    """
    device = "cpu" if device is None else device
    head = [] if sos_id is None else [sos_id]
    tail = [] if eos_id is None else [eos_id]
    rows = [[*head, *tokens, *tail] for tokens in seq]
    lengths = [len(row) for row in rows]
    longest = max(lengths, default=0)
    rows = [row + [padding_value] * (longest - len(row)) for row in rows]
    padded = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), longest)
    return padded, torch.tensor(lengths, dtype=torch.int64, device=device)


def make_pad_mask(lengths: Tensor, max_len: int | None = None) -> Tensor:
    """Returns booleans (batch, max_len), True at padding. ``max_len`` is the largest length by default."""
    if max_len is None:
        max_len = int(lengths.max())
    return torch.arange(max_len, device=lengths.device, dtype=torch.int64) >= lengths.unsqueeze(-1)


def subsequent_mask(size: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bool) -> Tensor:
    """Returns (size, size), 1 where a position (row) may see another (column): itself and all before it."""
    return torch.ones(size, size, device=device, dtype=dtype).tril()
