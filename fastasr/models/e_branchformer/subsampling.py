# SPDX-License-Identifier: Apache-2.0
"""The input layer: two-dimensional convolutions that shorten the sequence, and a projection."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastasr.models.common.convolutions import in_sequence, projected
from fastasr.models.common.plain import is_plain

# ESPnet's name of an input layer -> (kernel size, stride) of each of its convolutions.
CONVOLUTIONS: dict[str, tuple[tuple[int, int], ...]] = {
    "conv2d": ((3, 2), (3, 2)),
    "conv2d1": ((3, 1), (3, 1)),
    "conv2d2": ((3, 2), (3, 1)),
    "conv2d6": ((3, 2), (5, 3)),
    "conv2d8": ((3, 2), (3, 2), (3, 2)),
}


class Conv2dSubsampling(torch.nn.Module):
    """x (B, T, idim), mask (B, 1, T) or None -> (out, mask (B, 1, T')).

    out is what ``pos_enc`` returns for the projected frames (B, T', odim).
    """

    def __init__(
        self,
        idim: int,
        odim: int,
        pos_enc: torch.nn.Module,
        convolutions: tuple[tuple[int, int], ...] = CONVOLUTIONS["conv2d"],
    ) -> None:
        super().__init__()
        self.shape = tuple(convolutions)
        steps: list[torch.nn.Module] = []
        channels, width = 1, idim
        for kernel, stride in convolutions:
            steps += [torch.nn.Conv2d(channels, odim, kernel, stride), torch.nn.ReLU()]
            channels, width = odim, (width - kernel) // stride + 1
        if width < 1:
            raise ValueError(
                f"Conv2dSubsampling: idim: expected more features than the kernels span, got {idim}"
            )
        self.conv = torch.nn.Sequential(*steps)
        self.out = torch.nn.Sequential(torch.nn.Linear(odim * width, odim), pos_enc)

    def shortest(self) -> int:
        """Returns the smallest number of input frames that gives an output frame."""
        frames = 1
        for kernel, stride in reversed(self.shape):
            frames = (frames - 1) * stride + kernel
        return frames

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Any, Tensor | None]:
        if x.shape[1] < self.shortest():
            raise ValueError(
                f"Conv2dSubsampling: x: expected at least {self.shortest()} frames, got {x.shape[1]}"
            )
        return subsampled(self, self.shape, x, mask)


def subsampled(
    front: Any, shape: Iterable[tuple[int, int]], x: Tensor, mask: Tensor | None
) -> tuple[Any, Tensor | None]:
    """Returns the output of an input layer whose convolutions have these kernel sizes and strides."""
    y = _positioned(front.out, in_sequence(front.conv, x.unsqueeze(1)))
    if mask is not None:
        for kernel, stride in shape:
            mask = mask[:, :, : 1 - kernel : stride]
    return y, mask


def _positioned(out: torch.nn.Module, x: Tensor) -> Any:
    """Returns the output for maps (batch, channels, time, frequency), whose frames ``out`` projects first."""
    if not is_plain(out, torch.nn.Sequential) or not len(out):
        return projected(out, x)
    first, *rest = out
    y = projected(first, x)
    for module in rest:
        y = module(y)
    return y
