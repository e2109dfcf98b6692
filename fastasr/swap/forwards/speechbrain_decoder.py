# SPDX-License-Identifier: Apache-2.0
"""SpeechBrain's Transformer decoder in a search.

A step of SpeechBrain's searches gives the decoder all tokens so far, of which all but the last one were in the step
before, in other rows where beams changed places. The last tokens alone are computed: each sees keys, values and results
that are kept of the others, because a token does not see later ones. They stay as long as the encoder's frames exist.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastasr.models.common import layer_products, repeated_inputs
from fastasr.models.common.packed_layers import may_call
from fastasr.swap.forwards import searches
from fastasr.swap.forwards.decoder_step import MOST_ROWS, Names, Step, later, products_of, steps_of
from fastasr.swap.rule import Upstream

_NAMES = Names(
    "self_attn.att",
    "norm1.norm",
    "multihead_attn.att",
    "norm2.norm",
    "pos_ffn.ffn.0",
    "pos_ffn.ffn.1",
    "pos_ffn.ffn.3",
    "norm3.norm",
    (),
    "head_dim",
    "normalize_before",
)


class _Tokens(NamedTuple):
    """Those of the last step: the decoder's input and output (R, T, width), and of each layer keys and values
    (R, T, width), and the weights of both attentions (R, T, T) and (R, T, K)."""

    x: Tensor
    y: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    own: list[Tensor]
    to_frames: list[Tensor]

    def of(self, found: Tensor) -> "_Tokens":
        """Returns those of these rows."""
        each = ([t.index_select(0, found) for t in part] for part in self[2:])
        return _Tokens(self.x.index_select(0, found), self.y.index_select(0, found), *each)


class _Search:
    """What stays with the frames (R, K, width): how many rows each recording has, keys and values (B, H, K, d) in each
    layer, and the tokens so far."""

    def __init__(self, steps: list[Step], frames: Tensor, padding: Tensor | None) -> None:
        self.padding = None if padding is None else padding.clone()
        # of the rows' attention to frames: True at frames that are seen
        self.seen = None if padding is None else ~padding[:, None, None]
        self.beams = repeated_inputs.equal_rows(frames) if len(frames) > 1 else 1
        if padding is not None and not torch.equal(
            padding, padding[:: self.beams].repeat_interleave(self.beams, 0)
        ):
            self.beams = 1
        self.frames = [step.of_frames(frames[:: self.beams]) for step in steps]
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
    tokens and the frames' padding (R, K), True at padding -> the output (R, T, width), in a swapped search that of the
    last token (R, 1, width), and lists of the weights of both attentions."""
    others = memory_mask, tgt_key_padding_mask, pos_embs_tgt, pos_embs_src
    now = None
    if all(other is None for other in others) and _fits(self, tgt, memory, tgt_mask, memory_key_padding_mask):
        now = _computed(self, tgt, memory, memory_key_padding_mask)
    if now is None:
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
    y = now.y[:, -1:] if searches.reads_last_token(self) else now.y
    return y.clone(), [t.clone() for t in now.own], [t.clone() for t in now.to_frames]


def _fits(self: Upstream, tgt: Tensor, memory: Tensor, mask: Tensor | None, padding: Tensor | None) -> bool:
    """Says whether this may be a step of a search: in inference, with a mask that hides later tokens."""
    if not (isinstance(mask, Tensor) and may_call(self, tgt, self.layers[0].self_attn.att.in_proj_weight)):
        return False
    plain = all(type(t) is Tensor and t.dtype is torch.float32 and t.is_cpu for t in (tgt, memory, mask))
    if not plain or memory.dim() != 3 or memory.shape[::2] != tgt.shape[::2] or len(tgt) > MOST_ROWS:
        return False
    if padding is not None and (padding.dtype is not torch.bool or padding.shape != memory.shape[:2]):
        return False
    hidden = torch.full((tgt.shape[1],) * 2, -torch.inf, dtype=torch.float32, device="cpu").triu_(1)
    return torch.equal(mask, hidden) and memory.numel() > 0


def _computed(self: Upstream, x: Tensor, memory: Tensor, padding: Tensor | None) -> _Tokens | None:
    """Returns the tokens so far with the last ones of x (R, T, width), or None where upstream's code is to run."""
    steps = steps_of(self, self.layers, _by_modules, _NAMES)
    if steps is None:
        return None
    last = x[:, -1:].contiguous()
    products = products_of(steps, last)
    if products is None:
        return None
    form = *steps, layer_products.key()
    search: _Search | None = repeated_inputs.of(
        self, memory, [], form, lambda frames: _Search(steps, frames, padding), otherwise=lambda frames: None
    )
    if search is None or not _is_same(padding, search.padding):
        return None
    kept = _before(search, x)
    if kept is None:
        return None
    # Another thread may search the same frames and replace the attribute.
    tokens = search.tokens = _with_next(self, steps, products, search, kept, x)
    return tokens


def _by_modules(layer: Upstream, x: Tensor, frames: Tensor) -> Tensor:
    y: Tensor = type(layer).forward(layer, x, frames, later(x))[0]
    return y[:, 1:]


def _is_same(padding: Tensor | None, kept: Tensor | None) -> bool:
    return padding is kept if padding is None or kept is None else torch.equal(padding, kept)


def _before(search: _Search, x: Tensor) -> _Tokens | None:
    """Returns what is kept of all tokens but the last ones, or None."""
    length, kept = x.shape[1] - 1, search.tokens
    if length == 0:
        sizes = x.shape[2], x.shape[2], 0, search.frames[0][0].shape[2]
        none = ([x.new_empty(len(x), 0, size)] * len(search.frames) for size in sizes)
        return _Tokens(x[:, :0], x[:, :0], *none)
    if kept is None or kept.x.shape[1] != length:
        return None
    # Two numbers of each token tell a recording's rows apart; then all are compared.
    likely = (x[:, None, :-1, :2] == kept.x[None, :, :, :2]).flatten(2).all(2)
    recordings = torch.arange(len(x), dtype=torch.int64, device="cpu") // search.beams
    likely &= recordings[:, None] == recordings
    found = likely.to(torch.uint8).argmax(1)
    return kept.of(found) if torch.equal(kept.x[found], x[:, :-1]) else None


def _with_next(
    self: Upstream, steps: list[Step], products: list[Any], search: _Search, kept: _Tokens, x: Tensor
) -> _Tokens:
    """Returns the tokens so far with the last ones of x (R, T, width)."""
    y, more = x[:, -1:].contiguous(), []
    for step, found, frames, *before in zip(steps, products, search.frames, *kept[2:], strict=True):
        keys, values, own, to_frames = before
        q, *next_ones = (t.view(y.shape) for t in step.projections(found, y))
        keys, values = (torch.cat(pair, 1) for pair in zip((keys, values), next_ones, strict=True))
        heads = map(step.in_heads, (keys, values))
        y, *weights = step.result(found, y, q, *heads, *frames, None, search.seen, attended=True)
        weights_of_token, of_frames = (w.mean(1) for w in weights)
        own = torch.cat((torch.nn.functional.pad(own, (0, 1)), weights_of_token), 1)
        more.append((keys, values, own, torch.cat((to_frames, of_frames), 1)))
    y = torch.cat((kept.y, self.norm(y)), 1)
    return _Tokens(x.clone(), y, *map(list, zip(*more, strict=True)))
