# SPDX-License-Identifier: Apache-2.0
"""Attention of decoders to an encoder's frames, which the beams of one recording share.

A search gives a decoder every recording n times. Upstream projects its frames to keys and values n times and reads n
copies of them, at every step; most decoders project them anew at every step too. But n beams of T tokens are n T
queries of one recording: upstream's own forward computes them with one copy, because attention to an encoder knows no
positions of queries.
"""

from functools import partial
from typing import Any

from torch import Tensor

from fastasr._recording import is_traced, storage_of
from fastasr._transforms import is_transformed
from fastasr.models.common import repeated_inputs
from fastasr.models.common.plain import any_watched
from fastasr.swap.rule import Upstream

# The layers that project keys and values in ESPnet, NeMo and FireRedASR
_PROJECTIONS = ("linear_k", "linear_v"), ("key_net", "value_net"), ("w_ks", "w_vs")


def queries(x: Tensor, beams: int) -> Tensor:
    """Returns x (B n, T, width) as (B, n T, width)."""
    return x.unflatten(0, (-1, beams)).flatten(1, 2)


def rows(y: Tensor, beams: int) -> Tensor:
    """Returns y (B, n T, width) as (B n, T, width)."""
    return y.unflatten(1, (beams, -1)).flatten(0, 1)


def weights_of_rows(weights: Tensor, beams: int) -> Tensor:
    """Returns weights (B, H, n T, K) as (B n, H, T, K)."""
    return weights.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)


def mask_of_queries(mask: Tensor | None, beams: int, tokens: int) -> Tensor | None:
    """Returns the mask of (B, …, n T, K) for one of (B n or 1, …, T or 1, K), of three dimensions or four."""
    if mask is None or mask.shape[0] == mask.shape[-2] == 1:
        return mask
    if mask.dim() == 3:
        found = mask_of_queries(mask.unsqueeze(1), beams, tokens)
        return None if found is None else found.squeeze(1)
    mask = mask.expand(-1, -1, tokens, -1)
    if mask.shape[0] == 1:
        return mask.repeat(1, 1, beams, 1)
    return mask.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)


def attention_to_frames(
    self: Upstream, query: Tensor, key: Tensor, value: Tensor, *others: Any, **kwargs: Any
) -> Any:
    """Serves decoders whose searches project an encoder's frames at every step: query (R, T, width), key, which is
    value, (R, K, width), and a mask (R or 1, T or 1, K) of ESPnet and FireRedASR, or (R or 1, 1, T or 1, K) of NeMo ->
    upstream's results. Projections are kept as long as the frames exist."""
    upstream = type(self).forward
    if key is not value or keeps_copies(self, query, key):
        return upstream(self, query, key, value, *others, **kwargs)
    names = next(names for names in _PROJECTIONS if hasattr(self, names[0]))
    beams, key = repeated_inputs.without_copies(self, key)
    if beams > 1:
        change = partial(mask_of_queries, beams=beams, tokens=query.shape[1])
        others = (change(others[0]), *others[1:]) if others else others
        kwargs = {name: change(given) if "mask" in name else given for name, given in kwargs.items()}
        query = queries(query, beams)
    with repeated_inputs.kept(*(getattr(self, name) for name in names)):
        found = upstream(self, query, key, key, *others, **kwargs)
    if beams == 1:
        return found
    if isinstance(getattr(self, "attn", None), Tensor):  # ESPnet's weights of the last call
        self.attn = weights_of_rows(self.attn, beams)
    if isinstance(found, Tensor):
        return rows(found, beams)
    y, more = found  # NeMo's
    return rows(y, beams), {name: weights_of_rows(weights, beams) for name, weights in more.items()}


def keeps_copies(module: Upstream, query: Tensor, key: Tensor) -> bool:
    """Says whether upstream's code gets the arguments as they are. A decoder's attention to its own tokens gets its
    last token as a part of the key."""
    fixed = is_traced() or is_transformed() or module.training or getattr(module, "use_flash_attn", False)
    return bool(fixed or any_watched(module.children()) or storage_of(query) == storage_of(key))
