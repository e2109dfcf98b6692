# SPDX-License-Identifier: Apache-2.0
"""Relative-position attention weights.

    s[h,b,i,j] = q[h,b,i] . k[h,b,j] + p[h,b,i] . R[h, T-1-i+j]        R = linear_pos(pos_emb), 2T-1 rows
    weights    = softmax_j(s), masked scores set to -1000 first

``fastasr.ops.zipformer_attention_weights`` computes this from the projection without storing the scores; for the
backward pass it keeps only the weights.
"""

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastasr._recording import recording
from fastasr._tables import share
from fastasr.models.common.plain import runs
from fastasr.models.common.ragged import current, frames_of_nobody
from fastasr.models.common.row import RowFrames
from fastasr.models.zipformer import score_penalty
from fastasr.models.zipformer.autograd_graph import is_same
from fastasr.models.zipformer.balancer import Balancer
from fastasr.models.zipformer.decisions import on_columns
from fastasr.models.zipformer.gradient_scale import draw_for_log
from fastasr.models.zipformer.identity import Identity
from fastasr.models.zipformer.initial_scale import ScaledLinear
from fastasr.models.zipformer.packed_weights import dropped, of_one_call, of_recordings
from fastasr.models.zipformer.residuals import forked
from fastasr.models.zipformer.schedules import FloatLike, ScheduledFloat, whitening_schedule
from fastasr.models.zipformer.self_attention import Weights, check_cache
from fastasr.models.zipformer.unmaterialised import UnmaterialisedWeights, collected
from fastasr.models.zipformer.whitening import Whiten
from fastasr.ops import zipformer_attention_weights
from fastasr.ops._dispatch import served
from fastasr.ops._zipformer_attention import scores
from fastasr.ops.zipformer_attention import position_sums

# Scores beyond the limit are penalised on this share of the training calls.
SCORE_LIMIT = 25.0
SCORE_PENALTY = 1.0e-04
PENALISED_CALLS = 0.1
CONSUMERS = 3  # of the weights in a layer


