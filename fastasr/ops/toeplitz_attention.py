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

Memory traffic: every operand once; no L × L tensor leaves the cache forward. Kept for the backward: the inputs and h;
weights and dS then exist for a few sequences at a time.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled

from fastasr.ops import _activation, _check, _layout
from fastasr.ops._dispatch import KernelFamily, direct, native_kernels, served, triton_kernels
from fastasr.ops._register import refuse_double_backward, register

FAMILY = KernelFamily(
    "toeplitz_attention",
    ("toeplitz_attention",),
    (native_kernels("toeplitz_attention"), triton_kernels("toeplitz_attention")),
)


# --------------------------------------------------------------------------- definition
def definition(
    query_key: Tensor,
    gate: Tensor,
    value: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor,
    position_bias: Tensor,
    *,
    causal: bool = True,
    padding_mask: Tensor | None = None,
    chunk_size: int = 0,
    activation: str = "silu",
    weights_dropout: Tensor | None = None,
    activate_value: bool = False,
) -> Tensor:
    """The formula in eager PyTorch."""
    act = _activation.function(activation)
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
    mixed = mixed.reshape(batch, size * count, value.shape[-1])[:, :length].transpose(0, 1)
    return mixed * act(gate)


def chunks(length: int, chunk_size: int) -> tuple[int, int]:
    """(frames per chunk, number of chunks) of a sequence."""
    size = max(1, min(chunk_size, length) if chunk_size > 0 else length)
    return size, (length + size - 1) // size


