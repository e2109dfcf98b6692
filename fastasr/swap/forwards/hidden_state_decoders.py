# SPDX-License-Identifier: Apache-2.0
"""Layers of the decoders of ESPnet, FireRedASR and NeMo, and of ESPnet's language model, of which native calls compute
a token (``decoder_step``).

A step of their searches gives a layer its input of all tokens so far, which upstream projects to keys and values anew.
Here those of earlier tokens stay as long as the encoder's frames exist, in a language model as long as the search
lasts. They are found again by the layer's input, because beams change places. Upstream's code serves all other calls:
prompts of several tokens, and calls with gradients, hooks or autocast.
"""

from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common import layer_products, repeated_inputs
from fastasr.models.common.packed_layers import may_call
from fastasr.swap.forwards import searches
from fastasr.swap.forwards.decoder_step import MOST_ROWS, STEPS, ByModules, Names, Step
from fastasr.swap.rule import Upstream

ESPNET = Names(
    "self_attn",
    "norm1",
    "src_attn",
    "norm2",
    "feed_forward.w_1",
    "feed_forward.activation",
    "feed_forward.w_2",
    "norm3",
    ("linear_q", "linear_k", "linear_v", "linear_out"),
    "d_k",
    "normalize_before",
)
ESPNET_LANGUAGE_MODEL = ESPNET._replace(frames="", frames_norm="", last_norm="norm2")
FIRERED = Names(
    "self_attn",
    "self_attn_norm",
    "cross_attn",
    "cross_attn_norm",
    "mlp.w_1",
    "mlp.act",
    "mlp.w_2",
    "mlp_norm",
    ("w_qs", "w_ks", "w_vs", "fc"),
    "d_k",
)
NEMO = Names(
    "first_sub_layer",
    "layer_norm_1",
    "second_sub_layer",
    "layer_norm_2",
    "third_sub_layer.dense_in",
    "third_sub_layer.act_fn",
    "third_sub_layer.dense_out",
    "layer_norm_3",
    ("query_net", "key_net", "value_net", "out_projection"),
    "attn_head_size",
    "pre_ln",
)


class _Tokens(NamedTuple):
    """The layer's input (R, T, width) in the last step, and its keys and values (R, T, width)."""

    x: Tensor
    keys: Tensor
    values: Tensor


class _Search:
    """What stays: the keys and values (B, H, K, d) of the frames (B, K, width), if there are any, and the tokens so
    far."""

    def __init__(self, step: Step, frames: Tensor | None = None) -> None:
        self.of_frames: list[Any] = [None, None] if frames is None else step.of_frames(frames)
        self.tokens: _Tokens | None = None

    def with_next(self, step: Step, x: Tensor, keys: Tensor, values: Tensor) -> _Tokens:
        """Returns all tokens, whose input is x (R, T, width), with the last one's keys and values."""
        if x.shape[1] > 1:
            before = x[:, :-1]
            kept = _found(self.tokens, before) or step.of_tokens(before)
            keys, values = (torch.cat(pair, 1) for pair in zip(kept, (keys, values), strict=True))
        # Another thread may search the same frames and replace the attribute.
        tokens = self.tokens = _Tokens(x.clone(), keys, values)
        return tokens


