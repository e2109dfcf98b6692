# SPDX-License-Identifier: Apache-2.0
r"""Moving average equipped gated attention (Ma et al., "Mega", ICLR 2023) in ESPnet's form, which normalises the sum.

    v = act(W_v x)                   e = EMA(x)                   [u | z | r | c] = W_mx e
    q, k = act(z) w + b, rows 0, 1   h = softmax(q k^T / sqrt(d) + bias) v * act(r)
    y = norm(x + sigmoid(u) (act(c + W_h h) - x))

``forward`` also runs on instances of ESPnet's class, so it checks a submodule before it uses more than a call of it.
"""

from typing import Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common import plumbing
from fastasr.models.common.plain import is_plain
from fastasr.models.mega import activations, attention, normalizations, positional_bias
from fastasr.models.mega.damped_ema import MultiHeadDampedEMA, State
from fastasr.models.mega.positional_bias import RelativePositionBias, RotaryRelativePositionBias


class MEGA(torch.nn.Module):
    """x (L, B, size) -> (y (L, B, size), state or None).

    mask (B, 1, L), True = padding. attn_mask (1, L, L), True = may not be seen, or "causal" (one chunk: with
    ``chunk_size`` > 0 its length replaces L).
    state: a dict of "ema_state" (B, size, num_heads), "prev_key" (B, H, qk_size) and "prev_value" (B, H, v_size), for
        H positions before x; the last two may be None. If some sequences have fewer than H positions, "prev_length",
        an int64 tensor (B,) on the CPU, counts them, and they are the last ones. With a state, the state after x is
        returned too.
    chunk_size: attention stays within chunks of this many positions; streaming drops the keys of a finished chunk.
    phantom_first_step: whether to stream as ESPnet does: absent positions of a batch count as keys and values of
        zero, and the last key and value of a finished chunk are kept.
    """

    def __init__(
        self,
        size: int = 512,
        num_heads: int = 4,
        qk_size: int = 128,
        v_size: int = 1024,
        activation: torch.nn.Module | type[torch.nn.Module] = torch.nn.ReLU,
        normalization: torch.nn.Module | type[torch.nn.Module] = torch.nn.LayerNorm,
        rel_pos_bias_type: str = "simple",
        max_positions: int = 2048,
        truncation_length: int | None = None,
        chunk_size: int = -1,
        dropout_rate: float = 0.0,
        att_dropout_rate: float = 0.0,
        ema_dropout_rate: float = 0.0,
        phantom_first_step: bool = False,
    ) -> None:
        super().__init__()
        activation = activations.instance(activation)
        self.multihead_damped_ema = MultiHeadDampedEMA(
            size, num_heads=num_heads, activation=activation, truncation_length=truncation_length
        )
        if chunk_size > 0:
            max_positions = chunk_size
        if rel_pos_bias_type == "rotary":
            self.rel_pos_bias: torch.nn.Module = RotaryRelativePositionBias(qk_size, max_positions)
        elif rel_pos_bias_type == "simple":
            self.rel_pos_bias = RelativePositionBias(max_positions)
        else:
            raise ValueError(
                f"MEGA: rel_pos_bias_type: expected 'simple' or 'rotary', got {rel_pos_bias_type!r}"
            )
        self.proj_v = torch.nn.Linear(size, v_size)
        self.proj_mx = torch.nn.Linear(size, qk_size + v_size + 2 * size)
        self.proj_h = torch.nn.Linear(v_size, size)
        self.qk_weight = torch.nn.Parameter(torch.empty(2, qk_size))
        self.qk_bias = torch.nn.Parameter(torch.empty(2, qk_size))
        self.scaling = qk_size**-0.5
        self.activation = activation
        self.normalization = normalizations.instance(normalization, size)
        self.dropout = torch.nn.Dropout(p=dropout_rate)
        self.dropout_attn = torch.nn.Dropout(p=att_dropout_rate)
        self.dropout_ema = torch.nn.Dropout(p=ema_dropout_rate)
        self.qk_size, self.v_size = qk_size, v_size
        self.size, self.chunk_size = size, chunk_size
        self.phantom_first_step = phantom_first_step
        self.reset_parameters()

    def reset_parameters(self, val: float = 0.0, std: float = 0.02) -> None:
        for linear in (self.proj_v, self.proj_mx, self.proj_h):
            torch.nn.init.normal_(linear.weight, mean=val, std=std)
            torch.nn.init.constant_(linear.bias, val)
        torch.nn.init.normal_(self.qk_weight, mean=val, std=std)
        torch.nn.init.constant_(self.qk_bias, val)

    def softmax_attention(
        self, query: Tensor, key: Tensor, mask: Tensor | None = None, attn_mask: Tensor | str | None = None
    ) -> Tensor:
        """Returns the weights (B, C, Lq, Lk) of query (B, C, Lq, d) and key (B, C, Lk, d). Masks: see ``forward``."""
        return _weights(self, query, key, mask, attn_mask)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        attn_mask: Tensor | str | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State | None]:
        if x.ndim != 3 or x.shape[-1] != self.size:
            raise ValueError(f"MEGA: x: expected shape (L, B, {self.size}), got {tuple(x.shape)}")
        if state is not None and self.chunk_size > 0 and x.shape[0] > 1 and mask is None:
            return _one_by_one(self, x, state)
        average, average_state = self.multihead_damped_ema(x, mask=mask, state=state)
        if state is not None:
            state = {**state, "ema_state": average_state}
        mixed = plumbing.linear(self.proj_mx, _ema_dropout(self.dropout_ema, average))
        if state is None and _serves(self, x, mixed, attn_mask):
            context = _fused(self, x, mixed, mask, attn_mask)
        else:
            context, state = _composed(self, x, mixed, mask, attn_mask, state)
        return _end(self, x, mixed, context), state

    setattr(forward, "takes_causal", True)  # noqa: B010 (mypy refuses attributes of functions)


