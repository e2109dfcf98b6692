# SPDX-License-Identifier: Apache-2.0
"""The attention of transformers' WavLM, and its encoder, whose first layer makes the bias of positions for all."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common.attention_dropout import dropout_of
from fastasr.models.common.plain import is_watched, runs
from fastasr.models.fast_conformer.masks import WATCHED
from fastasr.swap.forwards.common import bias_of_pairs, share_of_dropout
from fastasr.swap.rule import Upstream


def wavlm_attention(
    self: Upstream,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    index: int = 0,
    by_offset: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Any, Tensor | None]:
    """Serves transformers' WavLM, whose scores have a bias by offset times a gate of the query (Chen et al., "WavLM",
    2022). hidden states (B, T, width), attention mask (B, T) that is 1 at valid frames, or None -> ((B, T, width),
    None, position bias). The first layer makes the position bias: (2T − 1, H) for the other layers if ``by_offset``,
    which ``wavlm_encoder`` sets, or upstream's (B H, T, T). A sequence without frames gives NaN."""
    batch, heads = len(hidden_states), self.num_heads
    rows, reason = position_bias, None
    if is_watched(self):
        reason = WATCHED
    elif rows is not None and rows.ndim != 2:
        reason = "the position bias has every pair of frames"
    dropout = dropout_of(self, share_of_dropout(self), hidden_states.device, reason)
    if dropout is None:
        if rows is None or rows.ndim != 2:
            return type(self).forward(self, hidden_states, attention_mask, position_bias, index, **kwargs)
        pairs = bias_of_pairs(rows, batch)
        return *type(self).forward(self, hidden_states, attention_mask, pairs, index, **kwargs)[:2], rows
    if rows is None:
        rows = bias_by_offset(self, hidden_states)
        position_bias = rows if by_offset else bias_of_pairs(rows, batch)
    # Upstream reads the weights of these layers and does not call them.
    layers = self.q_proj, self.k_proj, self.v_proj
    q, k, v = (
        ops.linear(hidden_states, layer.weight, layer.bias).unflatten(-1, (heads, -1)) for layer in layers
    )
    gate = gate_of_queries(self, hidden_states)
    hidden = None if attention_mask is None else attention_mask.ne(1)
    y = ops.rel_attention(
        q, k, v, offset_bias=rows, offset_gate=gate, key_padding_mask=hidden, **dropout
    ).flatten(2)
    if hidden is not None:
        y = y.masked_fill(hidden.all(1)[:, None, None], torch.nan)
    # The frames lie first in memory, as upstream's: the next dropout draws in this order.
    y = ops.linear(y.transpose(0, 1), self.out_proj.weight, self.out_proj.bias).transpose(0, 1)
    return y, None, position_bias


def bias_by_offset(module: Upstream, x: Tensor) -> Tensor:
    """Returns the bias of positions (2T − 1, H) for x (B, T, width)."""
    offsets = torch.arange(1 - x.shape[1], x.shape[1], dtype=torch.int64, device=x.device)
    return module.rel_attn_embed(module._relative_positions_bucket(offsets))


def gate_of_queries(module: Upstream, x: Tensor) -> Tensor:
    """Returns the number (B, T, H) by which the bias of each query is multiplied."""
    heads = module.num_heads
    gates = module.gru_rel_pos_linear(x.unflatten(-1, (heads, -1)))
    a, b = torch.sigmoid(gates.unflatten(-1, (2, 4)).sum(-1)).unbind(-1)
    return a * (b * module.gru_rel_pos_const.view(heads) - 1.0) + 2.0


def wavlm_encoder(
    self: Upstream, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    """Runs upstream's encoder of WavLM. Its layers hand on the position bias by offset if ours run in all of them."""
    if hand_on(self, wavlm_attention):
        kwargs["by_offset"] = True
    return type(self).forward(self, hidden_states, attention_mask, **kwargs)


def hand_on(encoder: Upstream, attention: Callable[..., Any]) -> bool:
    """Says whether ``attention`` runs in all layers of the encoder, and around it upstream's code, which hands on what
    it does not know: not in a layer with a forward of somebody else's."""
    return all(
        runs(getattr(layer, "attention", layer), attention) and _is_of(encoder, layer.forward)
        for layer in encoder.layers
    )


def _is_of(encoder: Upstream, forward: Any) -> bool:
    """Says whether a layer's forward is from the encoder's file, wrapped or recorded or as it is."""
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return hasattr(forward, "fastasr_forward") or forward.__module__ == type(encoder).__module__
