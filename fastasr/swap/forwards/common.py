# SPDX-License-Identifier: Apache-2.0
"""What the forwards of several packages share: attention with relative positions, which
:func:`fastasr.ops.rel_attention` computes without its weights, and the order in which upstream draws dropout.

An attention runs upstream's code if the op cannot serve a call: if weights are asked for, the mask is of another kind,
dropout is drawn as upstream draws it, or each sequence has its own position embeddings.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastasr import _left, ops
from fastasr._recording import has_values, recording
from fastasr.models.common import activations, plumbing
from fastasr.models.common.attention_dropout import as_upstream, dropout_of
from fastasr.models.common.attention_of_recordings import of_recordings
from fastasr.models.common.plain import is_plain, is_upstreams
from fastasr.models.common.ragged import Packing
from fastasr.models.common.row import Row
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.attention import first_rows, projected
from fastasr.models.fast_conformer.masks import OTHER, OTHER_KEYS, seen
from fastasr.ops._relative_positions import relative_shift
from fastasr.swap.rule import Upstream


def is_part(part: torch.nn.Module, owner: Upstream) -> bool:
    """Says whether this is a part whose class upstream's file has beside the owner's, as a rule has read it, without
    hooks. Only then it has the attributes of upstream's part."""
    return type(part).__module__ == type(owner).__module__ and is_upstreams(part, owner)


# --------------------------------------------------------------------------- attention
def drops(module: Upstream, x: Tensor, fits: bool = True, reason: str = OTHER) -> dict[str, Any] | None:
    """Does as ``dropout_of`` for the module's own dropout, with ``reason`` unless the call ``fits``."""
    return dropout_of(module, share_of_dropout(module), x.device, None if fits else reason)


