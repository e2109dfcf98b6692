# SPDX-License-Identifier: Apache-2.0
"""Runs a layer over one segment of a stream, by one native call or by its operations one by one."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.models.emformer import packed_step
from fastasr.models.emformer.parts import finish, project, seen_frames, segment_means
from fastasr.ops import segment_attention

if TYPE_CHECKING:
    from fastasr.models.emformer.layer import EmformerAttention, EmformerLayer


class Step:
    """The values that the layers of one step share. They are tensors on the device, so nothing is read back."""

    def __init__(
        self,
        layer: "EmformerLayer",
        frames: int,
        batch: int,
        lengths: Tensor,
        past: Tensor | None,
        device: torch.device,
    ) -> None:
        left, memory = layer.left_context_length, layer.max_memory_size
        self.lengths = seen_frames(lengths, frames) if batch > 1 else None
        self.behind = torch.clamp(frames - lengths.max(), min=0).to(torch.int64)
        if past is None:
            self.history = torch.zeros(2, dtype=torch.int64, device=device)
        else:
            past = past[0, :1].to(torch.int64)
            memories = (past + (layer.segment_length - 1)) // layer.segment_length
            self.history = torch.cat([past.clamp(max=left), memories.clamp(max=memory)])
        self.kept = self._kept(frames, left)

    def _kept(self, frames: int, left: int) -> Tensor:
        """Returns the rows (L,) of [left context, utterance] that become the next left context.

        Upstream appends [utterance, first `behind` rows | valid left context | rest of the utterance] to the old left
        context and keeps the last L rows."""
        back = torch.arange(left, 0, -1, device=self.history.device, dtype=torch.int64)  # rows from the end
        valid, rest = self.history[0], frames - self.behind
        old = torch.where(back <= rest + valid, left - (back - rest), left - (back - valid - frames))
        head = left + self.behind - (back - rest - valid)
        in_head = (back > rest + valid) & (back <= frames + valid)
        return torch.where(back <= rest, left + frames - back, torch.where(in_head, head, old))


def _new_state(layer: "EmformerLayer", utterance: Tensor) -> list[Tensor]:
    batch = utterance.shape[1]
    rows = layer.max_memory_size, layer.left_context_length, layer.left_context_length
    state = [utterance.new_zeros(n, batch, layer.input_dim) for n in rows]
    return [*state, torch.zeros(1, batch, dtype=torch.int32, device=utterance.device)]


def infer_segment(
    layer: "EmformerLayer",
    utterance: Tensor,
    right_context: Tensor,
    state: list[Tensor] | None,
    mems: Tensor,
    step: Step,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    if state is None:
        state = _new_state(layer, utterance)
    by_operations = functools.partial(infer_by_operations, layer)
    done: Sequence[Tensor] | None = packed_step.step(
        layer, utterance, right_context, state, mems, step, by_operations
    )
    if done is None:
        done = by_operations(utterance, right_context, state, mems, step)
    y, next_right_context, next_mems, *state[:] = done
    return y, next_right_context, state, next_mems


def infer_by_operations(
    layer: "EmformerLayer",
    utterance: Tensor,
    right_context: Tensor,
    state: list[Tensor],
    mems: Tensor,
    step: Step,
) -> tuple[Tensor, ...]:
    """Returns the encoded utterance and right context, the next layer's mems and the four new states."""
    attention, frames, right = layer.attention, utterance.shape[0], right_context.shape[0]
    memory, left = (layer.max_memory_size if layer.use_mem else 0), layer.left_context_length
    x = torch.cat([right_context, utterance])
    h = layer.layer_norm_input(x)
    summaries = segment_means(layer, h[right:])[:1] if layer.use_mem else None
    old = [t.to(h.dtype) for t in state[:3]]
    query, key, value = project(attention, h, summaries, old[0] if memory else None)
    front = memory + right
    if left:
        key, value = (
            torch.cat([new[:front], past.to(new.dtype), new[front:]])
            for new, past in zip((key, value), old[1:], strict=True)
        )
    dropout = None
    if layer.training and attention.dropout > 0:
        dropout = _step_dropout(query, attention, (frames, left, right, memory), step)
    mixed = segment_attention(
        query,
        key,
        value,
        num_heads=attention.num_heads,
        frames=frames,
        segment_length=frames,
        left_context_length=left,
        right_context_length=right,
        max_memory_size=memory,
        past_frames=left,
        past_memory=memory,
        lengths=step.lengths,
        history=step.history,
        weights_dropout=dropout,
    )
    y, next_mems = finish(layer, mixed, x)
    remembered = torch.cat([old[0], mems])[-memory:] if memory else state[0]
    left_context = (t[front:].index_select(0, step.kept) for t in (key, value))
    return y[right:], y[:right], next_mems, remembered, *left_context, state[3] + frames


def _step_dropout(
    query: Tensor, attention: "EmformerAttention", sizes: tuple[int, ...], step: Step
) -> Tensor:
    """Draws the dropout of the weights as upstream does, over the rows that exist; their number is read back."""
    frames, left, right, memory = sizes
    old_frames, old_memory = step.history.tolist()
    behind = int(step.behind)
    queries, batch, _ = query.shape
    count = old_memory + right + old_frames + frames
    dense = F.dropout(query.new_ones(batch * attention.num_heads, queries, count), p=float(attention.dropout))
    mems, block, head, past, rest = dense.split(
        [old_memory, right, behind, old_frames, frames - behind], dim=2
    )
    mems, past = F.pad(mems, (memory - old_memory, 0)), F.pad(past, (left - old_frames, 0))
    lanes = torch.cat([mems, block, past, head, rest], dim=2)
    return lanes.reshape(batch, attention.num_heads, *lanes.shape[1:])