def _found(kept: _Tokens | None, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns the keys and values of the input x (R, T, width), if all of its rows are among those kept."""
    if kept is None or kept.x.shape[1:] != x.shape[1:]:
        return None
    if kept.x.shape == x.shape and torch.equal(kept.x, x):
        return kept.keys, kept.values
    # Two numbers of each token tell rows apart; then all are compared.
    likely = (x[:, None, :, :2] == kept.x[None, :, :, :2]).flatten(2).all(2)
    rows = likely.to(torch.uint8).argmax(1)
    if not torch.equal(kept.x.index_select(0, rows), x):
        return None
    return kept.keys.index_select(0, rows), kept.values.index_select(0, rows)


def _token(
    self: Upstream,
    names: Names,
    by_modules: ByModules,
    x: Tensor,
    frames: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None],
    attended: bool = False,
    query: Tensor | None = None,
) -> list[Tensor] | None:
    """Returns the layer's output (R, 1, width) of the last token of x (R, T, width), and with ``attended`` the weights
    of both attentions (R, H, 1, T) and (R, H, 1, K). None where upstream's code is to run. frames: (R, K, width) or
    None. masks: (R or 1, 1, 1, keys) of both attentions, True at keys that are seen, or added to the scores. query:
    what upstream takes for the last token, if not that of x."""
    if not (_is_floats(x) and len(x) <= MOST_ROWS and _is_mask(len(x), masks[0], x.shape[1])):
        return None
    if frames is None and not searches.is_running():
        return None
    if frames is not None:
        fits = _is_floats(frames) and x.shape[::2] == frames.shape[::2]
        if not fits or not _is_mask(len(x), masks[1], frames.shape[1]):
            return None
    own, last = getattr(self, names.own), x[:, -1:].contiguous()
    if not may_call(self, last, attrgetter(f"{names.own}.{names.projections[0]}.weight")(self)):
        return None
    if query is not None and not torch.equal(query, last):
        return None
    step = STEPS.of(self, by_modules, names)
    if step.reason:
        _left.note(self, step.why(self))
        return None
    products = step.products(last)
    if products is None:
        return None
    form = step, layer_products.key()
    if frames is None:
        search = searches.kept(self, form, partial(_Search, step))
    else:
        _, frames = repeated_inputs.without_copies(self, frames)
        search = repeated_inputs.of(own, frames, [], form, partial(_Search, step), otherwise=lambda _: None)
    if search is None:
        return None
    q, k, v = step.projections(products, last)
    tokens = search.with_next(step, x, k.view(last.shape), v.view(last.shape))
    keys, values = map(step.in_heads, tokens[1:])
    return step.result(products, last, q, keys, values, *search.of_frames, *masks, attended=attended)


def _is_floats(t: Any) -> bool:
    """Says whether this is a tensor (R, T, width) of float32 on the CPU, with elements."""
    return type(t) is Tensor and t.dtype is torch.float32 and t.is_cpu and t.dim() == 3 and t.numel() > 0


def _is_mask(rows: int, mask: Tensor | None, keys: int) -> bool:
    if mask is None:
        return True
    known = mask.dtype is torch.bool or mask.dtype is torch.float32
    return known and mask.is_cpu and mask.shape in ((rows, 1, 1, keys), (1, 1, 1, keys))


def _seen(mask: Tensor | None) -> Tensor | None:
    """Returns the mask (R or 1, 1, 1, K), True at keys that are seen, for one of (R or 1, 1, K), 0 at hidden keys."""
    return None if mask is None else mask.unsqueeze(1) != 0


def espnet_layer(
    self: Upstream,
    tgt: Tensor,
    tgt_mask: Tensor | None,
    memory: Tensor,
    memory_mask: Tensor | None,
    cache: Tensor | None = None,
    pre_memory: Tensor | None = None,
    pre_memory_mask: Tensor | None = None,
) -> Any:
    """Serves ESPnet's layer: the input of all tokens (R, T, width), its mask (R or 1, T, T) and the frames' (R or 1, 1,
    K), 0 at hidden keys, frames (R, K, width), and the results of all tokens but the last (R, T - 1, width) -> all
    results, and the other arguments. The weights of the attentions stay in ``attn``, as upstream's."""
    upstream = partial(type(self).forward, self)
    own, source, found = self.self_attn, self.src_attn, None
    whole = tgt.shape[0], tgt.shape[1] - 1, self.size
    if cache is not None and cache.shape == whole and pre_memory is None and not own.use_flash_attn:
        masks = _seen(None if tgt_mask is None else tgt_mask[:, -1:]), _seen(memory_mask)
        kept = not (own.use_sdpa or source.use_sdpa)

        def by_modules(x: Tensor, frames: Tensor) -> Tensor:
            y: Tensor = upstream(x, None, frames, None, x[:, :1])[0]
            return y[:, 1:]

        found = _token(self, ESPNET, by_modules, tgt, memory, masks, kept)
    if cache is None or found is None:
        return upstream(tgt, tgt_mask, memory, memory_mask, cache, pre_memory, pre_memory_mask)
    y, *weights = found
    if weights:
        own.attn, source.attn = weights
    return torch.cat((cache, y), 1), tgt_mask, memory, memory_mask


def espnet_encoder_layer(
    self: Upstream, x: Tensor, mask: Tensor | None, cache: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Serves the layer of ESPnet's Transformer language model in a search: as ``espnet_layer``, without frames. Layers
    of encoders are upstream's."""
    upstream = partial(type(self).forward, self)
    own, found = self.self_attn, None
    whole = x.shape[0], x.shape[1] - 1, self.size
    if cache is not None and cache.shape == whole and not own.use_flash_attn:

        def by_modules(x: Tensor) -> Tensor:
            y: Tensor = upstream(x, None, x[:, :1])[0]
            return y[:, 1:]

        mask = None if mask is None else mask[:, -1:]
        masks = _seen(mask), None
        found = _token(self, ESPNET_LANGUAGE_MODEL, by_modules, x, None, masks, not own.use_sdpa)
    if cache is None or found is None:
        result: tuple[Tensor, Tensor | None] = upstream(x, mask, cache)
        return result
    y, *weights = found
    if weights:
        (own.attn,) = weights
    return torch.cat((cache, y), 1), mask


def firered_layer(
    self: Upstream,
    dec_input: Tensor,
    enc_output: Tensor,
    self_attn_mask: Tensor | None,
    cross_attn_mask: Tensor | None,
    cache: Tensor | None = None,
) -> Tensor:
    """Serves FireRedASR's layer: the input of all tokens (R, T, width), frames (R, K, width), masks (R or 1, T, T) and
    (R or 1, 1, K), 0 at hidden keys, and the results of all tokens but the last (R, T - 1, width) -> all results."""
    upstream = partial(type(self).forward, self)
    found = None
    if cache is not None and self_attn_mask is not None:

        def by_modules(x: Tensor, frames: Tensor) -> Tensor:
            y: Tensor = upstream(x, frames, x.new_ones(1, 2, 2), None, x[:, :1])
            return y[:, 1:]

        masks = _seen(self_attn_mask[:, -1:]), _seen(cross_attn_mask)
        found = _token(self, FIRERED, by_modules, dec_input, enc_output, masks)
    if cache is None or found is None:
        y: Tensor = upstream(dec_input, enc_output, self_attn_mask, cross_attn_mask, cache)
        return y
    return torch.cat((cache, found[0]), 1)


def nemo_layer(
    self: Upstream,
    decoder_query: Tensor,
    decoder_mask: Tensor | None,
    decoder_keys: Tensor,
    encoder_states: Tensor,
    encoder_mask: Tensor | None,
) -> Any:
    """Serves NeMo's layer: a token (R, 1, width), the input of all tokens so far (R, T, width), frames (R, K, width),
    and masks (R or 1, 1, 1, T or 1) and (R or 1, 1, 1, K), which are added to the scores -> the result (R, 1, width)
    and the weights of the attention to the frames."""
    upstream = partial(type(self).forward, self)
    found = None
    if decoder_query.shape[1:2] == (1,) and not self.is_adapter_available():

        def by_modules(x: Tensor, frames: Tensor) -> Tensor:
            y: Tensor = upstream(x[:, 1:], None, x, frames, None)[0]
            return y

        keys = decoder_keys.shape[1]
        if decoder_mask is not None and decoder_mask.shape[-1:] == (1,):
            decoder_mask = decoder_mask.expand(*decoder_mask.shape[:-1], keys)
        masks = decoder_mask, encoder_mask
        found = _token(self, NEMO, by_modules, decoder_keys, encoder_states, masks, True, decoder_query)
    if found is None:
        return upstream(decoder_query, decoder_mask, decoder_keys, encoder_states, encoder_mask)
    y, _, weights = found
    return y, {"xatt_scores": weights}
