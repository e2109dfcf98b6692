# SPDX-License-Identifier: Apache-2.0
"""Attention of transformers' decoders to an encoder's frames, which beams share (``beams``), and their cache."""

import contextlib
import weakref
from typing import Any

from torch import Tensor

from fastasr.models.common.plain import any_watched
from fastasr.models.common.repeated_inputs import equal_rows
from fastasr.swap.forwards.beams import mask_of_queries, queries, rows, weights_of_rows
from fastasr.swap.forwards.common import may_read
from fastasr.swap.forwards.transformers_cache import shared_layer
from fastasr.swap.rule import Upstream

STATES = "key_value_states", "encoder_hidden_states"  # upstream's names of the encoder's frames
# The frames that `_repeats` saw last and what it found: all layers of a decoder get the same ones.
_seen: tuple[Any, int] = (lambda: None, 1)


def cross_attention(self: Upstream, hidden_states: Tensor, *others: Any, **kwargs: Any) -> Any:
    """Serves attention to an encoder in decoders of transformers: hidden states (R, T, width), and by name the
    encoder's frames (R, K, width), a mask (R or 1, 1, T or 1, K) and an ``EncoderDecoderCache`` -> upstream's results,
    (R, T, width) and weights (R, H, T, K) or None. If each of B recordings has the same number of equal rows, the
    cache's layer gets ``SharedRows``, B of them."""
    upstream = type(self).forward
    cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
    name = next((name for name in STATES if kwargs.get(name) is not None), None)
    held = getattr(cache, "cross_attention_cache", None)
    if held is None or name is None or others:
        return upstream(self, hidden_states, *others, **kwargs)
    states, mask, index = kwargs[name], kwargs.get("attention_mask"), self.layer_idx
    first = not cache.is_updated.get(index)
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        beams = 1
    elif first:
        beams = _repeats(self, states) if len(states) > 1 and _is_new(self, held) else 1
    else:
        beams = getattr(held.layers[index], "beams", 1)
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


def _is_new(module: Upstream, held: Any) -> bool:
    """Says whether the cache grows by need, keeps its tensors where the model is, and will hold this module's first
    keys; and whether the module draws no dropout, and nobody watches what it projects."""
    index = module.layer_idx
    kind = type(held.layers[index]) if index < len(held.layers) else held.layer_class_to_replicate
    plain = kind is not None and kind.__name__ == "DynamicLayer" and not held.offloading
    return plain and not module.training and not any_watched((module.k_proj, module.v_proj, module.q_proj))


def _repeats(module: Upstream, states: Tensor) -> int:
    """Returns how many equal rows each recording has."""
    global _seen
    ref, found = _seen
    if ref() is not states or module.layer_idx == 0:
        found = equal_rows(states) if may_read(states) else 1
        _seen = weakref.ref(states), found
    return found
