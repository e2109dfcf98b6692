# SPDX-License-Identifier: Apache-2.0
"""Cross entropy with label smoothing.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class LabelSmoothingLoss(torch.nn.Module):
    """x (batch, length, classes), target (batch, length) -> the loss: (batch * length,) for ``none``, else a scalar.

    The target's class gets the probability 1 - label_smoothing + label_smoothing / classes, every other class
    label_smoothing / classes. Positions whose target is ``ignore_index`` add nothing; ``mean`` is over the others.
    """

    def __init__(self, ignore_index: int = -1, label_smoothing: float = 0.1, reduction: str = "sum") -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"LabelSmoothingLoss: label_smoothing must be in [0, 1), got {label_smoothing}")
        if reduction not in ("none", "sum", "mean"):
            raise ValueError(f"LabelSmoothingLoss: reduction must be none, sum or mean, got {reduction!r}")
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[:2] != target.shape:
            raise ValueError(
                f"LabelSmoothingLoss: expected x (batch, length, classes) and target (batch, length), got shapes "
                f"{tuple(x.shape)} and {tuple(target.shape)}"
            )
        return F.cross_entropy(
            x.flatten(0, 1),
            target.flatten(),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