def has_other_keys(module: Upstream, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Says whether the keys are not the queries, as in a decoder, whose calls stay upstream's. It notes so."""
    others = query is not key or key is not value
    if others:
        _left.note(module, OTHER_KEYS, level=logging.INFO)
    return others


def share_of_dropout(module: Upstream) -> float | None:
    """Returns the share of its weights that an attention module of a served framework drops now, None if the dropout is
    no plain one."""
    if getattr(module, "use_pytorch_sdpa", False):
        return module.dropout_rate if module.training else 0.0
    # transformers reads the rate and does not call the dropout
    if hasattr(module, "position_embeddings_type"):
        return module.dropout.p if module.training else 0.0
    dropout = getattr(getattr(module, "attention", module), "dropout", None)
    if isinstance(dropout, (int, float)):
        return dropout if module.training else 0.0
    return 0.0 if dropout is None else plumbing.dropped_share(dropout)


def other_scale(module: Upstream) -> str | None:
    """Returns why ``ops.rel_attention`` does not compute the scores of an attention module of transformers, whose scale
    the user may have changed, or None if it does."""
    own = vars(module)
    scaling, size = own.get("scaling"), own.get("head_dim") or own.get("head_size")
    if scaling is None or size is None or math.isclose(scaling, size**-0.5):  # Mimi's is 1 / math.sqrt
        return None
    return f"scaling is {scaling}, expected 1 / √{size}"


def projections(x: Tensor, heads: tuple[int, ...], *layers: Upstream) -> list[Tensor]:
    """Returns x (B, T, width) through each layer, (B, T, H, d), with ``heads`` (H, d), one of which may be -1."""
    return [y.unflatten(-1, heads) for y in plumbing.linears(layers, x)]


def attention(
    module: Upstream,
    x: Tensor,
    positions: Any,
    hidden: dict[str, Any],
    empty_rows: Tensor | None = None,
    keys: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Returns the attention of modules with ESPnet's names, without the values of ``empty_rows``, bool (B, T).
    ``hidden``: the kernel's arguments for hidden keys and dropout. ``keys`` (B, K, width) are x unless given, ``rows``
    the projected positions those of ``positions``."""
    heads, keys = module.pos_bias_u.shape, x if keys is None else keys
    layers = module.linear_q, module.linear_k, module.linear_v
    if keys is x:
        q, k, v = projections(x, heads, *layers)
    else:
        (q,), (k, v) = projections(x, heads, *layers[:1]), projections(keys, heads, *layers[1:])
    if rows is None:
        needed = max(0, x.shape[1] + keys.shape[1] - 1)
        rows = first_rows(projected(module, module.linear_pos, positions[0]), needed)
    y = ops.rel_attention(q, k, v, rows.view(-1, *heads), module.pos_bias_u, module.pos_bias_v, **hidden)
    if empty_rows is not None:
        y = y.masked_fill(empty_rows[:, :, None, None], 0.0)
    return plumbing.linear(module.linear_out, y.flatten(2))


def packed_attention(module: Upstream, x: Tensor, positions: Any, packing: Packing | Row) -> Tensor:
    """Returns the attention of modules with ESPnet's names to packed frames x (1, N, width)."""
    heads = module.pos_bias_u.shape
    q, k, v = projections(x, heads, module.linear_q, module.linear_k, module.linear_v)
    rows = projected(module, module.linear_pos, positions[0]).view(-1, *heads)
    return plumbing.linear(module.linear_out, by_recording(module, packing, q, k, v, rows).flatten(2))


def by_recording(module: Upstream, packing: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Returns (1, N, H, d), where each recording sees itself, of q, k and v (1, N, H, d) and rows (2T − 1, H, d)."""
    share: Any = share_of_dropout(module)
    biases = module.pos_bias_u, module.pos_bias_v
    return of_recordings(packing, q[0], k[0], v[0], rows, *biases, share).unsqueeze(0)


def shaw(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, span: tuple[int, int], hidden: Mapping[str, Any]
) -> Tensor:
    """Returns softmax_j(q_i·(k_j + rows[clamp(j − i, −l, r) + l]) / √d) v, (B, T, H, d), of rows (l + r + 1, d) for all
    heads and ``span`` (l, r)."""
    return ops.rel_attention(q, k, v, rows.to(q.dtype).unsqueeze(1), pos_span=span, **hidden)


def is_one_table(positions: Tensor | None, frames: int) -> bool:
    return positions is not None and positions.ndim == 3 and positions.shape[:2] == (1, 2 * frames - 1)


def is_mask(mask: Tensor | None, *shape: int) -> bool:
    return mask is None or (mask.dtype == torch.bool and mask.shape == shape)


def hidden_pairs(mask: Tensor | None) -> tuple[dict[str, Any], Tensor | None]:
    """Returns the kernel's arguments for NeMo's mask (B, T, K), True at hidden keys, or None, and the queries that see
    no key. Where the mask does not stand for lengths the kernel itself gives 0 at these."""
    by = None if mask is None else seen(mask, hides=True)
    return masks.of_kernel(mask, by, hides=True), by.empty_rows if by is not None and by.by_length else None


def bias_of_pairs(rows: Tensor, batch: int = 1) -> Tensor:
    """Returns the bias (B H, T, T) of every pair of frames, from (2T − 1, H) by offset."""
    frames = (rows.shape[0] + 1) // 2
    pairs = relative_shift(rows.t().unsqueeze(1).expand(-1, frames, -1))
    return pairs.repeat(batch, 1, 1)


def may_read(t: Tensor) -> bool:
    """Says whether a call may depend on the values of ``t``, and keep what it reads: not while it is compiled or
    recorded, because the same code then serves other values, and not if there are none."""
    return recording() is None and has_values(t)


# --------------------------------------------------------------------------- convolution and feed-forward
def by_mask(mask: Packing | Row | Tensor | None) -> dict[str, Any]:
    """Returns the arguments of ``convolved`` for a mask, True at padding, or a ``Packing`` or ``Row`` in its place."""
    return {"packing" if isinstance(mask, (Packing, Row)) else "hidden": mask}


def channels_first(module: Upstream, y: Tensor) -> Tensor:
    """Returns y (B, T, width), channels first in memory if upstream's next dropout may draw, which it does in that
    order. It is another module's: in inference with dropout only ``upstream_draws`` tells of it."""
    draws = module.training or as_upstream()
    return y.transpose(1, 2).contiguous().transpose(1, 2) if draws else y


def dropped(dropout: Upstream, y: Tensor) -> Tensor:
    """Returns the dropout of y (B, T, width). Upstream draws it channels first."""
    if plumbing.is_idle(dropout):
        return y
    return dropout(y.transpose(1, 2).contiguous()).transpose(1, 2)


def in_sequential(module: Upstream, count: int) -> list[Any] | None:
    """Returns the modules of a plain Sequential of this many, None of anything else."""
    fits = is_plain(module, torch.nn.Sequential) and len(module) == count
    return list(module) if fits else None


def in_sequence(layers: Upstream, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Returns dropout(W2 dropout(activation(W1 x + b1)) + b2) of the five layers, plus the residual."""
    first, activation, middle, last, dropout = layers
    hidden = activations.dropped(first, activation, middle, x)
    return plumbing.dropout(dropout, plumbing.linear(last, hidden), residual)
