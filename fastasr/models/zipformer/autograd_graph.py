# SPDX-License-Identifier: Apache-2.0
"""Finds out whether modules that act on gradients alone have changed anything on a call."""

import torch
from torch import Tensor

from fastasr._transforms import is_transformed

_VIEWS = {"AliasBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0", "ViewBackward0"}


def is_same(part: Tensor, original: Tensor) -> bool:
    """Says whether ``part`` has the memory of ``original`` and no autograd node between them changes the gradient."""
    if part is original:
        return True
    if torch.compiler.is_compiling() or is_transformed():
        return False
    if type(part) is not Tensor or type(original) is not Tensor:
        return False
    if _place(part) != _place(original):
        return False
    node = part.grad_fn
    while node is not original.grad_fn:
        if node is None or node.name() not in _VIEWS:
            return False
        node = node.next_functions[0][0]
    return True


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
