# SPDX-License-Identifier: Apache-2.0
"""The merge of the two branches: y = W (c + depthwise_conv(c)) + b, c = (x1, x2)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common import plumbing

if TYPE_CHECKING:
    from fastasr.models.e_branchformer.layer import EBranchformerLayer


class Merge(torch.nn.Module):
    """x1 (B, T, in_dim1), x2 (B, T, in_dim2) -> (B, T, out_dim)."""

    depthwise_conv_fusion: torch.nn.Conv1d
    merge_proj: torch.nn.Linear

    def __init__(self, *, in_dim1: int, in_dim2: int, out_dim: int, merge_conv_kernel: int = 3) -> None:
        super().__init__()
        add_to(self, in_dim1 + in_dim2, out_dim, merge_conv_kernel)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return merge(self, x1, x2)


def add_to(module: "Merge | EBranchformerLayer", width: int, out_dim: int, kernel_size: int) -> None:
    """Adds the submodules that :func:`merge` uses to ``module``, as ESPnet's layer has them."""
    if kernel_size % 2 == 0:
        raise ValueError(f"Merge: merge_conv_kernel: expected an odd number, got {kernel_size}")
    module.depthwise_conv_fusion = torch.nn.Conv1d(
        width, width, kernel_size, padding=(kernel_size - 1) // 2, groups=width
    )
    module.merge_proj = torch.nn.Linear(width, out_dim)


def merge(
    module: "Merge | EBranchformerLayer", x1: Tensor, x2: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """Returns y. Where ``hidden`` (B, T) is True, frames count as 0; then the convolution must be torch's own."""
    both, conv = torch.cat([x1, x2], dim=-1), module.depthwise_conv_fusion
    if plumbing.is_depthwise_conv(conv):
        both = ops.depthwise_conv_residual(both, conv.weight, conv.bias, padding_mask=hidden)
    else:
        both = both + conv(both.transpose(1, 2)).transpose(1, 2)
    return plumbing.linear(module.merge_proj, both)
