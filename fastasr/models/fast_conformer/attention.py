# SPDX-License-Identifier: Apache-2.0
r"""Multi-head attention with relative positions (Dai et al., "Transformer-XL", 2019, section 3.3):

    s[i,j] = ((q_i + u)·k_j + (q_i + w)·R[T − 1 − i + j]) / √d     y = W_o (softmax_j(s) v)

with R a projection of sinusoids. A query that sees no key gives the mean of v over all T keys, as upstream, which fills
its scores with the lowest number; the gradient of these rows is upstream's too. A GPU leaves this out for padding.
"""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import _left, ops
from fastasr._recording import is_traced, recording
from fastasr._transforms import is_transformed
from fastasr.models.common import attention_dropout, plumbing
from fastasr.models.common.attention_of_recordings import of_recordings
from fastasr.models.common.plain import is_watched
from fastasr.models.common.ragged import Packing
from fastasr.models.common.row import Row
from fastasr.models.fast_conformer import masks
from fastasr.models.fast_conformer.masks import WATCHED, Seen, is_readable, seen
from fastasr.models.fast_conformer.positions import KEPT_FRAMES
from fastasr.ops import _dispatch, _kept, _reduced_weights
from fastasr.ops._register import autocast_dtype, without_autocast
from fastasr.ops._relative_positions import relative_shift

# module -> the sources of its projected positions, and these
_PROJECTED: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()
STANDARD = ("sdpa", "eager", "flex_attention")  # transformers' implementations of one formula


def release(module: torch.nn.Module) -> None:
    """Frees the module's projected positions."""
    _PROJECTED.pop(module, None)


