# SPDX-License-Identifier: Apache-2.0
"""The largest tensor that a call makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Records the most elements, and the most bytes, of a tensor that an operation returns."""

    elements = nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements, self.nbytes = max(self.elements, t.numel()), max(self.nbytes, t.nbytes)
        return out
