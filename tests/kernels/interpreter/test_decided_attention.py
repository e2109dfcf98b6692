# SPDX-License-Identifier: Apache-2.0
"""zipformer_attention with numbers on the device: what they say, and how much memory a row of recordings takes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastasr import backend
from fastasr.ops import zipformer_attention

HEADS, DIM, POS_DIM, VALUE_DIM = 2, 8, 4, 4
PENALTY = {"score_penalty": 0.5, "score_limit": 1.0}


def gradients(frames, longest, dtype=torch.float32, **options):
    torch.manual_seed(0)
    x = torch.randn(frames, 1, HEADS * (2 * DIM + POS_DIM), dtype=dtype, requires_grad=True)
    pos = torch.randn(1, 2 * longest - 1, HEADS * POS_DIM, dtype=dtype, requires_grad=True)
    value = torch.randn(frames, 1, HEADS * VALUE_DIM, dtype=dtype, requires_grad=True)
    with backend("triton"):
        y = zipformer_attention(x, pos, value, HEADS, DIM, **options)
        return y, *torch.autograd.grad(y, (x, pos, value), torch.randn_like(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masks", [{}, {"starts": torch.tensor([3, 20, 47])}, {"chunk_size": 8}])
def test_a_number_of_zero_changes_no_bit(small_blocks, masks, dtype):
    plain = gradients(50, 50, dtype, **masks)
    for number in (torch.zeros(1), torch.tensor(False)):
        found = gradients(50, 50, dtype, **masks, **PENALTY, act=number, equal=number)
        assert all(map(torch.equal, found, plain))
    penalised = gradients(50, 50, dtype, **masks, **PENALTY)
    assert torch.equal(penalised[0], plain[0])
    assert not torch.equal(penalised[1], plain[1])
    for number in (torch.ones(1), torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor(True)):
        assert all(map(torch.equal, gradients(50, 50, dtype, **masks, **PENALTY, act=number), penalised))
    equal = gradients(50, 50, dtype, **masks, equal=torch.ones(1))
    assert not torch.equal(equal[0], plain[0])
    assert not equal[1].any()
    assert not equal[2].any()


class _Largest(TorchDispatchMode):
    """Keeps the number of bytes of the largest tensor that an operation returned."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        sizes = (t.nbytes for t in tree_leaves(found) if isinstance(t, torch.Tensor))
        self.size = max(self.size, *sizes, 0)
        return found


def test_a_row_needs_no_memory_of_time_by_time():
    frames, longest = 400, 10
    number = torch.ones(1)
    row = {"starts": torch.arange(0, frames + 1, longest)}
    with _Largest() as seen:
        gradients(frames, longest, **row, **PENALTY, act=number, equal=number)
    assert seen.size < frames * frames * torch.float32.itemsize, seen.size
