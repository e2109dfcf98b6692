# SPDX-License-Identifier: Apache-2.0
"""SpeechBrain's Transformer decoder in a search.

A step of SpeechBrain's searches gives the decoder all tokens so far, of which all but the last one were in the step
before, in other rows where beams changed places. The last tokens alone are computed: each sees keys, values and results
that are kept of the others, because a token does not see later ones. They stay as long as the encoder's frames exist.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr import ops
from fastasr._recording import is_traced
from fastasr._transforms import is_transformed
from fastasr.models.common import repeated_inputs
from fastasr.models.common.plain import is_plain, is_upstreams
from fastasr.models.common.plumbing import is_idle
from fastasr.swap.forwards.beams import queries, rows
from fastasr.swap.forwards.torch_attention import why_not
from fastasr.swap.rule import Upstream


class _Tokens(NamedTuple):
    """Those of the last step: the decoder's input and output (R, T, width), and of each layer keys and values
    (R, T, 2 width), the weights of both attentions (R, T, T) and (R, T, K)."""

    x: Tensor
    y: Tensor
    keys: tuple[Tensor, ...]
    own: tuple[Tensor, ...]
    to_frames: tuple[Tensor, ...]

    def of(self, found: Tensor) -> "_Tokens":
        """Returns those of these rows."""
        each = ([t[found] for t in part] for part in (self.keys, self.own, self.to_frames))
        return _Tokens(self.x[found], self.y[found], *map(tuple, each))


class _Search:
    """What stays with the frames (R, K, width): how many rows each recording has, keys and values (B, K, 2 width) in
    each layer, and the tokens so far."""

    def __init__(self, layers: Any, frames: Tensor, padding: Tensor | None) -> None:
        self.padding = None if padding is None else padding.clone()
        self.beams = repeated_inputs.equal_rows(frames) if len(frames) > 1 else 1
        if padding is not None and not torch.equal(
            padding, padding[:: self.beams].repeat_interleave(self.beams, 0)
        ):
            self.beams = 1
        attentions = [layer.multihead_attn.att for layer in layers]
        self.keys = [_projected(a, frames[:: self.beams], a.embed_dim) for a in attentions]
        self.tokens: _Tokens | None = None


def decoder(
    self: Upstream,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    pos_embs_tgt: Tensor | None = None,
    pos_embs_src: Tensor | None = None,
) -> Any:
    """Serves the decoder: tokens (R, T, width), the encoder's frames (R, K, width), the mask (T, T) that hides later
    tokens and the frames' padding (R, K), True at padding -> the output (R, T, width) and lists of the weights of both
    attentions."""
    others = memory_mask, tgt_key_padding_mask, pos_embs_tgt, pos_embs_src
    search = None
    if all(other is None for other in others) and _fits(self, tgt, memory, tgt_mask):
        search = _search(self, memory, memory_key_padding_mask)
    kept = None if search is None else _before(search, tgt)
    if search is None or kept is None:
        found: Any = type(self).forward(
            self,
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            pos_embs_tgt,
            pos_embs_src,
        )
        return found
    now = search.tokens = _with_next(self, search, kept, tgt)
    return now.y.clone(), [t.clone() for t in now.own], [t.clone() for t in now.to_frames]


def _fits(self: Upstream, tgt: Tensor, memory: Tensor, mask: Tensor | None) -> bool:
    """Says whether this may be a step of a search: in inference, with a mask that hides later tokens, and layers that
    do what their classes say."""
    if (
        is_traced()
        or is_transformed()
        or self.training
        or torch.is_grad_enabled()
        or tgt.dim() != 3
        or mask is None
        or not len(tgt)
    ):
        return False
    length, width = tgt.shape[1:]
    if (
        memory.dim() != 3
        or memory.shape[::2] != tgt.shape[::2]
        or not tgt.is_cpu
        or tgt.dtype != memory.dtype
    ):
        return False
    later = torch.full((length, length), -torch.inf, dtype=torch.float32, device="cpu").triu_(1)
    if mask.dtype is not torch.float32 or not torch.equal(mask, later):
        return False
    return all(_is_plain(layer, self, width, tgt.dtype) for layer in self.layers)


def _is_plain(layer: Upstream, owner: Upstream, width: int, dtype: torch.dtype) -> bool:
    if not (
        is_upstreams(layer, owner) and all(map(is_idle, (layer.dropout1, layer.dropout2, layer.dropout3)))
    ):
        return False
    for part in (layer.self_attn, layer.multihead_attn):
        attention: Any = getattr(part, "att", None)
        if not is_upstreams(part, owner) or not is_plain(attention, torch.nn.MultiheadAttention):
            return False
        if why_not(attention) or attention.batch_first or attention.embed_dim != width:
            return False
        if attention.in_proj_weight.dtype != dtype or attention.out_proj._forward_hooks:
            return False
    return True


def _search(self: Upstream, memory: Tensor, padding: Tensor | None) -> _Search | None:
    """Returns the search on these frames, or None where nothing is kept of them."""
    find = lambda frames: _Search(self.layers, frames, padding)  # noqa: E731
    search: _Search | None = repeated_inputs.of(
        self, memory, [*self.parameters()], (), find, lambda frames: None
    )
    if search is None:
        return None
    kept = search.padding
    same = padding is kept if padding is None or kept is None else torch.equal(padding, kept)
    return search if same else None


def _before(search: _Search, x: Tensor) -> _Tokens | None:
    """Returns what is kept of all tokens but the last ones, or None."""
    length, kept = x.shape[1] - 1, search.tokens
    if length == 0:
        sizes = 2 * x.shape[2], 0, search.keys[0].shape[1]
        none = ((x.new_empty(len(x), 0, size),) * len(search.keys) for size in sizes)
        return _Tokens(x[:, :0], x[:, :0], *none)
    if kept is None or kept.x.shape[1] != length:
        return None
    # Two numbers of each token tell a recording's rows apart; then all are compared.
    likely = (x[:, None, :-1, :2] == kept.x[None, :, :, :2]).flatten(2).all(2)
    recordings = torch.arange(len(x), dtype=torch.int64, device="cpu") // search.beams
    likely &= recordings[:, None] == recordings
    found = likely.to(torch.uint8).argmax(1)
    return kept.of(found) if torch.equal(kept.x[found], x[:, :-1]) else None


def _with_next(self: Upstream, search: _Search, kept: _Tokens, x: Tensor) -> _Tokens:
    """Returns the tokens so far with the last ones of x (R, T, width)."""
    y, keys, own, to_frames = x[:, -1:], [], [], []
    padding = None if search.padding is None else search.padding[:: search.beams]
    for i, layer in enumerate(self.layers):
        width, first = y.shape[2], layer.normalize_before
        qkv = _projected(layer.self_attn.att, layer.norm1(y) if first else y)
        keys.append(torch.cat((kept.keys[i], qkv[..., width:]), 1))
        found, weights = _attended(layer.self_attn.att, qkv[..., :width], keys[i])
        own.append(torch.cat((F.pad(kept.own[i], (0, 1)), weights), 1))
        y = y + found if first else layer.norm1(y + found)
        q = _projected(layer.multihead_attn.att, layer.norm2(y) if first else y, 0, width)
        found, weights = _attended(
            layer.multihead_attn.att, queries(q, search.beams), search.keys[i], padding
        )
        to_frames.append(torch.cat((kept.to_frames[i], rows(weights, search.beams)), 1))
        y = y + rows(found, search.beams)
        y = y if first else layer.norm2(y)
        y = y + layer.pos_ffn(layer.norm3(y) if first else y)
        y = y if first else layer.norm3(y)
    y = torch.cat((kept.y, self.norm(y)), 1)
    return _Tokens(x.clone(), y, tuple(keys), tuple(own), tuple(to_frames))


def _projected(attention: Upstream, x: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
    """Returns x (..., width) through the rows [begin, end) of the weight of queries, keys and values."""
    bias = attention.in_proj_bias
    return ops.linear(x, attention.in_proj_weight[begin:end], None if bias is None else bias[begin:end])


def _attended(
    attention: Upstream, q: Tensor, keys: Tensor, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the attention (B, N, width) of queries (B, N, width) to keys and values (B, K, 2 width), and the weights'
    mean over the heads (B, N, K)."""
    q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, *keys.chunk(2, -1)))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    y = (weights @ v).transpose(1, 2).flatten(2)
    return ops.linear(y, attention.out_proj.weight, attention.out_proj.bias), weights.mean(1)
