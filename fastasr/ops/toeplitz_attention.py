# SPDX-License-Identifier: Apache-2.0
r"""Gated attention of MEGA (Ma et al., 2022, section 3.3) with a Toeplitz bias, between its matrix products.

With z = act(query_key), q = (z ⊙ w₀ + b₀) / √d and k = z ⊙ w₁ + b₁, per sequence and chunk of C frames:

S_ij = q_i · k_j + β_{j−i}, masked where j > i (causal) or key j is padding;  A = softmax_j(S) ⊙ M;
h = A v;  y = h ⊙ act(gate).

β_{j−i} is entry P − 1 + (j − i) of ``position_bias`` (2 P − 1 entries, P ≥ C). M, optional, is the mask of dropout.
A chunk whose keys are all padding ignores the padding mask, as upstream does. There is one head.

With g = dy ⊙ act(gate): dgate = dy ⊙ h ⊙ act'(gate); dv = Aᵀ g; dA = (g vᵀ) ⊙ M;
dS = s ⊙ (dA − Σ_j s dA) with s = softmax(S); dβ_t = Σ_{j−i=t} dS_ij; dq̂ = dS k / √d for q̂ = q √d, dk = dSᵀ q;
dw = Σ dq̂ z, Σ dk z; db = Σ dq̂, and 0 for keys, whose bias moves all scores of a query alike;
dquery_key = (dq̂ w₀ + dk w₁) act'(query_key).
Upstream: ``MEGA`` in ``espnet2.asr_transducer.decoder.blocks.mega``.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _activation, _layout
from fastasr.ops._dispatch import Kernels, widest
from fastasr.ops._op import Arguments, Needs, Op, Saved, op


# --------------------------------------------------------------------------- parts
def chunks(length: int, chunk_size: int) -> tuple[int, int]:
    """Returns (frames per chunk, number of chunks) of a sequence."""
    size = max(1, min(chunk_size, length) if chunk_size > 0 else length)
    return size, (length + size - 1) // size


def _chunks(a: Arguments) -> tuple[int, int]:
    return chunks(len(a.query_key), a.chunk_size)


def mask_of(
    length: int, size: int, count: int, causal: bool, padding_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Returns True where a key may not be seen, broadcastable to (B, chunks, size, size); None when all may."""
    mask = None
    if causal:
        mask = torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
    if padding_mask is not None:
        padded = F.pad(padding_mask, (0, size * count - length), value=True)
        padded = padded.reshape(len(padding_mask), count, 1, size)
        padded = padded & ~padded.all(-1, keepdim=True)
        mask = padded if mask is None else mask | padded
    if size * count != length:
        behind = (
            torch.arange(size * count, device=device, dtype=torch.int64).reshape(count, 1, size) >= length
        )
        mask = behind if mask is None else mask | behind
    return mask


def _operands(kernels: Kernels, s: Saved, *more: Tensor) -> tuple:
    """Returns the operands as kernels read them: activations, of which ``more`` come first, in one dtype; the others in
    the dtype of the computation, parameters in their own for Triton's kernels, which convert what they load.
    """
    parameters = s.qk_weight, s.qk_bias, s.position_bias
    dtype = torch.promote_types(torch.promote_types(s.gate.dtype, s.value.dtype), s.query_key.dtype)
    dtype = torch.promote_types(dtype, widest(s.query_key, parameters))
    work = torch.promote_types(dtype, torch.float32)
    padding, dropout = s.padding_mask, s.weights_dropout
    return (
        *(_layout.dense_channels(t.to(dtype)) for t in (*more, s.query_key, s.gate, s.value)),
        *((t if kernels.backend == "triton" else t.to(work)).contiguous() for t in parameters),
        padding if padding is None else padding.contiguous(),
        dropout if dropout is None else dropout.to(work).contiguous(),
    )


