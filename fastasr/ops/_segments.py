# SPDX-License-Identifier: Apache-2.0
"""The windows of segment attention: which rows of queries and keys belong to a segment, and which are hidden."""

import torch
from torch import Tensor


def segments_of(frames: int, segment_length: int) -> int:
    return (frames + segment_length - 1) // segment_length


def rows_of(
    frames: int, segment_length: int, right: int, memory: int, past_frames: int = 0, past_memory: int = 0
) -> tuple[int, int]:
    """Returns how many rows queries and keys have."""
    segments = segments_of(frames, segment_length)
    blocks = segments * right + frames
    if memory == 0:
        return blocks, blocks + past_frames
    return blocks + segments, past_memory + max(0, segments - 1) + blocks + past_frames


def query_rows(frames: int, segment_length: int, right: int, memory: int, device: torch.device) -> Tensor:
    """Returns (n, R + S + 1): the row of each query of each segment, -1 where the last segment is short; without the
    summary if there is no memory.
    """
    segments = segments_of(frames, segment_length)
    s = torch.arange(segments, device=device, dtype=torch.int64)[:, None]
    within = torch.arange(segment_length, device=device, dtype=torch.int64)[None, :]
    frame = s * segment_length + within
    parts = [
        s * right + torch.arange(right, device=device, dtype=torch.int64)[None, :],
        torch.where(frame < frames, segments * right + frame, -1),
    ]
    if memory:
        parts.append(segments * right + frames + s)
    return torch.cat(parts, 1)


def key_rows(
    frames: int, segment_length: int, left: int, right: int, memory: int,
    past_frames: int, past_memory: int, device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (n, M + R + L + S) three times, for each lane of each segment's window: the key's row; its distance into
    the memory (from the last row before the utterance, so the first of the past is -m) or into the utterance; and
    whether there is such a row. The lane says whether a key is memory, right context or utterance.
    """
    segments = segments_of(frames, segment_length)
    s = torch.arange(segments, device=device, dtype=torch.int64)[:, None]
    remembered = past_memory + max(0, segments - 1) if memory else 0
    m = s - memory + torch.arange(memory, device=device, dtype=torch.int64)[None, :]
    r = s * right + torch.arange(right, device=device, dtype=torch.int64)[None, :]
    t = (
        s * segment_length
        - left
        + torch.arange(left + segment_length, device=device, dtype=torch.int64)[None, :]
    )
    row = torch.cat([past_memory + m, remembered + r, remembered + segments * right + past_frames + t], 1)
    position = torch.cat([m, torch.zeros_like(r), t], 1)
    return row, position, torch.cat([m >= -past_memory, r >= 0, (t >= -past_frames) & (t < frames)], 1)


def hidden_lanes(
    position: Tensor, there: Tensor, lengths: Tensor | None, history: Tensor | None, right: int, memory: int
) -> Tensor:
    """Returns (B or 1, n, W): True where a lane of a window holds no visible key."""
    lane, hidden = torch.arange(there.shape[1], device=there.device, dtype=torch.int64), ~there[None]
    utterance = lane >= memory + right
    if lengths is not None:
        hidden = hidden | (utterance & (position >= lengths.clamp(min=0)[:, None, None]))
    if history is not None:
        before = position < -torch.where(utterance, history[0], history[1])
        hidden = hidden | (before & (utterance | (lane < memory)))
    return hidden
