# SPDX-License-Identifier: Apache-2.0
"""What an attention mask of transformers or NeMo hides, read once for all layers that are given the same mask."""

from typing import NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """What queries see of keys.

    ``hidden_keys`` (B, T): True at keys that no query sees. ``empty_rows`` (B, T): True at queries that see no key, or
    None if there are none. ``by_length``: whether every other query sees every other key.
    """

    hidden_keys: Tensor
    empty_rows: Tensor | None
    by_length: bool


def is_readable(mask: Tensor | None, batch: int, frames: int) -> bool:
    """Whether ``mask`` is None or bool (B, 1, T, T), True where a query (third) sees a key (last); or bool (B, T), True
    at valid frames, each of which sees all others: over an hour the pairs would take 2 GB."""
    shapes = (batch, 1, frames, frames), (batch, frames)
    return mask is None or (mask.dtype == torch.bool and mask.shape in shapes)


def pairs(mask: Tensor) -> Tensor:
    """Returns bool (B, 1, T, T) for a mask of either shape."""
    return mask[:, None, :, None] & mask[:, None, None, :] if mask.dim() == 2 else mask


def seen(mask: Tensor, hides: bool = False) -> Seen:
    """Returns what queries see by ``mask``, bool (B, 1, T, T), True where a query sees a key, or bool (B, T), True at
    valid frames. With ``hides`` the mask is NeMo's: (B, T, T), True where a key is hidden.

    The answer stays with the tensor: a mask of a long recording is large, and an encoder gives it to every layer.
    """
    if torch.compiler.is_compiling():  # nothing may depend on values, or be kept
        if mask.dim() == 2:
            return Seen(~mask, ~mask, True)
        by_query = ~mask if hides else mask[:, 0]
        return Seen(~by_query.any(1), ~by_query.any(2), False)
    version = None if mask.is_inference() else mask._version
    kept = getattr(mask, "_fastasr_seen", None)
    if kept is None or kept[0] != version:
        if mask.dim() == 2:
            rows, keys, by_length = mask, mask, True
        else:
            by_query = ~mask if hides else mask[:, 0]
            rows, keys = by_query.any(2), by_query.any(1)
            # where each is seen or sees, all pairs are in the mask exactly if their number is that of the mask's; a sum
            # would first copy the mask as 64-bit integers
            counts = torch.stack([torch.count_nonzero(m) for m in by_query]) if len(mask) else rows.sum(1)
            by_length = torch.equal(counts, rows.sum(1) * keys.sum(1))
        empty = ~rows
        kept = version, Seen(~keys, empty if bool(empty.any()) else None, by_length)
        mask._fastasr_seen = kept
    return kept[1]


def of_kernel(mask: Tensor | None, by: Seen | None, hides: bool = False) -> dict[str, Tensor]:
    """Returns the arguments of ``ops.rel_attention`` for ``mask`` and what queries see by it; {} without a mask."""
    if by is None:
        return {}
    if by.by_length:
        return {"key_padding_mask": by.hidden_keys}
    return {"attn_mask": mask if hides else ~mask[:, 0]}
