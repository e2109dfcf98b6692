# SPDX-License-Identifier: Apache-2.0
"""Attention weights of packed frames: those of each group of recordings apart, as tensors or unmaterialised."""

import torch

from fastasr.models.common.ragged import current
from fastasr.models.zipformer.self_attention import weighted
from fastasr.ops import nonlin_attention


class PackedWeights:
    """``parts`` are the weights (heads, G, T, T) of each group of recordings of the packing, which see themselves."""

    def __init__(self, packing, parts):
        self.packing, self.parts = packing, parts

    @property
    def shape(self):
        frames = sum(self.packing.lengths)
        return torch.Size((len(self), 1, frames, frames))

    def __len__(self):
        return len(self.parts[0])

    def __getitem__(self, index):
        return PackedWeights(self.packing, [part[index] for part in self.parts])

    def weighted(self, values):
        """values (N, 1, heads * dim) -> their weighted sums, same shape."""
        values = (v.transpose(0, 1) for v in self.packing.stacked(values[:, 0]))
        sums = (weighted(part, v).transpose(0, 1) for part, v in zip(self.parts, values, strict=True))
        return self.packing.unstacked(sums).unsqueeze(1)

    @property
    def in_memory(self):
        return all(isinstance(part, torch.Tensor) for part in self.parts)

    def gated(self, projected):
        """projected (N, 1, 3 channels) -> what ``ops.nonlin_attention`` makes of it with the first head's weights."""
        values = (p.transpose(0, 1) for p in self.packing.stacked(projected[:, 0]))
        parts = zip(self.parts, values, strict=True)
        return self.packing.unstacked(
            nonlin_attention(part[0], p).transpose(0, 1) for part, p in parts
        ).unsqueeze(1)

    def constant(self):
        """Returns equal weights on all sources whose weight is not 0."""
        return PackedWeights(self.packing, [constant_weights(part) for part in self.parts])


def constant_weights(weights):
    """Replaces the weights by equal weights on all sources whose weight is not 0."""
    if not isinstance(weights, torch.Tensor):
        return weights.constant()
    weights = (weights > 0.0).to(weights.dtype)
    return weights * (1.0 / weights.sum(dim=-1, keepdim=True))


def of_recordings(function, projected, positions, masks):
    """Returns ``function(projected (T, B, C), positions, **masks)``, for packed frames (N, 1, C) as PackedWeights."""
    packing = current()
    if packing is None:
        return function(projected, positions, **masks)
    parts = []
    for group, part in zip(packing.groups, packing.stacked(projected[:, 0]), strict=True):
        rows = positions
        if positions is not None:
            first = positions.shape[1] // 2 + 1 - group.longest
            rows = positions[:, first : first + 2 * group.longest - 1]
        parts.append(function(part.transpose(0, 1), rows, **{**masks, "key_padding_mask": group.hidden}))
    return PackedWeights(packing, parts)
