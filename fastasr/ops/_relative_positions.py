# SPDX-License-Identifier: Apache-2.0
"""Relative positions of attention: scores by offset become scores by key, and a context hides keys."""

import torch
from torch import Tensor


def relative_shift(scores: Tensor) -> Tensor:
    """Maps (..., T, T + K − 1) by offset to (..., T, K) by key: element (i, j) has offset j − i. The result is a
    view.
    """
    frames, offsets = scores.shape[-2:]
    if frames < 2:  # without queries there are no offsets, whatever the number of keys: (0, 1) goes with any
        return scores if frames else scores.sum(-1, keepdim=True)
    # with rows one element closer together, each key's scores stand in one column
    flat = scores.flatten(-2)[..., frames - 1 : -1]
    return flat.unflatten(-1, (frames, offsets - 1))[..., : offsets - frames + 1]


def rows_by_offset(pos: Tensor, frames: int, keys: int, span: tuple[int, int]) -> Tensor:
    """Returns (T + K − 1, ...) of a table of positions (left + right + 1, ...): the rows of keys that are as far from
    the query as ``span``, (left, right), says, for those beyond too."""
    left, right = span
    count = frames and frames + keys - 1
    behind = torch.arange(count, dtype=torch.int64, device=pos.device) - (keys - 1)
    return pos.index_select(0, behind.clamp(-left, right) + left)


def outside_context(scores: Tensor, context: tuple[int, int], chunk_size: int) -> Tensor:
    """Returns (T, K) for scores (..., T, K), True where a key is outside the context of a query."""
    frames, keys = scores.shape[-2:]
    key = torch.arange(keys, device=scores.device, dtype=torch.int64)
    chunk = key[keys - frames :, None] // chunk_size * chunk_size
    (left, right), hidden = context, torch.zeros(frames, keys, dtype=torch.bool, device=scores.device)
    if left >= 0:
        hidden = hidden | (key < chunk - left)
    return hidden if right < 0 else hidden | (key >= chunk + chunk_size + right)


def apart(starts: Tensor, frames: int) -> Tensor:
    """Returns (T, T), True where two frames do not belong to the same recording: see ``ops.rel_attention``."""
    frame = torch.arange(frames, device=starts.device, dtype=torch.int64)
    number = (starts <= frame[:, None]).sum(1)  # of recordings that have begun
    outside = (number == 0) | (number == len(starts))
    return (number[:, None] != number) | outside
