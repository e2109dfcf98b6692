# SPDX-License-Identifier: Apache-2.0
r"""Attention of the Emformer (Shi et al., 2021): segments that see memory, right context, left context and themselves.

An utterance of T frames is cut into n segments of S frames, the last one maybe shorter. Queries and keys are

    queries  [right-context blocks (n R) | utterance (T) | summaries (n)]
    keys     [memory (m + n − 1) | right-context blocks (n R) | left context (l) | utterance (T)]

with summaries and the n − 1 memory rows only where M > 0. The m rows of memory and the l frames of left context are
the past of a stream. The queries of segment s, its block of right context and its summary see

    memory [m + s − M, m + s)    right context [s R, (s + 1) R)    l + utterance [l + s S − L, l + (s + 1) S)

as far as there are such rows; summaries see no memory, and nobody sees frames beyond a sequence's length. With
P = softmax(q kᵀ / √d) over what is seen: y = (P ⊙ dropout) v. A query that sees nothing gives 0.

With dP = (g vᵀ) ⊙ dropout: dS = P (dP − Σ P dP), dq = dS k / √d, dk = dSᵀ q / √d, dv = (P ⊙ dropout)ᵀ g.

Upstream: ``_EmformerAttention`` in ``torchaudio.models.emformer``, between its projections. It computes all scores and
hides those that are not seen behind −1e8: 93 % of them at T = 400, S = 16, R = 4, L = 30. Here no score outside a
segment's window is formed but for the edges of tiles, and there is no mask.

Memory traffic: every operand once; scores stay in the cache. Backward recomputes them from q and k. FLOPs: 4 d per
query and key that it sees forward, 10 d backward.
"""

import torch
from torch import Tensor, is_grad_enabled

from fastasr.ops import _check, _layout
from fastasr.ops._dispatch import KernelFamily, direct, native_kernels, served, triton_kernels
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register

OP = "segment_attention"
FAMILY = KernelFamily(OP, (OP,), (native_kernels(OP), triton_kernels(OP)))


# --------------------------------------------------------------------------- windows
def segments_of(frames: int, segment_length: int) -> int:
    return (frames + segment_length - 1) // segment_length


def rows_of(
    frames: int, segment_length: int, right: int, memory: int, past_frames: int = 0, past_memory: int = 0
) -> tuple[int, int]:
    """How many rows queries and keys have."""
    segments = segments_of(frames, segment_length)
    blocks = segments * right + frames
    if memory == 0:
        return blocks, blocks + past_frames
    return blocks + segments, past_memory + max(0, segments - 1) + blocks + past_frames


def query_rows(frames: int, segment_length: int, right: int, memory: int, device: torch.device) -> Tensor:
    """(n, R + S + 1): the row of each query of each segment, -1 where the last segment is short; without the summary
    if there is no memory."""
    segments = segments_of(frames, segment_length)
    s = torch.arange(segments, device=device)[:, None]
    within = torch.arange(segment_length, device=device)[None, :]
    frame = s * segment_length + within
    parts = [
        s * right + torch.arange(right, device=device)[None, :],
        torch.where(frame < frames, segments * right + frame, -1),
    ]
    if memory:
        parts.append(segments * right + frames + s)
    return torch.cat(parts, 1)