def _parts(module: MEGA, mixed: Tensor) -> tuple[Tensor, ...]:
    """Returns views: the gate of the residual, queries and keys, the gate of the context, the candidate."""
    return mixed.split([module.size, module.qk_size, module.v_size, module.size], dim=-1)


def _one_by_one(module: MEGA, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Streams x one position at a time, since it crosses the end of a chunk."""
    outputs = []
    for position in x.split(1):
        y, state = module(position, state=state)
        outputs.append(y)
    return torch.cat(outputs), state


def _ema_dropout(dropout: torch.nn.Module, average: Tensor) -> Tensor:
    """Applies dropout with ESPnet's random numbers: its average lies in memory as (B, size, L), and a mask is drawn in
    the order of memory."""
    if plumbing.is_idle(dropout):
        return average
    if not is_plain(dropout, torch.nn.Dropout):
        return dropout(average)
    ones = torch.ones_like(average.permute(1, 2, 0), memory_format=torch.contiguous_format)
    return average * dropout(ones).permute(2, 0, 1)


def _bias(module: MEGA, queries: int, keys: int) -> Tensor:
    """Returns the bias of the last ``queries`` of ``keys`` positions, (queries, keys)."""
    if not positional_bias.is_plain(module.rel_pos_bias, module):
        return module.rel_pos_bias(keys)[keys - queries :]
    return positional_bias.matrix(positional_bias.relative(module.rel_pos_bias, keys), queries)


# --------------------------------------------------------------------------- one kernel
def _serves(module: MEGA, x: Tensor, mixed: Tensor, attn_mask: Tensor | str | None) -> bool:
    if activations.fused_name(module.activation) is None or not positional_bias.is_plain(
        module.rel_pos_bias, module
    ):
        return False
    if not all(is_plain(dropout, torch.nn.Dropout) for dropout in (module.dropout, module.dropout_attn)):
        return False
    return attn_mask is None or attention.is_causal(attn_mask)


def _fused(
    module: MEGA, x: Tensor, mixed: Tensor, mask: Tensor | None, attn_mask: Tensor | str | None
) -> Tensor:
    name: Any = activations.fused_name(module.activation)  # not None where ``_serves`` agrees
    _, query_key, gate, _ = _parts(module, mixed)
    length, batch, _ = x.shape
    frames = max(min(module.chunk_size, length) if module.chunk_size > 0 else length, 1)
    value = plumbing.linear(module.proj_v, x)
    drops = not plumbing.is_idle(module.dropout)
    if drops:  # the mask is drawn in the order (B, L, V)
        value = module.dropout(activations.activate(module.activation, value).transpose(0, 1)).transpose(0, 1)
    kept = None
    if not plumbing.is_idle(module.dropout_attn):
        bias_dtype = next(module.rel_pos_bias.parameters()).dtype
        kept = module.dropout_attn(
            torch.ones(
                (batch, -(-length // frames), frames, frames),
                dtype=torch.promote_types(mixed.dtype, bias_dtype),
                device=x.device,
            )
        )
    return ops.toeplitz_attention(
        query_key,
        gate,
        value,
        module.qk_weight,
        module.qk_bias,
        positional_bias.relative(module.rel_pos_bias, frames),
        causal=attn_mask is not None,
        padding_mask=None if mask is None else mask.squeeze(1),
        chunk_size=max(module.chunk_size, 0),
        activation=name,
        weights_dropout=kept,
        activate_value=not drops,
    )


# --------------------------------------------------------------------------- torch's operations
def _composed(
    module: MEGA,
    x: Tensor,
    mixed: Tensor,
    mask: Tensor | None,
    attn_mask: Tensor | str | None,
    state: State | None,
) -> tuple[Tensor, State | None]:
    """Returns (context (L, B, v_size), state after x)."""
    length, batch, _ = x.shape
    value = activations.activated(module.proj_v, module.activation, x).transpose(0, 1)
    # queries and keys, and the gate: one call
    both = module.activation(mixed[..., module.size : -module.size])
    z, gate = both.split([module.qk_size, module.v_size], dim=-1)
    query = torch.addcmul(module.qk_bias[0], z, module.qk_weight[0]).transpose(0, 1)
    key = torch.addcmul(module.qk_bias[1], z, module.qk_weight[1]).transpose(0, 1)
    if state is not None:
        key, value = _joined(state["prev_key"], key), _joined(state["prev_value"], value)
        absent = _absent(state, key.shape[1], length)
        if absent is not None:
            mask = absent if mask is None else absent | mask
        state = _after(module, state, key, value, length)
    chunk = module.chunk_size
    query = query.unflatten(1, (-1, chunk) if 0 < chunk <= length else (1, length))
    chunked = 0 < chunk <= key.shape[1] and state is None
    key = key.unflatten(1, (-1, chunk) if chunked else (1, key.shape[1]))
    value = value.unflatten(1, key.shape[1:3])
    if mask is not None:
        mask = mask.reshape(batch, key.shape[1], key.shape[2])
    weights = _weights(module, query, key, mask, attn_mask)
    value = module.dropout(value)
    context = torch.matmul(module.dropout_attn(weights), value)
    return context.reshape(batch, length, module.v_size).transpose(0, 1) * gate, state


def _weights(
    module: MEGA, query: Tensor, key: Tensor, mask: Tensor | None, attn_mask: Tensor | str | None
) -> Tensor:
    bias = _bias(module, query.shape[2], key.shape[2])
    return attention.weights(query, key, bias, module.scaling, mask, attn_mask)


def _joined(before: Tensor, now: Tensor) -> Tensor:
    return now if before is None or before.shape[1] == 0 else torch.cat([before, now], dim=1)


def _absent(state: State, keys: int, length: int) -> Tensor | None:
    """Returns (B, 1, keys), True where a sequence lacks the position; None if no sequence lacks any."""
    lengths = state.get("prev_length")
    if lengths is None:
        return None
    first = (keys - length - lengths).to(state["prev_key"].device)
    return (torch.arange(keys, device=first.device, dtype=torch.int64) < first.unsqueeze(1)).unsqueeze(1)


def _after(module: MEGA, state: State, key: Tensor, value: Tensor, length: int) -> State:
    """Returns the state after ``length`` positions have been added to its keys and values."""
    chunk, kept = module.chunk_size, key.shape[1]
    after = {"prev_key": key, "prev_value": value, "ema_state": state["ema_state"]}  # ESPnet's order
    if getattr(module, "phantom_first_step", True):  # ESPnet's instances do not have the attribute
        if chunk > 0 and kept % chunk == 0:
            after["prev_key"], after["prev_value"] = key[:, -1:], value[:, -1:]
        return after
    lengths = state.get("prev_length")
    if lengths is None:
        kept = 0 if chunk > 0 and kept >= chunk else kept
    else:
        lengths = lengths + length
        if chunk > 0:
            lengths = torch.where(lengths >= chunk, 0, lengths)
        kept = int(lengths.max())
        if int(lengths.min()) < kept:
            after["prev_length"] = lengths
    if kept < key.shape[1]:
        first = key.shape[1] - kept
        after["prev_key"], after["prev_value"] = key[:, first:], value[:, first:]
    return after


# --------------------------------------------------------------------------- the end of the block
def _end(module: MEGA, x: Tensor, mixed: Tensor, context: Tensor) -> Tensor:
    update, _, _, candidate = _parts(module, mixed)
    hidden = plumbing.linear(module.proj_h, context)
    name = activations.fused_name(module.activation)
    norm = module.normalization
    dropout = module.dropout
    if name is not None and is_plain(dropout, torch.nn.Dropout) and plumbing.is_layer_norm(norm):
        kept = None
        if not plumbing.is_idle(dropout):
            kept = dropout(torch.ones_like(hidden, memory_format=torch.contiguous_format))
        return ops.gated_residual_norm(
            x, update, candidate, hidden, norm.weight, norm.bias, norm.eps, activation=name, dropout_mask=kept
        )
    proposal = dropout(module.activation(candidate + hidden))
    return norm(torch.addcmul(x, torch.sigmoid(update), proposal - x))
