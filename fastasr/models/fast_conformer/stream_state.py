# SPDX-License-Identifier: Apache-2.0
"""The caches of Nemotron's streams as tensors: a chunk is then a function of tensors, whose calls can be recorded.

A recorded chunk takes and returns three things: keys and values of all layers as one tensor, the last frames before all
convolution modules as one, and those before each convolution of the front end. After the call transformers' cache holds
views of the keys and values that it returned, so that the next chunk of the same streams takes them as they are.
"""

import operator
from typing import Any

import torch
from torch import Tensor

from fastasr.models.fast_conformer import nemotron


def chunk(
    self: Any, x: Tensor, name: str, keys_values: Tensor, last_frames: Tensor, front_frames: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Computes the next frames of streams that see each other and all that is cached.

    self: NemotronAsrStreamingEncoder. x: features (B, T₀, mel_bins). name: that of the layers' argument for keys and
    values. keys_values (2 layers, B, H, N, d). last_frames
    (layers, B, width, K − 1). front_frames: tensors (B, C, n, F). Returns (frames (B, T, width), and the three after
    this chunk).
    """
    keys = _Keys(keys_values, self.config.sliding_window - 1)
    paddings = _Paddings(_convolutions(self), [*last_frames, *front_frames])
    x = self.subsampling(x, padding_cache=paddings)
    x *= self.input_scale
    embeddings = self.encode_positions(x, cached_frames=keys_values.shape[3])
    for layer in self.layers:
        x = layer(x, position_embeddings=embeddings, padding_cache=paddings, use_cache=True, **{name: keys})
    found = [layer.cache for layer in paddings.layers.values()]
    count = len(self.layers)
    return x, torch.stack(keys.kept), torch.stack(found[:count]), found[count:]


def next_chunk(self: Any, graphs: Any, x: Tensor, name: str, cache: Any, padding_cache: Any) -> Tensor | None:
    """Returns the next frames of streams by a recorded ``chunk``, and brings transformers' caches up to date; or None
    if the caches' tensors differ in shape, or hold no chunk yet."""
    kept: list[Any] = [nemotron.window_layer(cache, i) for i in range(len(self.layers))]
    paddings = [padding_cache.layers.get(conv.cache_key) for conv in _convolutions(self)]
    if None in kept or None in paddings or any(getattr(p, "is_first_chunk", False) for p in paddings):
        return None
    held = [t for layer in kept for t in (layer.keys, layer.values)]
    frames = [padding.cache for padding in paddings]
    lasts, fronts = frames[: len(kept)], frames[len(kept) :]
    packed, views = getattr(cache, "_fastasr_packed", (None, ()))
    if len(views) != len(held) or not all(map(operator.is_, views, held)):
        if not _alike(held):
            return None
        packed = torch.stack(held)
    if not _alike(lasts):
        return None
    y, packed, lasts, fronts = graphs(self, x, name, packed, torch.stack(lasts), fronts)
    views = packed.unbind()
    for layer, keys, values in zip(kept, views[::2], views[1::2], strict=True):
        layer.keys, layer.values = keys, values
        layer.cumulative_length += y.shape[1]
    torch._foreach_copy_(frames, [*lasts.unbind(), *fronts])  # upstream writes these in place
    cache._fastasr_packed = packed, views
    return y


def _convolutions(encoder: Any) -> list[Any]:
    """Returns the convolutions that keep frames: those of the layers, then those of the front end."""
    layers = [layer.conv.depthwise_conv for layer in encoder.layers]
    return [*layers, *nemotron.front_convolutions(encoder.subsampling)]


def _alike(tensors: list[Tensor]) -> bool:
    first = tensors[0]
    return all(t.shape == first.shape and t.dtype is first.dtype for t in tensors)


class _Keys:
    """Stands for transformers' cache of keys and values. ``kept``: keys and values after this chunk."""

    layers: tuple[Any, ...] = ()
    offloading = False

    def __init__(self, keys_values: Tensor, most: int) -> None:
        self.held, self.most = keys_values, most
        self.kept: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, index: int, **_: Any) -> list[Tensor]:
        found = [torch.cat((self.held[2 * index + i], t), -2) for i, t in enumerate((keys, values))]
        self.kept += [t[:, :, max(0, t.shape[2] - self.most) :] for t in found]
        return found


class _Padding:
    def __init__(self, cache: Tensor) -> None:
        self.cache = cache


class _Paddings:
    """Stands for transformers' cache of the frames before convolutions. A chunk does not change their number."""

    def __init__(self, convolutions: list[Any], frames: list[Tensor]) -> None:
        self.layers = {conv.cache_key: _Padding(t) for conv, t in zip(convolutions, frames, strict=True)}

    def update(self, x: Tensor, key: str, conv: torch.nn.Module) -> Tensor:
        kept = self.layers[key]
        found = torch.cat((kept.cache, x), 2)
        kept.cache = found[:, :, found.shape[2] - kept.cache.shape[2] :]
        return found
