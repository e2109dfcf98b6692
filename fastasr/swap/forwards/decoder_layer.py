# SPDX-License-Identifier: Apache-2.0
"""Layers of transformers' decoders, of which native calls compute a token (``decoder_step``). Between them upstream's
cache gets the token's keys and values. Upstream's code serves all other calls: the prompt, whose tokens are many, and
calls with another cache, gradients, hooks or autocast.
"""

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr.models.common.packed_layers import may_call, note_declined
from fastasr.models.fast_conformer.attention import STANDARD
from fastasr.models.fast_conformer.masks import implementation, unread
from fastasr.swap.forwards.decoder_step import MOST_ROWS, STEPS, Names, Rotate, later
from fastasr.swap.forwards.transformers_cache import SharedRows
from fastasr.swap.rule import Upstream, upstream_class

# The arguments that callers give by position
_ARGUMENTS = "attention_mask", "encoder_hidden_states", "encoder_attention_mask"
_MASKS = "attention_mask", "encoder_attention_mask"
_UNREAD = ("use_cache", "position_ids", "encoder_position_ids", "cache_position")  # for one token

_FIRST = "q_proj", "k_proj", "v_proj"
_WHISPER = Names(
    "self_attn",
    "self_attn_layer_norm",
    "encoder_attn",
    "encoder_attn_layer_norm",
    "fc1",
    "activation_fn",
    "fc2",
    "final_layer_norm",
    (*_FIRST, "out_proj"),
    "head_dim",
)
_SEAMLESS = _WHISPER._replace(
    frames="cross_attention",
    frames_norm="cross_attention_layer_norm",
    first="ffn.fc1",
    activation="ffn.act",
    second="ffn.fc2",
    last_norm="ffn_layer_norm",
)
_CANARY = Names(
    "self_attn",
    "input_layernorm",
    "encoder_attn",
    "post_attention_layernorm",
    "mlp.fc1",
    "mlp.activation_fn",
    "mlp.fc2",
    "final_layernorm",
    (*_FIRST, "o_proj"),
    "head_dim",
)
_ROTARY = "MoonshineDecoderLayer", "MoonshineStreamingDecoderLayer"  # whose feed-forward blocks are gated too
_NAMES = {
    "WhisperDecoderLayer": _WHISPER,
    "Speech2TextDecoderLayer": _WHISPER,
    "SeamlessM4TDecoderLayer": _SEAMLESS,
    "SeamlessM4Tv2DecoderLayer": _SEAMLESS,
    "CanaryDecoderLayer": _CANARY,
    "CohereAsrDecoderLayer": _CANARY,
} | dict.fromkeys(_ROTARY, _CANARY)


def names_of(layer: Upstream) -> Names:
    return _NAMES[upstream_class(layer).__name__]


def decoder_layer(self: Upstream, hidden_states: Tensor, *others: Any, **kwargs: Any) -> Any:
    """Serves the layers in ``_NAMES``: hidden states (R, T, width), masks (R or 1, 1, T, K), the encoder's frames
    (R, K, width) and an ``EncoderDecoderCache`` -> (R, T, width)."""
    upstream = partial(type(self).forward, self)
    kept = _kept_frames(self, hidden_states, others, kwargs)
    if isinstance(kept, str):
        if kept:
            _left.note(self, kept)
        return upstream(hidden_states, *others, **kwargs)
    rotate = _rotate_of(self)
    step = STEPS.of(self, partial(_by_modules, upstream), names_of(self), rotate, rotate is not None)
    if step.reason:
        _left.note(self, step.why(self))
        return upstream(hidden_states, *others, **kwargs)
    x = hidden_states.contiguous()
    products = step.products(x)
    if products is None:
        return upstream(hidden_states, *others, **kwargs)
    q, *own = step.projections(products, x, kwargs.get("position_embeddings"))
    own = kwargs["cache"].self_attention_cache.update(*own, self.self_attn.layer_idx)
    return step.result(products, x, q, *own, *kept)[0]


