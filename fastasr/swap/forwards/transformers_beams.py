# SPDX-License-Identifier: Apache-2.0
"""Attention of transformers' decoders to an encoder's frames, which beams share (``beams``), and their cache."""

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor

from fastasr._transforms import is_transformed
from fastasr.models.common.plain import any_watched
from fastasr.models.common.repeated_inputs import equal_rows
from fastasr.models.fast_conformer.attention import STANDARD
from fastasr.models.fast_conformer.masks import implementation
from fastasr.swap.forwards.beams import mask_of_queries, queries, rows, weights_of_rows
from fastasr.swap.forwards.common import may_read
from fastasr.swap.forwards.transformers_cache import beams_of, shared_layer
from fastasr.swap.rule import Upstream

STATES = "key_value_states", "encoder_hidden_states"  # upstream's names of the encoder's frames
# The frames that `_repeats` saw last, in which layer, and what it found: all layers of a decoder get the same ones.
_seen: tuple[Any, int, int] = (lambda: None, 0, 1)


def cross_attention(self: Upstream, hidden_states: Tensor, *others: Any, **kwargs: Any) -> Any:
    """Serves attention to an encoder in decoders of transformers: hidden states (R, T, width), and by name the
    encoder's frames (R, K, width), a mask (R or 1, 1, T or 1, K) and an ``EncoderDecoderCache`` -> upstream's results,
    (R, T, width) and weights (R, H, T, K) or None. If each of B recordings has the same number of equal rows, the
    cache's layer gets ``SharedRows``, B of them."""
    upstream = type(self).forward
    cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
    name = next((name for name in STATES if kwargs.get(name) is not None), None)
    held = getattr(cache, "cross_attention_cache", None)
    if held is None or name is None or others or not _is_plain(self):
        return upstream(self, hidden_states, *others, **kwargs)
    states, mask, index = kwargs[name], kwargs.get("attention_mask"), self.layer_idx
    first = not cache.is_updated.get(index)
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        beams = 1
    elif first:
        beams = _repeats(self, states) if _is_new(held, index) and _may_share(states, hidden_states) else 1
    else:
        beams = beams_of(held.layers[index], len(hidden_states))
    if beams == 1:
        return upstream(self, hidden_states, **kwargs)
    given = kwargs | {
        name: states[::beams],
        "attention_mask": mask_of_queries(mask, beams, hidden_states.shape[1]),
    }
    with contextlib.nullcontext() if first else held.layers[index].shared():
        y, weights, *more = upstream(self, queries(hidden_states, beams), **given)
    if first:
        held.layers[index] = shared_layer(held.layers[index], beams)
    return rows(y, beams), None if weights is None else weights_of_rows(weights, beams), *more


def _is_plain(module: Upstream) -> bool:
    """Says whether the module draws no dropout, nobody watches what it projects, and the function that computes its
    attention is transformers' own."""
    return (
        not module.training
        and not any_watched(module.children())
        and implementation(module.config) in STANDARD
    )


def _is_new(held: Any, index: int) -> bool:
    """Says whether the cache grows by need, keeps its tensors where the model is, and has no keys of this layer yet."""
    layer = held.layers[index] if index < len(held.layers) else None
    kind = held.layer_class_to_replicate if layer is None else type(layer)
    plain = kind is not None and kind.__name__ == "DynamicLayer" and not held.offloading
    return plain and (layer is None or layer.get_seq_length() == 0)


def _may_share(states: Tensor, hidden_states: Tensor) -> bool:
    """Says whether the decoder has a row for each row of the frames, several, and these get no gradients of their own
    and have no tangents."""
    differentiated = (torch.is_grad_enabled() and states.requires_grad) or is_transformed()
    return len(states) == len(hidden_states) > 1 and not differentiated


def _repeats(module: Upstream, states: Tensor) -> int:
    """Returns how many equal rows each recording has."""
    global _seen
    ref, index, found = _seen
    if ref() is not states or module.layer_idx <= index:
        found = equal_rows(states) if may_read(states) else 1
    _seen = weakref.ref(states), module.layer_idx, found
    return found
