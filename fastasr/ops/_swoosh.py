# SPDX-License-Identifier: Apache-2.0
"""The Swoosh activations in eager PyTorch, and the kernels that all ops with a Swoosh share."""

import torch
from torch import Tensor

from fastasr.ops._dispatch import native_kernels, triton_kernels
from fastasr.ops._linear import LateFamily

FAMILY = LateFamily("swoosh", ("swoosh_linear",), (native_kernels("swoosh"), triton_kernels("swoosh")))

KINDS = {"SwooshL": False, "SwooshR": True}  # the flag that the kernels take: true for SwooshR
SHIFT = {"SwooshL": 4.0, "SwooshR": 1.0}
OFFSET = {"SwooshL": 0.035, "SwooshR": 0.313261687}


def definition(x: Tensor, kind: str) -> Tensor:
    """Computes the formula in eager PyTorch; ``kind`` is SwooshL or SwooshR."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.logaddexp(zero, x - SHIFT[kind]) - 0.08 * x - OFFSET[kind]