def _numbers(s: Saved) -> tuple[bool, int, int, bool]:
    return s.causal, s.chunk_size, _activation.NAMES.index(s.activation), s.activate_value


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    return kernels.forward(*_operands(kernels, a), *_numbers(a), keep)


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], s: Saved, needs: Needs
) -> tuple[Tensor, ...]:
    operands = _operands(kernels, s, *grads)
    return kernels.backward(*operands, s.mixed.to(operands[0].dtype).contiguous(), *_numbers(s))


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    strides=dict.fromkeys(("query_key", "gate", "value", "grad"), "channels"),
    keeps={"mixed": Annotated[Tensor, "L B V", "query_key + gate + value"]},
    sizes={"size count": _chunks},
    launch=_launch,
    gradients=_gradients,
)
def toeplitz_attention(
    query_key: Annotated[Tensor, "L B D, D >= 1"],
    gate: Annotated[Tensor, "L B V"],
    value: Annotated[Tensor, "L B V"],
    qk_weight: Annotated[Tensor, "2 D", "wide"],
    qk_bias: Annotated[Tensor, "2 D", "wide"],
    position_bias: Annotated[Tensor, "2*P-1, P >= size", "wide"],
    *,
    causal: bool = True,
    padding_mask: Annotated[Tensor, "B L", bool] | None = None,
    chunk_size: int = 0,
    activation: _activation.Activation = "silu",
    weights_dropout: Annotated[Tensor, "B count size size", "constant", "wide"] | None = None,
    activate_value: bool = False,
) -> Annotated[Tensor, "L B V", "value + gate"]:
    """Mega's gated attention: softmax(q kᵀ / √d + bias) value · act(gate), q and k affine in act(query_key).

    Queries and keys have one length: decoding against a longer history of keys is another operation.

    Args:
        query_key: (L, B, d), before the activation; any strides, so a slice of a projection needs no copy.
        gate: (L, B, V), before the activation.
        value: (L, B, V), after it, or before it with ``activate_value``.
        qk_weight, qk_bias: (2, d): row 0 makes queries, row 1 keys.
        position_bias: (2 P − 1,), P at least the frames of a chunk (of the sequence without chunks): entry
            P − 1 + j − i is added to the score of query i and key j.
        causal: query i sees keys j ≤ i alone.
        padding_mask: bool (B, L), True where a key is padding. A chunk of padding alone ignores it. A query that is
            left without any key gives NaN, as a softmax of nothing does.
        chunk_size: frames per chunk, each attending to itself; 0 or less: one chunk. The last one may be shorter.
        activation: "identity", "silu", "relu", "tanh" or "gelu".
        weights_dropout: (B, chunks, C, C), C the frames of a chunk: multiplied on the weights after the softmax.
    Returns:
        (L, B, V) in the promoted dtype of value and gate.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    act = _activation.FUNCTIONS[activation]
    length, batch, channels = query_key.shape
    size, count = chunks(length, chunk_size)

    def apart(t: Tensor) -> Tensor:  # (L, B, C) -> (B, chunks, size, C), zeros behind the last frame
        t = F.pad(t, (0, 0, 0, 0, 0, size * count - length)) if size * count != length else t
        return t.transpose(0, 1).reshape(batch, count, size, t.shape[-1])

    z = act(query_key)
    query = apart((z * qk_weight[0] + qk_bias[0]) * channels**-0.5)
    key = apart(z * qk_weight[1] + qk_bias[1])
    middle = position_bias.shape[0] // 2
    bias = position_bias[middle + 1 - size : middle + size].unfold(0, size, 1).flip(0)
    scores = torch.matmul(query, key.transpose(-1, -2)) + bias
    mask = mask_of(length, size, count, causal, padding_mask, scores.device)
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=wide).to(value.dtype)
    if weights_dropout is not None:
        weights = weights * weights_dropout
    mixed = torch.matmul(weights, apart(act(value) if activate_value else value))
    return mixed.reshape(batch, size * count, value.shape[-1])[:, :length].transpose(0, 1) * act(gate)
