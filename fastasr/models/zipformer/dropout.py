# SPDX-License-Identifier: Apache-2.0
"""Dropout with a rate that is a number or a schedule."""

import torch
from torch import Tensor

from fastasr.models.common.ragged import current
from fastasr.models.zipformer.decisions import is_zero, keep_rates
from fastasr.models.zipformer.schedules import FloatLike


class Dropout2(torch.nn.Module):
    """Elementwise dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, p=float(self.p), training=self.training)


class Dropout3(torch.nn.Module):
    """Dropout whose mask has size 1 along ``shared_dim``; only the mask is kept for the backward pass. On packed frames
    (1, N, C) or (N, 1, C) it shares the mask within each recording."""

    def __init__(self, p: FloatLike, shared_dim: int) -> None:
        super().__init__()
        self.p = p
        self.shared_dim = shared_dim

    def forward(self, x: Tensor) -> Tensor:
        p, scale = keep_rates(self.p)
        if not self.training or is_zero(p):
            return x
        shape, packing = list(x.shape), current()
        shape[self.shared_dim] = 1
        if packing is not None:
            shape[1 - self.shared_dim] = packing.count
        kept = torch.rand(*shape, device=x.device) > p
        if packing is not None:
            kept = packing.repeated(kept.squeeze(self.shared_dim)).unsqueeze(1 - self.shared_dim)
        return x * kept * scale
