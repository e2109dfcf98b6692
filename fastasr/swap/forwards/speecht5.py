# SPDX-License-Identifier: Apache-2.0
"""The attention of the encoder of transformers' SpeechT5: s[i,j] = q_i·(k_j + E[clamp(i − j, −m, m − 1) + m]) / √d,
with a table E of 2m rows that all heads and layers share (Shaw et al., "Self-attention with relative position
representations", 2018). The encoder gathers the rows for every pair of frames, (T, T, d) numbers."""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr import _left, ops
from fastasr._transforms import is_transformed
from fastasr.models.common import plumbing
from fastasr.models.fast_conformer.masks import WANTED
from fastasr.ops import _kept
from fastasr.swap.forwards.common import may_read, projections
from fastasr.swap.forwards.transformers_conformer import hidden_keys
from fastasr.swap.rule import Upstream

_LEARNS = "the table of positions has gradients, which upstream's encoder gathers from every pair of frames"


def speecht5_attention(
    self: Upstream,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Serves SpeechT5's encoder in inference: hidden states (B, T, width), attention mask as "eager" takes it, position
    bias (T, T, d), equal for equal offsets, or None -> ((B, T, width), None)."""
    hidden: dict[str, Any] | None = None
    rows = None
    if torch.is_grad_enabled() and position_bias is not None and position_bias.requires_grad:
        _left.note(self, _LEARNS, level=logging.INFO)
    elif output_attentions:
        _left.note(self, WANTED)
    else:
        rows, fits = _rows(position_bias, hidden_states.shape[1])
        fits = fits and key_value_states is None and cache is None
        hidden = hidden_keys(self, hidden_states, attention_mask, fits)
    if hidden is None:
        states = hidden_states, key_value_states, cache, attention_mask, position_bias, output_attentions
        return type(self).forward(self, *states, **kwargs)
    q, k, v = projections(hidden_states, (self.num_heads, -1), self.q_proj, self.k_proj, self.v_proj)
    y = ops.rel_attention(q, k, v, rows, **hidden)
    return plumbing.linear(self.out_proj, y.flatten(2)), None


def _rows(bias: Tensor | None, frames: int) -> tuple[Tensor | None, bool]:
    """Returns the rows by offset (2T − 1, 1, d) of the bias of every pair, and whether they are all of it."""
    if bias is None:
        return None, True
    if bias.dim() != 3 or bias.shape[:2] != (frames, frames) or not may_read(bias) or is_transformed():
        return None, False
    version = object() if bias.is_inference() else bias._version
    rows = _kept.on(bias, "_fastasr_rows", version, partial(_read, bias))
    return rows, rows is not None


def _read(bias: Tensor) -> Tensor | None:
    if not torch.equal(bias[1:, 1:], bias[:-1, :-1]):
        return None
    return torch.cat([bias[1:, 0].flip(0), bias[0]]).unsqueeze(1)
