# SPDX-License-Identifier: Apache-2.0
"""Ragged sequences as padded tensors, and the masks of padding and of the future."""

import torch


def pad_sequences(seq, padding_value, sos_id=None, eos_id=None, device=None):
    """(batch, longest) of int64, filled up with ``padding_value``, and lengths (batch,).

    Args:
        seq: one list of ints per sequence.
        sos_id, eos_id: when given, one of these stands before and after every sequence, and counts.
    """
    head = [] if sos_id is None else [sos_id]
    tail = [] if eos_id is None else [eos_id]
    rows = [[*head, *tokens, *tail] for tokens in seq]
    lengths = [len(row) for row in rows]
    longest = max(lengths, default=0)
    rows = [row + [padding_value] * (longest - len(row)) for row in rows]
    padded = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), longest)
    return padded, torch.tensor(lengths, dtype=torch.int64, device=device)


def make_pad_mask(lengths, max_len=None):
    """(batch, max_len) of booleans, True where a position is padding. ``max_len`` is the longest by default."""
    if max_len is None:
        max_len = int(lengths.max())
    return torch.arange(max_len, device=lengths.device) >= lengths.unsqueeze(-1)


def subsequent_mask(size, device="cpu", dtype=torch.bool):
    """(size, size): 1 where a position (row) may see another (column): itself and what was before."""
    return torch.ones(size, size, device=device, dtype=dtype).tril()