class FastConformerAttention(torch.nn.Module):
    """hidden states (B, T, width), position embeddings (B or 1, 2T − 1, width), attention mask (bool (B, 1, T, T),
    True: the query sees the key; or bool (B, T), True at valid frames) or None -> ((B, T, width), None). With a
    ``Packing`` or a ``Row`` as the mask, hidden states are (1, N, width) and positions are those of its longest
    recording.

    The weights are not returned. They are formed only if every sequence has position embeddings of its own, or while
    dropout is drawn from them inside :func:`fastasr.upstream_draws`. See :func:`fastasr.ops.rel_attention`.
    """

    def __init__(self, width: int, heads: int, bias: bool = True, attention_dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"FastConformerAttention: width: expected a multiple of heads ({heads}), got {width}"
            )
        self.head_dim, self.attention_dropout = width // heads, attention_dropout
        self.q_proj = torch.nn.Linear(width, width, bias=bias)
        self.k_proj = torch.nn.Linear(width, width, bias=bias)
        self.v_proj = torch.nn.Linear(width, width, bias=bias)
        self.o_proj = torch.nn.Linear(width, width, bias=bias)
        self.relative_k_proj = torch.nn.Linear(width, width, bias=False)
        self.bias_u = torch.nn.Parameter(torch.zeros(heads, self.head_dim))
        self.bias_v = torch.nn.Parameter(torch.zeros(heads, self.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        attention_mask: Packing | Row | Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        implementation = masks.implementation(getattr(self, "config", None))
        batch, frames = hidden_states.shape[:2]
        if isinstance(attention_mask, (Packing, Row)):
            y = _of_recordings(
                self, *_projections(self, hidden_states), position_embeddings.squeeze(0), attention_mask
            )
            return plumbing.linear(self.o_proj, y.flatten(1).unsqueeze(0)), None
        wants_weights = implementation == "eager" and is_watched(self)
        if implementation not in STANDARD or wants_weights or not is_readable(attention_mask, batch, frames):
            if type(self) is FastConformerAttention and attention_mask is not None:
                raise ValueError(
                    f"FastConformerAttention: attention_mask: expected bool {(batch, 1, frames, frames)}, got "
                    f"{attention_mask.dtype} {tuple(attention_mask.shape)}"
                )
            _left.note(
                self, WATCHED if wants_weights else masks.unread(implementation in STANDARD, implementation)
            )
            return type(self).forward(  # upstream's
                self, hidden_states, position_embeddings, attention_mask=attention_mask, **kwargs
            )
        by = None if attention_mask is None else seen(attention_mask)
        y = attended(
            self, *_projections(self, hidden_states), position_embeddings, attention_mask, by, mean=True
        )
        return plumbing.linear(self.o_proj, y.flatten(2)), None


def _projections(module: FastConformerAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v, (B, T, H, d) each."""
    found = plumbing.linears((module.q_proj, module.k_proj, module.v_proj), x)
    q, k, v = (y.view(*x.shape[:2], *module.bias_u.shape) for y in found)
    return q, k, v


def _of_recordings(
    module: FastConformerAttention, q: Tensor, k: Tensor, v: Tensor, table: Tensor, packing: Packing | Row
) -> Tensor:
    dropout = module.attention_dropout if module.training else 0.0
    positions = projected(module, module.relative_k_proj, table).unflatten(-1, module.bias_u.shape)
    q, k, v = (t.squeeze(0) for t in (q, k, v))
    return of_recordings(packing, q, k, v, positions, module.bias_u, module.bias_v, dropout)


def attended(
    module: FastConformerAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_embeddings: Tensor,
    mask: Tensor | None,
    by: Seen | None,
    mean: bool = False,
) -> Tensor:
    """Returns y (B, T, H, d) of queries (B, T, H, d), which stand at the last frames of keys and values (B, K, H, d).

    The position embeddings have 2K − 1 rows. ``by`` is the ``masks.Seen`` of the mask. A query that sees no key
    gets 0, or with ``mean`` the mean of v (``masks.are_empty_rows_read``): in the kernel's case without dropout.
    """
    dropout = module.attention_dropout if module.training else 0.0
    rows = max(0, q.shape[1] + k.shape[1] - 1)  # The others are for keys behind the queries'.
    shared = position_embeddings.shape[0] == 1 or position_embeddings.stride(0) == 0
    served = shared and not is_transformed()  # mean_of_values has a gradient in reverse mode alone.
    reason = None if served else "each sequence has position embeddings of its own"
    of_kernel = attention_dropout.dropout_of(module, dropout, q.device, reason)
    if of_kernel is None:
        p = plumbing.linear(module.relative_k_proj, position_embeddings[:, :rows])
        p = p.view(*p.shape[:2], *module.bias_u.shape)
        return _with_weights(module, q, k, v, p, mask, dropout, mean)
    p = first_rows(projected(module, module.relative_k_proj, position_embeddings[0]), rows)
    p = p.view(rows, *module.bias_u.shape)
    y = ops.rel_attention(q, k, v, p, module.bias_u, module.bias_v, **masks.of_kernel(mask, by), **of_kernel)
    if not mean or by is None or by.empty_rows is None or not masks.are_empty_rows_read(by, q.device):
        return y
    return torch.where(by.empty_rows[:, :, None, None], mean_of_values(q, k, v, module.bias_u).to(y.dtype), y)


def first_rows(table: Tensor, rows: int) -> Tensor:
    """Returns ``table[:rows]``; the whole table without a slice, whose gradient autograd would write into zeros."""
    return table if table.shape[0] == rows else table[:rows]


def mean_of_values(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float) -> Tensor:
    """Returns (B, 1 or T, H, d): the mean of v over all keys in float32 or better, with the gradient of a softmax of
    equal scores.

    With C = Σ_j (k_j − k̄)ᵀ v_j / (T √d), d mean_i = d v̄ + d(q_i + u) C + (q_i + u) dC|_k: the difference below is 0 and
    has this derivative. On the eager backend, which serves gradients of gradients, the softmax is computed.
    """
    wide = torch.promote_types(v.dtype, torch.float32)  # 16 bits gave k and bias twice upstream's error
    if v.is_cpu and v.dtype != wide:
        wide = torch.float64  # MKL's float32 products differ in bits between a replay and a plain call
    mean = v.mean(1, keepdim=True, dtype=wide)
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        return mean
    q, k = q.to(wide), k.to(wide)
    with without_autocast(q):
        if _dispatch.forced_backend() == "eager":  # The slope below has no second derivative.
            scores = torch.einsum("bthd,bjhd->bhtj", q + bias, k) * q.shape[-1] ** -0.5
            return torch.einsum("bhtj,bjhe->bthe", (scores - scores.detach()).softmax(-1), v.to(wide))
        spread = torch.einsum("bthd,bthe->bhde", k - k.mean(1, keepdim=True), v.detach().to(wide))
        slope = torch.einsum("bthd,bhde->bthe", q + bias, spread * (q.shape[-1] ** -0.5 / q.shape[1]))
    return mean + (slope - slope.detach())


def _with_weights(
    module: FastConformerAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    mask: Tensor | None,
    dropout: float,
    mean: bool,
) -> Tensor:
    """Computes the formula directly, as upstream does, with upstream's draw of the dropout."""
    scale = module.head_dim**-0.5
    position = (q + module.bias_v).transpose(1, 2)  # [B, H, T, d]
    scores = relative_shift(position @ p.permute(0, 2, 3, 1)) * scale
    if mask is not None:
        # Where a query sees no key, -65504 of float16 plus the content would overflow for some keys, or all.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.masked_fill(~masks.pairs(mask), torch.finfo(scores.dtype).min)
    content = (q + module.bias_u).transpose(1, 2) * scale
    scores = torch.matmul(content, k.permute(0, 2, 3, 1)) + scores
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if mask is not None and not mean:
        weights = weights.masked_fill(~mask, 0.0)
    weights = F.dropout(weights.to(q.dtype), dropout)
    return torch.matmul(weights, v.transpose(1, 2)).transpose(1, 2)


def projected(module: FastConformerAttention, projection: torch.nn.Module, table: Tensor) -> Tensor:
    """Returns the projection of ``table`` (2T − 1, width) by one of the module's linear layers. In inference it is kept
    while table and weight stay."""
    if (
        not plumbing.is_plain_linear(projection)
        or torch.is_grad_enabled()
        or is_traced()
        or is_transformed()
        or recording() is not None
        or autocast_dtype(table) is not None
        or len(table) >= 2 * KEPT_FRAMES
    ):
        return plumbing.linear(projection, table)
    tensors = table, *filter(torch.is_tensor, (projection.weight, projection.bias))
    if not _kept.are_counted(tensors):
        return plumbing.linear(projection, table)
    form = table.shape, table.dtype, projection.weight.dtype
    kept = _PROJECTED.get(module)
    if kept is None or kept[0] != form or not kept[1].unchanged(tensors):
        originals = _kept.Originals(tensors)
        with _reduced_weights.suspended():  # It is computed once, so exactly.
            positions = plumbing.linear(projection, table)
        # the table is kept as well: as long as it lives, no other tensor has its address
        kept = _PROJECTED[module] = form, originals, table, positions
    return kept[3]
