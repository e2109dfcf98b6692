# SPDX-License-Identifier: Apache-2.0
"""What rounding to 16 bits takes from the result of an attention, which Triton's kernels keep for the backward pass."""

import torch


def remainder_shape(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Returns the shape of what kernels of ``backend`` keep of a result of this shape: none in float32, where the
    backward pass sums over the keys, and none by C++ kernels."""
    return shape if backend == "triton" and dtype != torch.float32 else (0,)