def _by_modules(upstream: Any, x: Tensor, frames: Tensor, *positions: Any) -> Tensor:
    more = dict(zip(("position_embeddings",), positions, strict=False))
    y: Tensor = upstream(x, attention_mask=later(x)[None, None], encoder_hidden_states=frames, **more)
    return y[:, 1:]


def _rotate_of(layer: Upstream) -> Rotate | None:
    kind = upstream_class(layer)
    return sys.modules[kind.__module__].apply_rotary_pos_emb if kind.__name__ in _ROTARY else None


def _kept_frames(
    self: Upstream, hidden_states: Tensor, others: tuple, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | str:
    """Returns the frames' keys and values (B, H, K, d) in the cache and the masks of both attentions, each of B
    recordings with R / B hypotheses; or why the native calls cannot serve, "" for calls that are of another kind."""
    rows = len(hidden_states)
    is_token = hidden_states.shape[1:2] == (1,) and hidden_states.dtype is torch.float32
    if not is_token or self.training or len(others) > len(_ARGUMENTS):
        return ""
    given = dict(zip(_ARGUMENTS, others, strict=False)) | kwargs
    cache, frames, *masks = (given.pop(name, None) for name in ("cache", "encoder_hidden_states", *_MASKS))
    if upstream_class(self).__name__ in _ROTARY and given.pop("position_embeddings", None) is None:
        return ""
    index, held = self.self_attn.layer_idx, getattr(cache, "cross_attention_cache", None)
    if frames is None or held is None or not cache.is_updated.get(index):
        return ""
    weight = self.self_attn.q_proj.weight
    # before the masks, whose values torch.compile and vmap cannot read
    if not may_call(self, hidden_states, weight):
        note_declined(self, hidden_states, weight, "forward")
        return ""
    unread_ones = [n for n, value in given.items() if not (value is None or value is False or n in _UNREAD)]
    if unread_ones:
        return f"the call has {' and '.join(unread_ones)}"
    if rows > MOST_ROWS:
        return f"more than {MOST_ROWS} hypotheses"
    name = implementation(self.self_attn.config)
    if name not in STANDARD:
        return unread(False, name)
    tokens, of_frames = cache.self_attention_cache, held.layers[index]
    own: Any = tokens.layers[index] if index < len(tokens.layers) else None
    shared = isinstance(of_frames, SharedRows)
    dynamic = type(own).__name__ == "DynamicLayer" and (shared or type(of_frames).__name__ == "DynamicLayer")
    if not dynamic or type(tokens).__name__ != "DynamicCache" or tokens.offloading or held.offloading:
        return "the cache is not transformers' DynamicCache, or has no tokens, or is offloaded"
    keys, values = (
        map(of_frames.held.get, ("keys", "values")) if shared else (of_frames.keys, of_frames.values)
    )
    beams = of_frames.beams if shared else 1
    seen = own.get_seq_length() + 1, keys.shape[2]
    fits = len(keys) * beams == rows and keys.shape == values.shape
    if not fits or not all(map(_is_read, (own.keys, own.values, keys, values))):
        return "the cache has no float32 tensors of these hypotheses, or they want gradients"
    if not all(map(partial(_is_mask, name, rows), masks, seen)):
        return "the native calls do not compute what its attention does with a mask"
    return keys, values, *masks


def _is_read(t: Any) -> bool:
    """Says whether the native calls read this tensor: it is in float32 on the CPU, and wants no gradients."""
    plain = (
        type(t) is Tensor and t.dtype is torch.float32 and t.is_cpu and t.numel() > 0 and t.stride(-1) == 1
    )
    return plain and not (torch.is_grad_enabled() and t.requires_grad)


def _is_mask(implementation: str | None, rows: int, mask: Any, keys: int) -> bool:
    """Says whether the native calls do with a mask what this implementation of attention does. All but sdpa add the
    numbers of bools, and give NaN to a query that sees no key."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.shape not in ((rows, 1, 1, keys), (1, 1, 1, keys)):
        return False
    if implementation == "sdpa" and mask.dtype is torch.bool:
        return True
    return _is_read(mask) and (implementation == "sdpa" or bool((mask > -torch.inf).any(-1).all()))