def key_rows(
    frames: int, segment_length: int, left: int, right: int, memory: int,
    past_frames: int, past_memory: int, device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(n, M + R + L + S) three times, for each lane of each segment's window: the key's row; how many rows into the
    memory (from its last before the utterance, so that the first of the past is -m) or into the utterance it is; and
    whether there is such a row. What is memory, right context and utterance is told by the lane."""
    segments = segments_of(frames, segment_length)
    s = torch.arange(segments, device=device)[:, None]
    remembered = past_memory + max(0, segments - 1) if memory else 0
    m = s - memory + torch.arange(memory, device=device)[None, :]
    r = s * right + torch.arange(right, device=device)[None, :]
    t = s * segment_length - left + torch.arange(left + segment_length, device=device)[None, :]
    row = torch.cat([past_memory + m, remembered + r, remembered + segments * right + past_frames + t], 1)
    position = torch.cat([m, torch.zeros_like(r), t], 1)
    there = torch.cat([m >= -past_memory, r >= 0, (t >= -past_frames) & (t < frames)], 1)
    return row, position, there


def hidden_lanes(
    position: Tensor, there: Tensor, lengths: Tensor | None, history: Tensor | None, right: int, memory: int
) -> Tensor:
    """(B or 1, n, W): True where a lane of a window holds nothing to be seen."""
    utterance = memory + right
    hidden = ~there[None]
    if lengths is not None:
        beyond = position[None, :, utterance:] >= lengths.clamp(min=0)[:, None, None]
        hidden = torch.cat(
            [hidden[..., :utterance].expand(len(lengths), -1, -1), hidden[..., utterance:] | beyond], 2
        )
    if history is not None:
        before = torch.cat(
            [
                position[:, :memory] < -history[1],
                torch.zeros_like(there[:, memory:utterance]),
                position[:, utterance:] < -history[0],
            ],
            1,
        )
        hidden = hidden | before
    return hidden


# --------------------------------------------------------------------------- definition
def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    frames: int,
    segment_length: int,
    left_context_length: int = 0,
    right_context_length: int = 0,
    max_memory_size: int = 0,
    past_frames: int = 0,
    past_memory: int = 0,
    lengths: Tensor | None = None,
    history: Tensor | None = None,
    weights_dropout: Tensor | None = None,
) -> Tensor:
    """The formula in eager PyTorch, over windows of keys that are gathered per segment."""
    sizes = frames, segment_length, left_context_length, right_context_length, max_memory_size
    sizes = *sizes, past_frames, past_memory
    w = _Windows(query, lengths, history, weights_dropout, num_heads, *sizes)
    scale = w.width**-0.5
    scores = torch.matmul(w.queries(query) * scale, w.keys(key).transpose(-1, -2))
    weights = w.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32))).to(value.dtype)
    if w.dropout is not None:
        weights = weights * w.dropout.to(weights.dtype)
    values = w.keys(value).masked_fill(w.gone, 0)  # what is hidden does not leak, whatever it holds
    mixed = torch.matmul(weights, values)
    if w.memory:
        summary = torch.matmul(weights[..., -1:, w.memory :], values[..., w.memory :, :])
        mixed = torch.cat([mixed[..., :-1, :], summary], -2)
    return w.apart(mixed)


class _Windows:
    """Rows gathered by segment, (B, H, n, rows, d), and put back."""

    def __init__(
        self, query, lengths, history, dropout, heads, frames, segment, left, right, memory, past_frames,
        past_memory,
    ):  # fmt: skip
        device = query.device
        self.batch, self.heads, self.width = query.shape[1], heads, query.shape[2] // heads
        rows = query_rows(frames, segment, right, memory, device)
        at, position, there = key_rows(frames, segment, left, right, memory, past_frames, past_memory, device)
        self.segments = rows.shape[0]
        self.rows = rows.clamp(min=0).flatten()
        self.at = torch.where(there, at, 0).flatten()
        # Where each row of the result is among the windows' rows.
        s, t = (torch.arange(n, device=device) for n in (self.segments, frames))
        per, self.per, self.lanes = rows.shape[1], rows.shape[1], at.shape[1]
        block = s[:, None] * per + torch.arange(right, device=device)
        places = [block.flatten(), t // segment * per + right + t % segment]
        self.places = torch.cat([*places, s * per + right + segment] if memory else places)
        hidden = hidden_lanes(position, there, lengths, history, right, memory)[:, None, :, None, :]
        self.gone, self.memory = hidden.transpose(-1, -2), memory
        if memory:
            summary = torch.zeros(per, 1, dtype=torch.bool, device=device)
            summary[-1] = True
            hidden = hidden | (summary & (torch.arange(at.shape[1], device=device) < memory))
        self.hidden = hidden
        self.dropout = None
        if dropout is not None:
            self.dropout = dropout.index_select(2, self.rows).reshape(
                self.batch, heads, self.segments, per, at.shape[1]
            )

    def queries(self, t: Tensor) -> Tensor:
        return self._gathered(t, self.rows, self.per)

    def keys(self, t: Tensor) -> Tensor:
        return self._gathered(t, self.at, self.lanes)

    def _gathered(self, t: Tensor, at: Tensor, count: int) -> Tensor:
        t = t.index_select(0, at).reshape(self.segments, count, self.batch, self.heads, self.width)
        return t.permute(2, 3, 0, 1, 4)

    def softmax(self, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(self.hidden, float("-inf"))
        return torch.softmax(scores, -1).masked_fill(self.hidden, 0)

    def apart(self, windows: Tensor) -> Tensor:
        """(B, H, n, rows, d) -> (Q, B, D)"""
        return self._flat(windows).index_select(0, self.places)

    def _flat(self, windows: Tensor) -> Tensor:
        count = windows.shape[3]
        return windows.permute(2, 3, 0, 1, 4).reshape(
            self.segments * count, self.batch, self.heads * self.width
        )

    def query_windows_of(self, grad: Tensor) -> Tensor:
        """The gradient of :meth:`apart`: rows that it leaves out get 0."""
        windows = grad.new_zeros(self.rows.shape[0], *grad.shape[1:])
        windows[self.places] = grad
        return self._gathered(windows, torch.arange(self.rows.shape[0], device=grad.device), self.per)

    def added(self, windows: Tensor, like: Tensor) -> Tensor:
        """The gradient of :meth:`keys`."""
        out = torch.zeros(like.shape, dtype=windows.dtype, device=like.device)
        return out.index_add(0, self.at, self._flat(windows))


def definition_backward(
    grad, query, key, value, lengths, history, dropout, heads, *sizes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue), computed in float32 or better."""
    wide = torch.promote_types(query.dtype, torch.float32)
    w = _Windows(query, lengths, history, dropout, heads, *sizes)
    q, k, v = w.queries(query.to(wide)), w.keys(key.to(wide)), w.keys(value.to(wide))
    g = w.query_windows_of(grad.to(wide))
    scale = w.width**-0.5
    soft = w.softmax(torch.matmul(q * scale, k.transpose(-1, -2)))
    weights, dsoft = soft, torch.matmul(g, v.transpose(-1, -2))
    if w.dropout is not None:
        weights, dsoft = soft * w.dropout, dsoft * w.dropout
    dscores = soft * (dsoft - (soft * dsoft).sum(-1, keepdim=True)) * scale
    dquery = w.apart(torch.matmul(dscores, k))
    dkey = w.added(torch.matmul(dscores.transpose(-1, -2), q), key)
    dvalue = w.added(torch.matmul(weights.transpose(-1, -2), g), value)
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)


