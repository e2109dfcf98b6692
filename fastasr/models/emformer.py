# SPDX-License-Identifier: Apache-2.0
"""The Emformer (Shi et al., 2021): a streaming acoustic encoder, as ``torchaudio.models.Emformer``.

Every segment of an utterance attends to itself, a few frames before and after it and a memory of means of earlier
segments. Parameters, constructor, ``forward``, ``infer`` and its states are torchaudio's; between the projections of
a layer is :func:`fastasr.ops.segment_attention`, so no mask is built, and ``infer`` reads nothing back from the device.

Differences: ``infer`` works in half precision, and a query that sees nothing (padding alone) gets 0.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastasr.models import emformer_streaming
from fastasr.models.common import plumbing
from fastasr.models.common.inference import any_hooked, is_unmodified
from fastasr.models.common.module_state import global_hooks
from fastasr.ops import _dropout, linear, linear_activation, residual_norm, segment_attention
from fastasr.ops.segment_attention import key_rows, query_rows, segments_of

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
_KERNELS = {module: name for name, module in _ACTIVATIONS.items()}
_HIDDEN = -1e4  # below it e^x is 0 beside any score: what is hidden can be left out


class EmformerAttention(nn.Module):
    """The projections of a layer's attention. Its mathematics are in :class:`EmformerLayer`."""

    def __init__(
        self,
        input_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        weight_init_gain: float | None = None,
        tanh_on_mem: bool = False,
        negative_inf: float = -1e8,
    ) -> None:
        super().__init__()
        if input_dim % num_heads != 0:
            raise ValueError(
                f"EmformerAttention: input_dim: expected a multiple of num_heads ({num_heads}), got {input_dim}"
            )
        if negative_inf > _HIDDEN:
            raise ValueError(
                f"EmformerAttention: negative_inf: expected at most {_HIDDEN:g} (keys are left out, not weighed "
                f"down), got {negative_inf}"
            )
        self.input_dim = input_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.tanh_on_mem = tanh_on_mem
        self.negative_inf = negative_inf
        self.scaling = (input_dim // num_heads) ** -0.5
        self.emb_to_key_value = nn.Linear(input_dim, 2 * input_dim)
        self.emb_to_query = nn.Linear(input_dim, input_dim)
        self.out_proj = nn.Linear(input_dim, input_dim)
        if weight_init_gain:
            nn.init.xavier_uniform_(self.emb_to_key_value.weight, gain=weight_init_gain)
            nn.init.xavier_uniform_(self.emb_to_query.weight, gain=weight_init_gain)


class EmformerLayer(nn.Module):
    """LayerNorm, segment attention, feed-forward network, LayerNorm, with residuals."""

    def __init__(
        self,
        input_dim: int,
        num_heads: int,
        ffn_dim: int,
        segment_length: int,
        dropout: float = 0.0,
        activation: str = "relu",
        left_context_length: int = 0,
        max_memory_size: int = 0,
        weight_init_gain: float | None = None,
        tanh_on_mem: bool = False,
        negative_inf: float = -1e8,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"EmformerLayer: activation: expected one of {tuple(_ACTIVATIONS)}, got {activation!r}"
            )
        self.attention = EmformerAttention(
            input_dim, num_heads, dropout, weight_init_gain, tanh_on_mem, negative_inf
        )
        self.dropout = nn.Dropout(dropout)
        self.memory_op = nn.AvgPool1d(kernel_size=segment_length, stride=segment_length, ceil_mode=True)
        self.pos_ff = nn.Sequential(
            nn.LayerNorm(input_dim),
            nn.Linear(input_dim, ffn_dim),
            _ACTIVATIONS[activation](),
            nn.Dropout(dropout),
            nn.Linear(ffn_dim, input_dim),
            nn.Dropout(dropout),
        )
        self.layer_norm_input = nn.LayerNorm(input_dim)
        self.layer_norm_output = nn.LayerNorm(input_dim)
        self.left_context_length = left_context_length
        self.segment_length = segment_length
        self.max_memory_size = max_memory_size
        self.input_dim = input_dim
        self.use_mem = max_memory_size > 0

    def forward(
        self,
        utterance: Tensor,
        lengths: Tensor,
        right_context: Tensor,
        mems: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer over whole utterances.

        Args:
            utterance: (T, B, D). lengths: (B,), valid frames.
            right_context: (n R, B, D), a block of R frames for each of the n segments.
            mems: (n - 1, B, D), or without elements where the layer has no memory.
            attention_mask: what upstream builds; the windows of the segments say the same, so it is not read.
        Returns:
            The encoded utterance and right context, and the memory for the next layer.
        """
        frames, batch, _ = utterance.shape
        seen = _seen(lengths, frames) if batch > 1 else None
        blocks = right_context.shape[0]
        y, next_mems = _encoded(self, torch.cat([right_context, utterance]), frames, seen, mems)
        return y[blocks:], y[:blocks], next_mems

    def infer(
        self,
        utterance: Tensor,
        lengths: Tensor,
        right_context: Tensor,
        state: list[Tensor] | None,
        mems: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
        """One layer over one segment of a stream; see :meth:`Emformer.infer`."""
        past = None if state is None else state[3]
        step = _Step(self, utterance.shape[0], utterance.shape[1], lengths, past, utterance.device)
        return _infer(self, utterance, right_context, state, mems, step)


class Emformer(nn.Module):
    """A stack of Emformer layers.

    Args:
        input_dim: channels of a frame. num_heads: heads of attention. ffn_dim: hidden channels of the feed-forward
            networks. num_layers: layers. segment_length: frames of a segment.
        dropout: of attention weights, attention and feed-forward network.
        activation: of the feed-forward network, "relu", "gelu" or "silu".
        left_context_length, right_context_length: frames that a segment sees before and after itself.
        max_memory_size: earlier segments that are seen through their means; 0 for none.
        weight_init_scale_strategy: "depthwise" (gain 1 / sqrt(layer)), "constant" (1 / sqrt 2) or None.
        tanh_on_mem: whether memory goes through tanh, instead of being clamped to ±10.
        negative_inf: kept for upstream's signature: what is hidden is left out.
    Raises:
        ValueError: an option is none of those above, or heads do not divide input_dim.
    """

    def __init__(
        self,
        input_dim: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        segment_length: int,
        dropout: float = 0.0,
        activation: str = "relu",
        left_context_length: int = 0,
        right_context_length: int = 0,
        max_memory_size: int = 0,
        weight_init_scale_strategy: str | None = "depthwise",
        tanh_on_mem: bool = False,
        negative_inf: float = -1e8,
    ) -> None:
        super().__init__()
        self.use_mem = max_memory_size > 0
        self.memory_op = nn.AvgPool1d(kernel_size=segment_length, stride=segment_length, ceil_mode=True)
        self.emformer_layers = nn.ModuleList(
            EmformerLayer(
                input_dim,
                num_heads,
                ffn_dim,
                segment_length,
                dropout=dropout,
                activation=activation,
                left_context_length=left_context_length,
                max_memory_size=max_memory_size,
                weight_init_gain=gain,
                tanh_on_mem=tanh_on_mem,
                negative_inf=negative_inf,
            )
            for gain in _init_gains(weight_init_scale_strategy, num_layers)
        )
        self.left_context_length = left_context_length
        self.right_context_length = right_context_length
        self.segment_length = segment_length
        self.max_memory_size = max_memory_size

    def forward(self, input: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode whole utterances.

        Args:
            input: (B, T + right_context_length, D), utterances followed by their right context.
            lengths: (B,), valid frames of each utterance. With one utterance it is ignored, as upstream does; with
                several, the longest counts as T.
        Returns:
            (B, T, D) and the lengths.
        """
        x = input.transpose(0, 1)
        frames = x.shape[0] - self.right_context_length
        right_context = x.index_select(
            0, _right_context_rows(frames, self.segment_length, self.right_context_length, x.device)
        )
        output = x[:frames]
        mems = _memory(self, output)[:-1] if self.use_mem else x.new_empty(0)
        mask = None
        if not all(_is_own(layer, "forward") for layer in self.emformer_layers):
            mask = self._gen_attention_mask(output)  # for layers that run upstream's code
        # Between our own layers [right context | utterance] stays one tensor.
        blocks, whole = right_context.shape[0], None
        seen = _seen(lengths, frames) if x.shape[1] > 1 else None
        for layer in self.emformer_layers:
            if _is_unwatched(layer):
                whole = torch.cat([right_context, output]) if whole is None else whole
                whole, mems = _encoded(layer, whole, frames, seen, mems)
                continue
            if whole is not None:
                right_context, output, whole = whole[:blocks], whole[blocks:], None
            output, right_context, mems = layer(output, lengths, right_context, mems, mask)
        output = output if whole is None else whole[blocks:]
        return output.transpose(0, 1), lengths

    def infer(
        self, input: Tensor, lengths: Tensor, states: list[list[Tensor]] | None = None
    ) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """Encode the next segment of a stream.

        Args:
            input: (B, segment_length + right_context_length, D).
            lengths: (B,), valid frames of it, right context included.
            states: what the call before returned; its lists are updated in place. Per layer: memory (M, B, D), keys and
                values of the left context (L, B, D) each, and the frames so far, (1, B) int32.
        Returns:
            (B, segment_length, D), its lengths, and the states.
        Raises:
            ValueError: input has another number of frames.
        """
        expected = self.segment_length + self.right_context_length
        if input.shape[1] != expected:
            raise ValueError(
                f"Emformer.infer: input: expected {expected} frames (segment_length + right_context_length), got "
                f"{input.shape[1]}"
            )
        x = input.transpose(0, 1)
        output, right_context = x[: self.segment_length], x[self.segment_length :]
        lengths = torch.clamp(lengths - self.right_context_length, min=0)
        mems = _memory(self, output) if self.use_mem else x.new_empty(0)
        layers, step, next_states = self.emformer_layers, None, []
        for i, layer in enumerate(layers):
            state = None if states is None else states[i]
            if _is_own(layer, "infer"):
                if step is None:
                    past = None if state is None else state[3]
                    step = _Step(layer, *output.shape[:2], lengths, past, x.device)
                output, right_context, state, mems = _infer(layer, output, right_context, state, mems, step)
            else:
                output, right_context, state, mems = layer.infer(output, lengths, right_context, state, mems)
            next_states.append(state)
        return output.transpose(0, 1), lengths, next_states


# --------------------------------------------------------------------------- pieces of a layer
def _init_gains(strategy: str | None, layers: int) -> list[float | None]:
    if strategy is None:
        return [None] * layers
    if strategy == "depthwise":
        return [1 / math.sqrt(i + 1) for i in range(layers)]
    if strategy == "constant":
        return [1 / math.sqrt(2)] * layers
    raise ValueError(
        f"Emformer: weight_init_scale_strategy: expected 'depthwise', 'constant' or None, got {strategy!r}"
    )


def _is_own(layer: nn.Module, name: str) -> bool:
    function = getattr(getattr(layer, name), "__func__", None)
    function = getattr(function, "fastasr_forward", function)  # as the swap binds it
    return function is getattr(EmformerLayer, name)


def _is_unwatched(layer: nn.Module) -> bool:
    """Whether calling the layer is no more than its own forward."""
    return not any_hooked((layer,)) and not global_hooks() and _is_own(layer, "forward")


def _encoded(
    layer: nn.Module, x: Tensor, frames: int, seen: Tensor | None, mems: Tensor
) -> tuple[Tensor, Tensor]:
    """The layer's [right context | utterance], and the memory for the next layer. ``seen``: see :func:`_seen`."""
    segments = segments_of(frames, layer.segment_length)
    right = (x.shape[0] - frames) // max(1, segments)
    memory = layer.max_memory_size if layer.use_mem else 0
    sizes = frames, layer.segment_length, layer.left_context_length, right, memory
    h = _norm(layer.layer_norm_input, x)
    query, key, value = _projected(
        layer.attention,
        h,
        _summaries(layer, h[segments * right :]),
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
    y, next_mems = _finished(layer, mixed, x)
    return y, next_mems[:-1]


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _memory(module: nn.Module, utterance: Tensor) -> Tensor:
    """Means over segments, (n, B, D)."""
    return module.memory_op(utterance.permute(1, 2, 0)).permute(2, 0, 1)


def _summaries(layer: nn.Module, utterance: Tensor) -> Tensor | None:
    return _memory(layer, utterance) if layer.use_mem else None


def _projected(
    attention: nn.Module, h: Tensor, summaries: Tensor | None, mems: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of [h, summaries], keys and values of [mems, h]."""
    asking = h if summaries is None else torch.cat([h, summaries])
    asked = h if mems is None else torch.cat([mems, h])
    query = linear(asking, attention.emb_to_query.weight, attention.emb_to_query.bias)
    both = linear(asked, attention.emb_to_key_value.weight, attention.emb_to_key_value.bias)
    return query, *both.chunk(2, dim=2)


def _seen(lengths: Tensor, frames: int) -> Tensor:
    """Frames of each sequence that may be seen: upstream counts the padding behind the longest as valid."""
    if lengths.is_floating_point():
        lengths = lengths.ceil()
    return (lengths + (frames - lengths.max())).to(torch.int64)


def _attention_dropout(query: Tensor, keys: int, attention: nn.Module, sizes: tuple[int, ...]) -> Tensor:
    """(B, H, Q, lanes): dropout of the weights that are seen. Upstream drops of the dense (B H, Q, K), so as many
    numbers are drawn and those of the windows are picked: the same seed gives the same draws."""
    batch, heads = query.shape[1], attention.num_heads
    places = _window_places(*sizes, query.device)
    drawn = _dropout.windows(query, places, batch * heads, keys, float(attention.dropout))
    return drawn.view(batch, heads, *places.shape)


@functools.lru_cache(maxsize=8)
def _window_places(
    frames: int, segment: int, left: int, right: int, memory: int, device: torch.device
) -> Tensor:
    """(Q, lanes): the keys that are the lanes of each query's window."""
    with torch.inference_mode(False):  # kept: a training step may want what a search has made
        rows = query_rows(frames, segment, right, memory, device)  # (n, per)
        at, _, there = key_rows(frames, segment, left, right, memory, 0, 0, device)
        places = torch.where(there, at, 0)[:, None, :].expand(-1, rows.shape[1], -1)
        valid = rows.flatten() >= 0
        return places.flatten(0, 1)[valid][torch.argsort(rows.flatten()[valid])]


@functools.lru_cache(maxsize=64)
def _right_context_rows(frames: int, segment: int, right: int, device: torch.device) -> Tensor:
    """Rows of the frames that follow each segment; the last one's are those behind the utterance."""
    with torch.inference_mode(False):
        segments = segments_of(frames, segment)
        starts = torch.clamp((torch.arange(segments, device=device) + 1) * segment, max=frames)
        return (starts[:, None] + torch.arange(right, device=device)).flatten()


def _finished(layer: nn.Module, mixed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What follows the attention: (the layer's output for the rows of x, memory from the summaries)."""
    attention, ff, rows = layer.attention, layer.pos_ff, x.shape[0]
    out = linear(mixed, attention.out_proj.weight, attention.out_proj.bias)
    mems = out[rows:]
    mems = torch.tanh(mems) if attention.tanh_on_mem else torch.clamp(mems, min=-10, max=10)
    x = plumbing.dropout(layer.dropout, out[:rows], x)
    h = plumbing.dropout(ff[3], _activated(ff[1], ff[2], _norm(ff[0], x)))
    h = plumbing.dropout(ff[5], linear(h, ff[4].weight, ff[4].bias))
    norm = layer.layer_norm_output
    if norm.weight is None or h.dtype is not x.dtype:
        return _norm(norm, h + x), mems
    return residual_norm(x, h, norm.weight, norm.bias, norm.eps), mems


def _activated(affine: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    name = _KERNELS.get(type(activation))
    plain = name is not None and is_unmodified(activation, _KERNELS) and not plumbing.is_watched(activation)
    if not plain or getattr(activation, "approximate", "none") != "none":
        return activation(linear(x, affine.weight, affine.bias))
    return linear_activation(x, affine.weight, affine.bias, name)


# --------------------------------------------------------------------------- a step of a stream
class _Step:
    """What the layers of one step share, as tensors on the device: nothing is read back."""

    def __init__(
        self,
        layer: nn.Module,
        frames: int,
        batch: int,
        lengths: Tensor,
        past: Tensor | None,
        device: torch.device,
    ) -> None:
        left, memory = layer.left_context_length, layer.max_memory_size
        self.lengths = _seen(lengths, frames) if batch > 1 else None
        self.behind = torch.clamp(frames - lengths.max(), min=0).to(torch.int64)
        if past is None:
            self.history = torch.zeros(2, dtype=torch.int64, device=device)
        else:
            past = past[0, :1].to(torch.int64)
            memories = (past + (layer.segment_length - 1)) // layer.segment_length
            self.history = torch.cat([past.clamp(max=left), memories.clamp(max=memory)])
        self.kept = self._kept(frames, left)

    def _kept(self, frames: int, left: int) -> Tensor:
        """(L,): rows of [left context, utterance] that become the next left context.

        Upstream appends [utterance, first `behind` rows | valid left context | rest of the utterance] to the old left
        context and keeps the last L rows."""
        back = torch.arange(left, 0, -1, device=self.history.device)  # rows from the end
        valid, rest = self.history[0], frames - self.behind
        old = torch.where(back <= rest + valid, left - (back - rest), left - (back - valid - frames))
        head = left + self.behind - (back - rest - valid)
        in_head = (back > rest + valid) & (back <= frames + valid)
        return torch.where(back <= rest, left + frames - back, torch.where(in_head, head, old))


def _new_state(layer: nn.Module, utterance: Tensor) -> list[Tensor]:
    batch = utterance.shape[1]
    rows = layer.max_memory_size, layer.left_context_length, layer.left_context_length
    state = [utterance.new_zeros(n, batch, layer.input_dim) for n in rows]
    return [*state, torch.zeros(1, batch, dtype=torch.int32, device=utterance.device)]


def _infer(
    layer: nn.Module,
    utterance: Tensor,
    right_context: Tensor,
    state: list[Tensor] | None,
    mems: Tensor,
    step: _Step,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    if state is None:
        state = _new_state(layer, utterance)
    by_operations = functools.partial(_infer_by_operations, layer)
    done = emformer_streaming.step(layer, utterance, right_context, state, mems, step, by_operations)
    if done is None:
        done = by_operations(utterance, right_context, state, mems, step)
    y, next_right_context, next_mems, *state[:] = done
    return y, next_right_context, state, next_mems


def _infer_by_operations(
    layer: nn.Module,
    utterance: Tensor,
    right_context: Tensor,
    state: list[Tensor],
    mems: Tensor,
    step: _Step,
) -> tuple[Tensor, ...]:
    """The utterance and right context encoded, the next layer's mems, the four states after the segment."""
    attention, frames, right = layer.attention, utterance.shape[0], right_context.shape[0]
    memory, left = (layer.max_memory_size if layer.use_mem else 0), layer.left_context_length
    x = torch.cat([right_context, utterance])
    h = _norm(layer.layer_norm_input, x)
    summaries = _memory(layer, h[right:])[:1] if layer.use_mem else None
    old = [t.to(h.dtype) for t in state[:3]]
    query, key, value = _projected(attention, h, summaries, old[0] if memory else None)
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
    y, next_mems = _finished(layer, mixed, x)
    remembered = torch.cat([old[0], mems])[-memory:] if memory else state[0]
    left_context = (t[front:].index_select(0, step.kept) for t in (key, value))
    return y[right:], y[:right], next_mems, remembered, *left_context, state[3] + frames


def _step_dropout(query: Tensor, attention: nn.Module, sizes: tuple[int, ...], step: _Step) -> Tensor:
    """As :func:`_attention_dropout`, among the rows that there are: their number is read back."""
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