def mask_of(
    length: int, size: int, count: int, causal: bool, padding_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """True where a key may not be seen, broadcastable to (B, chunks, size, size); None when all may."""
    mask = None
    if causal:
        mask = torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
    if padding_mask is not None:
        padded = F.pad(padding_mask, (0, size * count - length), value=True).reshape(-1, count, 1, size)
        padded = padded & ~padded.all(-1, keepdim=True)
        mask = padded if mask is None else mask | padded
    if size * count != length:
        behind = torch.arange(size * count, device=device).reshape(count, 1, size) >= length
        mask = behind if mask is None else mask | behind
    return mask


def definition_backward(
    grad: Tensor,
    query_key: Tensor,
    gate: Tensor,
    value: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor,
    position_bias: Tensor,
    padding_mask: Tensor | None,
    dropout: Tensor | None,
    causal: bool,
    chunk_size: int,
    activation: int,
    activate_value: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the six tensors, in their dtypes, computed in float32 or better."""
    name = _activation.NAMES[activation]
    act = _activation.function(name)
    wide = torch.promote_types(query_key.dtype, torch.float32)
    x, r, pre, w, b, bias, g = (
        t.to(wide) for t in (query_key, gate, value, qk_weight, qk_bias, position_bias, grad)
    )
    length, batch, channels = x.shape
    size, count = chunks(length, chunk_size)
    scale = channels**-0.5

    def apart(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, 0, 0, size * count - length)) if size * count != length else t
        return t.transpose(0, 1).reshape(batch, count, size, t.shape[-1])

    def together(t: Tensor) -> Tensor:
        return t.reshape(batch, size * count, t.shape[-1])[:, :length].transpose(0, 1)

    z, v = act(x), act(pre) if activate_value else pre
    query, key, values = apart((z * w[0] + b[0]) * scale), apart(z * w[1] + b[1]), apart(v)
    middle = bias.shape[0] // 2
    toeplitz = bias[middle + 1 - size : middle + size].unfold(0, size, 1).flip(0)
    scores = torch.matmul(query, key.transpose(-1, -2)) + toeplitz
    mask = mask_of(length, size, count, causal, padding_mask, scores.device)
    soft = torch.softmax(scores if mask is None else scores.masked_fill(mask, -math.inf), -1)
    weights = soft if dropout is None else soft * dropout
    mixed = together(torch.matmul(weights, values))
    dgate = g * mixed * _activation.derivative(name, r)
    dmixed = apart(g * act(r))
    dvalue = together(torch.matmul(weights.transpose(-1, -2), dmixed))
    if activate_value:
        dvalue = dvalue * _activation.derivative(name, pre)
    dsoft = torch.matmul(dmixed, values.transpose(-1, -2))
    dsoft = dsoft if dropout is None else dsoft * dropout
    dscores = soft * (dsoft - (soft * dsoft).sum(-1, keepdim=True))
    dquery, dkey = (
        together(torch.matmul(dscores, key)) * scale,
        together(torch.matmul(dscores.transpose(-1, -2), query)),
    )
    dquery_key = (dquery * w[0] + dkey * w[1]) * _activation.derivative(name, x)
    dweight = torch.stack([(dquery * z).sum((0, 1)), (dkey * z).sum((0, 1))])
    dqk_bias = torch.stack([dquery.sum((0, 1)), 0 * dkey.sum((0, 1))])  # all scores of a query move together
    # Row i of the sum over sequences, shifted right by size - 1 - i: then distances are columns.
    square = F.pad(dscores.sum((0, 1)).flip(0), (0, size)).reshape(-1)[: size * (2 * size - 1)]
    dbias = torch.zeros_like(bias)
    dbias[middle + 1 - size : middle + size] = square.reshape(size, 2 * size - 1).sum(0)
    found = dquery_key, dgate, dvalue, dweight, dqk_bias, dbias
    return tuple(
        d.to(t.dtype)
        for d, t in zip(found, (query_key, gate, value, qk_weight, qk_bias, position_bias), strict=True)
    )


# --------------------------------------------------------------------------- kernels
# From here on query_key, gate and value have one dtype, the parameters and dropout the dtype that is computed in, and
# the functions take the arguments of the C++ operators.
def forward(
    query_key, gate, value, qk_weight, qk_bias, position_bias, padding_mask, dropout,
    causal: bool, chunk_size: int, activation: int, activate_value: bool, need_gradients: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, h) without autograd, by the best kernel; h is empty unless needed."""
    kernels = FAMILY.kernels(query_key)
    tensors = query_key, gate, value, qk_weight, qk_bias, position_bias
    if kernels is not None:
        operands = (
            *map(_layout.dense_channels, tensors[:3]),
            *_contiguous(*tensors[3:], padding_mask, dropout),
        )
        return kernels.forward(*operands, causal, chunk_size, activation, activate_value, need_gradients)
    y = definition(
        query_key,
        gate,
        value,
        *(t.to(query_key.dtype) for t in tensors[3:]),
        causal=causal,
        padding_mask=padding_mask,
        chunk_size=chunk_size,
        activation=_activation.NAMES[activation],
        weights_dropout=None if dropout is None else dropout.to(query_key.dtype),
        activate_value=activate_value,
    )
    return y.contiguous(), gate.new_empty(gate.shape if need_gradients else 0)


def backward(
    grad, query_key, gate, value, qk_weight, qk_bias, position_bias, padding_mask, dropout, mixed,
    causal: bool, chunk_size: int, activation: int, activate_value: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the six tensors without autograd, by the best kernel; ``mixed`` is h."""
    kernels = FAMILY.kernels(query_key)
    tensors = query_key, gate, value, qk_weight, qk_bias, position_bias
    rest = causal, chunk_size, activation, activate_value
    if kernels is None:
        return definition_backward(grad, *tensors, padding_mask, dropout, *rest)
    operands = *map(_layout.dense_channels, tensors[:3]), *_contiguous(*tensors[3:], padding_mask, dropout)
    return kernels.backward(_layout.dense_channels(grad), *operands, mixed.contiguous(), *rest)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


class _ToeplitzAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        tensors, rest = arguments[:8], arguments[8:]
        y, mixed = forward(*tensors, *rest, True)
        ctx.save_for_backward(*tensors, mixed)
        ctx.rest = rest
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward("toeplitz_attention")
        return *backward(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 6


# --------------------------------------------------------------------------- registration
_TENSORS = (
    "Tensor query_key, Tensor gate, Tensor value, Tensor qk_weight, Tensor qk_bias, Tensor position_bias, "
    "Tensor? padding_mask, Tensor? dropout"
)
_OPTIONS = "bool causal, int chunk_size, int activation, bool activate_value"


def _fake_forward(*arguments) -> tuple[Tensor, Tensor]:
    gate = arguments[1]
    return tuple(torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))


def _fake_backward(grad, *arguments):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in arguments[:6])


_BACKWARD_OP = register(
    f"toeplitz_attention_backward(Tensor grad, {_TENSORS}, Tensor mixed, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_training(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.rest = inputs[8:]
    ctx.mark_non_differentiable(output[1])


def _training_backward(ctx, grad: Tensor, *_):
    return *_BACKWARD_OP(grad, *ctx.saved_tensors, *ctx.rest), *(None,) * 6


# What tracing records for training: it hands on what the backward needs.
_TRAINING_OP = register(
    f"toeplitz_attention_training({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    lambda *arguments: forward(*arguments, True),
    _fake_forward,
    setup_context=_setup_training,
    backward=_training_backward,
)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx, grad: Tensor):
    _, mixed = _TRAINING_OP(*ctx.saved_tensors, *ctx.rest)
    return *_BACKWARD_OP(grad, *ctx.saved_tensors, mixed, *ctx.rest), *(None,) * 6


_OP = register(
    f"toeplitz_attention({_TENSORS}, {_OPTIONS}) -> Tensor",
    lambda *arguments: forward(*arguments, False)[0],
    lambda *arguments: _fake_forward(*arguments)[0],
    setup_context=_setup,
    backward=_backward,
)


# --------------------------------------------------------------------------- public function
def toeplitz_attention(
    query_key: Tensor,
    gate: Tensor,
    value: Tensor,
    qk_weight: Tensor,
    qk_bias: Tensor,
    position_bias: Tensor,
    *,
    causal: bool = True,
    padding_mask: Tensor | None = None,
    chunk_size: int = 0,
    activation: str = "silu",
    weights_dropout: Tensor | None = None,
    activate_value: bool = False,
) -> Tensor:
    """softmax(q kᵀ / √d + bias) value · act(gate), q and k affine in act(query_key); queries and keys of one length.

    Decoding against a longer history of keys is another operation.

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
    op = "toeplitz_attention"
    tensors = query_key, gate, value, qk_weight, qk_bias, position_bias
    _check_tensors(op, *tensors)
    number = _activation.number(op, activation)
    for name, value_ in (("causal", causal), ("activate_value", activate_value)):
        _check.flag(op, name, value_)
    _check.integer(op, "chunk_size", chunk_size)
    length, batch, _ = query_key.shape
    size, count = chunks(length, chunk_size)
    bias = position_bias.shape
    odd = position_bias.dim() == 1 and bias[0] % 2 == 1 and bias[0] >= 2 * size - 1
    _check.shape(op, "position_bias", position_bias, f"(2 P - 1,) with P of at least {size}", odd)
    if padding_mask is not None:
        _check.bool_tensor(op, "padding_mask", padding_mask)
        _check.shape(
            op, "padding_mask", padding_mask, f"({batch}, {length})", padding_mask.shape == (batch, length)
        )
        _check.same_device(op, "padding_mask", padding_mask, query_key, "query_key")
    if weights_dropout is not None:
        _check.constant_mask(op, "weights_dropout", weights_dropout, query_key, "query_key")
        whole = (batch, count, size, size)
        _check.shape(op, "weights_dropout", weights_dropout, f"{whole}", weights_dropout.shape == whole)
    masks = padding_mask, weights_dropout
    plain = direct(*tensors, *masks)
    if FAMILY.kernels(*tensors) is None if plain else not served(FAMILY.name, *tensors):
        return definition(
            *tensors,
            causal=causal,
            padding_mask=padding_mask,
            chunk_size=chunk_size,
            activation=activation,
            weights_dropout=weights_dropout,
            activate_value=activate_value,
        )
    out = torch.promote_types(gate.dtype, value.dtype)
    dtype = torch.promote_types(out, query_key.dtype)
    if any(t.dtype is torch.float64 for t in tensors):
        dtype = torch.float64
    wide = torch.promote_types(dtype, torch.float32)
    tensors = *(t.to(dtype) for t in tensors[:3]), *(t.to(wide) for t in tensors[3:])
    dropout = None if weights_dropout is None else weights_dropout.to(wide)
    arguments = *tensors, padding_mask, dropout, causal, chunk_size, number, activate_value
    training = is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not plain:
        y = _TRAINING_OP(*arguments)[0] if training else _OP(*arguments)
    else:
        y = _ToeplitzAttention.apply(*arguments) if training else forward(*arguments, False)[0]
    return y.to(out)


def _check_tensors(op: str, query_key, gate, value, qk_weight, qk_bias, position_bias) -> None:
    _check.floating_tensor(op, "query_key", query_key)
    ok = query_key.dim() == 3 and query_key.shape[2] > 0
    _check.shape(op, "query_key", query_key, "(L, B, d) with d of at least 1", ok)
    length, batch, channels = query_key.shape
    for name, t in (("gate", gate), ("value", value)):
        _check.floating_tensor(op, name, t)
        width = "V" if name == "gate" else gate.shape[2]
        ok = t.dim() == 3 and t.shape[:2] == (length, batch) and (name == "gate" or t.shape[2] == width)
        _check.shape(op, name, t, f"({length}, {batch}, {width})", ok)
    for name, t in (("qk_weight", qk_weight), ("qk_bias", qk_bias)):
        _check.floating_tensor(op, name, t)
        _check.shape(op, name, t, f"(2, {channels})", t.shape == (2, channels))
    _check.floating_tensor(op, "position_bias", position_bias)
    rest = {
        "gate": gate,
        "value": value,
        "qk_weight": qk_weight,
        "qk_bias": qk_bias,
        "position_bias": position_bias,
    }
    for name, t in rest.items():
        _check.same_device(op, name, t, query_key, "query_key")