# --------------------------------------------------------------------------- kernels
# From here on query, key and value have one dtype, lengths and history are int64, dropout has the dtype that is
# computed in, and the functions take (query, key, value, lengths, history, dropout, num_heads, frames, segment_length,
# left, right, memory, past_frames, past_memory), as the kernels do.
def forward(query, key, value, lengths, history, dropout, heads: int, *sizes: int) -> Tensor:
    """y without autograd, by the best kernel."""
    kernels = FAMILY.kernels(query)
    if kernels is None:
        names = ("frames", "segment_length", "left_context_length", "right_context_length", "max_memory_size")
        named = dict(zip((*names, "past_frames", "past_memory"), sizes, strict=True))
        masks = {"lengths": lengths, "history": history, "weights_dropout": dropout}
        return definition(query, key, value, num_heads=heads, **named, **masks)
    tensors = map(_layout.dense_channels, (query, key, value))
    return kernels.forward(*tensors, *_dense(lengths, history, dropout), heads, *sizes)


def backward(
    grad, query, key, value, lengths, history, dropout, heads: int, *sizes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue) without autograd, by the best kernel."""
    kernels = FAMILY.kernels(query)
    if kernels is None:
        return definition_backward(grad, query, key, value, lengths, history, dropout, heads, *sizes)
    tensors = map(_layout.dense_channels, (grad, query, key, value))
    return kernels.backward(*tensors, *_dense(lengths, history, dropout), heads, *sizes)


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        ctx.save_for_backward(*arguments[:6])
        ctx.rest = arguments[6:]
        return forward(*arguments)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward(OP)
        return *backward(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 11


# --------------------------------------------------------------------------- registration
_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? history, Tensor? dropout"
_OPTIONS = (
    "int num_heads, SymInt frames, int segment_length, int left_context_length, int right_context_length, "
    "int max_memory_size, SymInt past_frames, SymInt past_memory"
)


def _empty(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


_BACKWARD_OP = register(
    f"segment_attention_backward(Tensor grad, {_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    backward,
    lambda grad, query, key, value, *_: (_empty(query), _empty(key), _empty(value)),
)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]


_OP = register(
    f"segment_attention({_TENSORS}, {_OPTIONS}) -> Tensor",
    forward,
    lambda query, *_: _empty(query),
    setup_context=_setup,
    backward=lambda ctx, grad: (*_BACKWARD_OP(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 11),
    autocast=lambda dtype, query, key, value, *rest: (*cast(dtype, query, key, value), *rest),
)


# --------------------------------------------------------------------------- public function
def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    frames: int,
    segment_length: int,
    left_context_length: int = 0,
    right_context_length: int = 0,
    max_memory_size: int = 0,
    past_frames: int = 0,
    past_memory: int = 0,
    lengths: Tensor | None = None,
    history: Tensor | None = None,
    weights_dropout: Tensor | None = None,
) -> Tensor:
    """Attention of every segment over its memory, right context, left context and itself.

    Args:
        query: (Q, B, D), Q = n R + T and, where there is memory, n more: right-context blocks, utterance, summaries;
            n = ceil(T / S). float32, bfloat16, float16 or float64. Slices of a projection need no copy.
        key, value: (K, B, D), of query's dtype outside autocast; K = n R + l + T and, where there is memory,
            m + n − 1 more in front: memory, right-context blocks, left context of the past, utterance.
        num_heads: H; d = D / H channels each.
        frames: T. segment_length: S. left_context_length, right_context_length: L, R. max_memory_size: M.
        past_frames, past_memory: l, m: rows of an utterance's past among the keys.
        lengths: (B,) of integers: frames of each sequence that may be seen; default: all.
        history: (2,) of integers: of the past frames and of the past memory so many rows, the last ones, may be seen;
            default: all. Read on the device, so a stream needs no synchronisation.
        weights_dropout: (B, H, Q, M + R + L + S), multiplied on the weights after the softmax: by query and place in
            its window. Bool or floating, a constant.
    Returns:
        (Q, B, D) in query's dtype; 0 for a query that sees no key.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: sizes, shapes or devices do not match.
    """
    tensors = query, key, value
    sizes = frames, segment_length, left_context_length, right_context_length, max_memory_size
    sizes = *sizes, past_frames, past_memory
    _check_sizes(num_heads, sizes)
    _check_tensors(query, key, value, num_heads, sizes)
    _check_masks(query, lengths, history, weights_dropout, num_heads, sizes)
    masks = lengths, history, weights_dropout
    dtype = autocast_dtype(query)
    if dtype is not None:
        tensors = cast(dtype, *tensors)
    for name, t in (("key", tensors[1]), ("value", tensors[2])):
        if t.dtype is not tensors[0].dtype:
            raise TypeError(f"fastasr.{OP}: {name}: expected {query.dtype} (that of query), got {t.dtype}")
    plain = direct(*tensors, *masks)
    if FAMILY.kernels(query) is None if plain else not served(OP, query):
        names = ("frames", "segment_length", "left_context_length", "right_context_length", "max_memory_size")
        named = dict(zip((*names, "past_frames", "past_memory"), sizes, strict=True))
        return definition(
            *tensors, num_heads=num_heads, **named,
            lengths=lengths, history=history, weights_dropout=weights_dropout,
        )  # fmt: skip
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    lengths, history = (t if t is None else t.to(torch.int64) for t in (lengths, history))
    dropout = None if weights_dropout is None else weights_dropout.to(wide)
    arguments = *tensors, lengths, history, dropout, num_heads, *sizes
    if not plain:
        return _OP(*arguments)
    if is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _SegmentAttention.apply(*arguments)
    return forward(*arguments)


def _check_sizes(heads: object, sizes: tuple) -> None:
    names = "frames", "segment_length", "left_context_length", "right_context_length", "max_memory_size"
    least = {"segment_length": 1, "num_heads": 1}
    for name, value in zip(("num_heads", *names, "past_frames", "past_memory"), (heads, *sizes), strict=True):
        _check.integer(OP, name, value)
        if value < least.get(name, 0):
            raise ValueError(f"fastasr.{OP}: {name}: expected at least {least.get(name, 0)}, got {value}")
    if sizes[6] and not sizes[4]:
        raise ValueError(f"fastasr.{OP}: past_memory: expected 0 without memory, got {sizes[6]}")


def _check_tensors(query: object, key: object, value: object, heads: int, sizes: tuple) -> None:
    frames, segment, _, right, memory, past_frames, past_memory = sizes
    queries, keys = rows_of(frames, segment, right, memory, past_frames, past_memory)
    _check.floating_tensor(OP, "query", query)
    ok = query.dim() == 3 and query.shape[0] == queries and query.shape[2] % heads == 0
    expected = f"({queries}, B, D) with D a multiple of {heads}, of at least {heads}"
    _check.shape(OP, "query", query, expected, ok and query.shape[2] > 0)
    whole = (keys, *query.shape[1:])
    for name, t in (("key", key), ("value", value)):
        _check.floating_tensor(OP, name, t)
        _check.shape(OP, name, t, f"{tuple(whole)}", t.shape == whole)
        _check.same_device(OP, name, t, query, "query")


def _check_masks(query: Tensor, lengths, history, dropout, heads: int, sizes: tuple) -> None:
    batch = query.shape[1]
    for name, t, whole in (("lengths", lengths, (batch,)), ("history", history, (2,))):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.dtype not in _INTEGERS:
            got = str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"fastasr.{OP}: {name}: expected a tensor of integers, got {got}")
        if t.layout is not torch.strided:
            raise TypeError(f"fastasr.{OP}: {name}: expected a strided tensor, got layout {t.layout}")
        _check.shape(OP, name, t, f"{whole}", t.shape == whole)
        _check.same_device(OP, name, t, query, "query")
    if dropout is not None:
        _, segment, left, right, memory, *_ = sizes
        _check.constant_mask(OP, "weights_dropout", dropout, query, "query")
        whole = (batch, heads, query.shape[0], memory + right + left + segment)
        _check.shape(OP, "weights_dropout", dropout, f"{whole}", dropout.shape == whole)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
