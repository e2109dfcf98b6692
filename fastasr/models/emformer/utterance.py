# SPDX-License-Identifier: Apache-2.0
"""Runs a layer over whole utterances."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastasr._tables import kept
from fastasr.models.emformer.parts import finish, project, segment_means
from fastasr.ops import _dropout, segment_attention
from fastasr.ops._segments import key_rows, query_rows, segments_of

if TYPE_CHECKING:
    from fastasr.models.emformer.layer import EmformerAttention, EmformerLayer


def encode_utterance(
    layer: "EmformerLayer", x: Tensor, frames: int, seen: Tensor | None, mems: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the layer's [right context | utterance] and the memory for the next layer. ``seen`` comes from
    :func:`fastasr.models.emformer.parts.seen_frames`."""
    segments = segments_of(frames, layer.segment_length)
    right = (x.shape[0] - frames) // max(1, segments)
    memory = layer.max_memory_size if layer.use_mem else 0
    sizes = frames, layer.segment_length, layer.left_context_length, right, memory
    h = layer.layer_norm_input(x)
    query, key, value = project(
        layer.attention,
        h,
        segment_means(layer, h[segments * right :]) if layer.use_mem else None,
        mems if memory or mems.requires_grad else None,
    )
    dropout = None
    if layer.training and layer.attention.dropout > 0:
        dropout = _attention_dropout(query, key.shape[0], layer.attention, sizes)
    mixed = segment_attention(
        query,
        key,
        value,
        num_heads=layer.attention.num_heads,
        frames=frames,
        segment_length=layer.segment_length,
        left_context_length=layer.left_context_length,
        right_context_length=right,
        max_memory_size=memory,
        lengths=seen,
        weights_dropout=dropout,
    )
    y, next_mems = finish(layer, mixed, x)
    return y, next_mems[:-1]


def _attention_dropout(
    query: Tensor, keys: int, attention: "EmformerAttention", sizes: tuple[int, ...]
) -> Tensor:
    """Returns the dropout factors (B, H, Q, lanes) of the weights inside the windows.

    Upstream draws numbers for the dense (B H, Q, K). This function draws the same ones and picks those of the windows,
    so the same seed drops the same weights.
    """
    batch, heads = query.shape[1], attention.num_heads
    places = _window_places(*sizes, query.device)
    drawn = _dropout.windows(query, places, batch * heads, keys, float(attention.dropout))
    return drawn.view(batch, heads, *places.shape)


@kept(8)
def _window_places(
    frames: int, segment: int, left: int, right: int, memory: int, device: torch.device
) -> Tensor:
    """Returns the keys (Q, lanes) of each query's window."""
    with torch.inference_mode(False):  # the result is cached, and a training step may use it later
        rows = query_rows(frames, segment, right, memory, device)  # (n, per)
        at, _, there = key_rows(frames, segment, left, right, memory, 0, 0, device)
        places = torch.where(there, at, 0)[:, None, :].expand(-1, rows.shape[1], -1)
        valid = rows.flatten() >= 0
        return places.flatten(0, 1)[valid][torch.argsort(rows.flatten()[valid])]