class RelPositionMultiheadAttentionWeights(torch.nn.Module):
    """x (T, B, C), pos_emb (1 or B, 2T-1, pos_dim) -> attention weights (heads, B, T, T).

    key_padding_mask (B, T) and attn_mask ((B,) T, T) are True at hidden sources. With chunk_size > 0, sources in a
    later chunk are hidden too, and those more than left_context_chunks chunks before (-1: no limit).

    In training, a call leaves out the position scores with probability ``pos_emb_skip_rate``, and 10 % of the calls
    penalise scores beyond 25 by 1e-4 times their excess. Python's ``random`` decides both. Every call draws one more
    number, by which 0.1 % of the calls in eval mode log the entropy of the weights; compiled calls do neither.

    Raises ValueError for masks of another shape and TypeError for an attn_mask that is not boolean.
    """

    def __init__(
        self,
        embed_dim: int,
        pos_dim: int,
        num_heads: int,
        query_head_dim: int,
        pos_head_dim: int,
        dropout: float = 0.0,
        pos_emb_skip_rate: FloatLike = ScheduledFloat((0.0, 0.5), (4000.0, 0.0)),  # noqa: B008 (copied)
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.query_head_dim = query_head_dim
        self.pos_head_dim = pos_head_dim
        self.dropout = dropout
        self.pos_emb_skip_rate = copy.deepcopy(pos_emb_skip_rate)
        self.name = None
        self.in_proj = ScaledLinear(
            embed_dim, num_heads * (2 * query_head_dim + pos_head_dim), initial_scale=query_head_dim**-0.25
        )
        self.whiten_keys = Whiten(
            num_groups=num_heads,
            whitening_limit=whitening_schedule(3.0),
            prob=(0.025, 0.25),
            grad_scale=0.025,
        )
        # Softmax ignores a constant added to the keys, so without this their mean could drift.
        self.balance_keys = Balancer(
            query_head_dim * num_heads,
            channel_dim=-1,
            min_positive=0.4,
            max_positive=0.6,
            min_abs=0.0,
            max_abs=100.0,
            prob=0.025,
        )
        self.linear_pos = ScaledLinear(pos_dim, num_heads * pos_head_dim, bias=False, initial_scale=0.05)
        self.copy_pos_query = Identity()
        self.copy_query = Identity()

    def forward(
        self,
        x: Tensor,
        pos_emb: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        chunk_size: int = -1,
        left_context_chunks: int = -1,
    ) -> Weights:
        projected, relative, masks, penalized = _operands(
            self, x, pos_emb, key_padding_mask, attn_mask, chunk_size, left_context_chunks
        )

        sizes = self.num_heads, self.query_head_dim
        weights: Weights
        if penalized and recording() is not None:
            relative = relative.view_as(relative)
            share(relative)  # both passes read them
            limit = SCORE_PENALTY, SCORE_LIMIT
            weights = score_penalty.recorded_weights(projected, relative, penalized, sizes, *limit, masks)
            draw_for_entropy(self, lambda: weights)
            return weights if self.dropout == 0.0 else dropped(weights, self.dropout, self.training)
        penalty = SCORE_PENALTY if penalized else 0.0

        def formed(projected: Tensor, relative: Tensor | None, **masks: Any) -> Tensor:
            return zipformer_attention_weights(
                projected, relative, *sizes, score_penalty=penalty, score_limit=SCORE_LIMIT, **masks
            )

        weights = of_one_call(current(), projected, relative, *sizes, masks, penalty, SCORE_LIMIT)
        if weights is None:
            weights = of_recordings(formed, projected, relative, masks)
        if self.dropout != 0.0:
            weights = dropped(weights, self.dropout, self.training)
        draw_for_entropy(self, lambda: weights)
        return weights

    def unmaterialised(
        self,
        x: Tensor,
        pos_emb: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        chunk_size: int = -1,
        left_context_chunks: int = -1,
    ) -> Weights:
        """Returns the weights of :meth:`forward` without dropout as UnmaterialisedWeights. It draws as many random
        numbers as forward."""
        projected, relative, masks, penalized = _operands(
            self, x, pos_emb, key_padding_mask, attn_mask, chunk_size, left_context_chunks
        )
        draw_for_entropy(self, None)

        def described(projected: Tensor, relative: Tensor | None, **masks: Any) -> UnmaterialisedWeights:
            penalty: dict[str, Any] = {}
            if penalized:
                act = None if penalized is True else penalized.values[:1]
                penalty = {"score_penalty": SCORE_PENALTY, "score_limit": SCORE_LIMIT, "act": act}
                nobody = frames_of_nobody(projected)
                if nobody is not None and not _knows_gaps(projected):  # scores of 0 get no penalty
                    projected = projected.masked_fill(nobody.unsqueeze(-1), 0.0)
            sizes = self.num_heads, self.query_head_dim
            (*first, last), sums = _of_consumers(projected, relative)
            return UnmaterialisedWeights(
                *last, *sizes, penalty=penalty, first=first[::-1], sums=sums, **masks
            )

        return of_recordings(described, projected, relative, masks)

    def streaming_forward(
        self,
        x: Tensor,
        pos_emb: Tensor,
        cached_key: Tensor,
        left_context_len: int,
        key_padding_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """x (T, B, C), one chunk; pos_emb (1 or B, left_context_len + 2T - 1, pos_dim); cached_key
        (left_context_len, B, heads * query_head_dim); key_padding_mask (B, left_context_len + T) or None ->
        weights (heads, B, T, left_context_len + T), the cache for the next chunk.
        """
        check_cache(
            "RelPositionMultiheadAttentionWeights", "cached_key", cached_key.shape[0], left_context_len
        )
        projected = self.in_proj(x)
        width = self.num_heads * self.query_head_dim
        k = torch.cat([cached_key, projected[..., width : 2 * width]])
        _check_masks(k, key_padding_mask, None)
        weights = zipformer_attention_weights(
            projected,
            self.linear_pos(pos_emb),
            self.num_heads,
            self.query_head_dim,
            key_padding_mask=None if key_padding_mask is None else key_padding_mask.to(torch.bool),
            cached_key=cached_key.to(k.dtype),
        )
        return weights, k[k.shape[0] - left_context_len :]


def _operands(
    module: RelPositionMultiheadAttentionWeights,
    x: Tensor,
    pos_emb: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    chunk_size: int,
    left_context_chunks: int,
) -> tuple[Tensor, Any, dict[str, Any], Any]:
    """Returns the projection, the positions or None, the masks, and whether large scores are penalised."""
    _check_masks(x, key_padding_mask, attn_mask)
    projected = _with_gradient_changes(module, module.in_proj(x))
    with_positions = not module.training or _with_positions(module)
    relative = module.linear_pos(pos_emb) if with_positions else None
    penalized = module.training and _draw_penalty()
    if penalized is True and draw_for_log() and module.name is not None and current() is None:
        _log_penalty(module, projected, relative)
    masks = {
        "key_padding_mask": None if key_padding_mask is None else key_padding_mask.to(torch.bool),
        "attn_mask": attn_mask,
        "chunk_size": chunk_size,
        "left_context_chunks": left_context_chunks,
    }
    return projected, relative, masks, penalized


def _with_positions(module: RelPositionMultiheadAttentionWeights) -> bool:
    recorded = recording()
    if recorded is None:
        return random.random() >= float(module.pos_emb_skip_rate)
    if not recorded.phase(module.pos_emb_skip_rate):
        recorded.refuse("position scores are skipped at random in the first batches")
    recorded.numbers(lambda: (random.random(), float(module.pos_emb_skip_rate), [])[2], 0)
    return True


def _draw_penalty() -> Any:
    """Returns whether this call penalises large scores, while it is recorded the number on the device that says so."""
    recorded = recording()
    if recorded is None:
        return random.random() < PENALISED_CALLS

    def plan() -> list[bool]:
        penalized = random.random() < PENALISED_CALLS
        if penalized:
            draw_for_log()
        return [penalized]

    numbers = recorded.numbers(plan, 1)
    return numbers if torch.is_grad_enabled() else False


def plain(
    module: RelPositionMultiheadAttentionWeights, x: Tensor, pos_emb: Tensor, masks: dict[str, Any]
) -> Tensor:
    """Returns the weights of a call in inference, without random numbers."""
    sizes = module.num_heads, module.query_head_dim
    return zipformer_attention_weights(module.in_proj(x), module.linear_pos(pos_emb), *sizes, **masks)


def _knows_gaps(projected: Tensor) -> bool:
    """Says whether attention leaves the scores of frames of nobody out itself."""
    packing = current()
    return isinstance(packing, RowFrames) and packing.knows_gaps and served("zipformer_attention", projected)


def _of_consumers(
    projected: Tensor, relative: Tensor | None
) -> tuple[list[tuple[Tensor, Tensor | None]], Any]:
    """Returns the operands for each consumer of the weights, and what their backward passes add the gradient of the
    positions to, or None. Consumers share the tables that kernels make of the positions; in a recorded pass one kernel
    adds up the gradients of the projection."""
    operands = forked(projected, wide=CONSUMERS, narrow=0)
    if relative is None:
        return [(t, None) for t in operands], None
    sums = None if recording() is None or not torch.is_grad_enabled() else position_sums(projected)
    if sums is None:
        positions = forked(relative.view_as(relative), wide=CONSUMERS, narrow=0)
    else:
        positions = collected(relative, sums, CONSUMERS)
    share(*positions)
    return [*zip(operands, positions, strict=True)], sums


def draw_for_entropy(
    module: RelPositionMultiheadAttentionWeights, weights: Callable[[], Weights] | None
) -> None:
    """Draws a number that decides whether this call logs the entropy of its weights, which ``weights()`` returns; None
    if they are not in memory: the call then draws but does not log. A compiled call neither draws nor logs.
    """
    if torch.compiler.is_compiling():
        return
    recorded = recording()
    if recorded is not None:
        recorded.numbers(lambda: (random.random(), [])[1], 0)
        return
    if random.random() >= 0.001 or module.training or current() is not None or weights is None:
        return
    if logging.getLogger().isEnabledFor(logging.INFO):
        entropy = torch.special.entr(weights().detach().to(torch.float32)).sum(-1).mean((1, 2))
        logging.info("name=%s, entropy of the attention weights by head: %s", module.name, entropy)


def _check_masks(sources: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> None:
    frames, batch, _ = sources.shape
    if key_padding_mask is not None and tuple(key_padding_mask.shape) != (batch, frames):
        raise ValueError(
            f"RelPositionMultiheadAttentionWeights: key_padding_mask must be ({batch}, {frames}), "
            f"got {tuple(key_padding_mask.shape)}"
        )
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise TypeError(
            f"RelPositionMultiheadAttentionWeights: attn_mask must be torch.bool, got {attn_mask.dtype}"
        )


def _with_gradient_changes(module: RelPositionMultiheadAttentionWeights, projected: Tensor) -> Tensor:
    """Applies the modules that watch parts of the projection (T, B, q | k | p) or change their gradients.

    On most calls these modules return their argument or a view of it. The projection is then returned as it is.
    """
    width = module.num_heads * module.query_head_dim
    regularisers = (module.balance_keys, Balancer), (module.whiten_keys, Whiten)
    if recording() is not None and all(runs(m, cls.forward) for m, cls in regularisers):
        for m, _ in regularisers:
            projected = on_columns(m, projected, width, 2 * width)
        return projected
    parts = projected.split([width, width, module.num_heads * module.pos_head_dim], -1)
    q, k, p = parts
    after = module.copy_query(q), module.whiten_keys(module.balance_keys(k)), module.copy_pos_query(p)
    if all(map(is_same, after, parts)):
        return projected
    return torch.cat(after, -1)


def _log_penalty(
    module: RelPositionMultiheadAttentionWeights, projected: Tensor, relative: Tensor | None
) -> None:
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        with torch.no_grad():
            excess = 0.0
            for n in range(projected.shape[1]):
                of = slice(n, n + 1)
                row = relative if relative is None or len(relative) == 1 else relative[of]
                found = scores(projected[:, of], row, None, module.num_heads, module.query_head_dim)
                excess += (found.abs() - SCORE_LIMIT).clamp_(min=0).sum().item()
        loss = SCORE_PENALTY * excess
        logging.debug("attention scores: name=%s, penalty=%.3e", module.name, loss)
