# SPDX-License-Identifier: Apache-2.0
"""zipformer_attention with numbers on the device: what they say, and how much memory a row of recordings takes."""

import pytest
import torch
from largest import Largest

from fastasr import backend
from fastasr.models.zipformer.unmaterialised import UnmaterialisedWeights, collected
from fastasr.ops import zipformer_attention
from fastasr.ops.zipformer_attention import position_sums

HEADS, DIM, POS_DIM, VALUE_DIM = 2, 8, 4, 4
FRAMES = 36  # three blocks
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
@pytest.mark.parametrize("masks", [{}, {"starts": torch.tensor([3, 20, 33])}, {"chunk_size": 8}])
def test_a_number_of_zero_changes_no_bit(small_blocks, masks, dtype):
    plain = gradients(FRAMES, FRAMES, dtype, **masks)
    for number in (torch.zeros(1), torch.tensor(False)):
        found = gradients(FRAMES, FRAMES, dtype, **masks, **PENALTY, act=number, equal=number)
        assert all(map(torch.equal, found, plain))
    penalised = gradients(FRAMES, FRAMES, dtype, **masks, **PENALTY)
    assert torch.equal(penalised[0], plain[0])
    assert not torch.equal(penalised[1], plain[1])
    for number in (torch.ones(1), torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor(True)):
        assert all(
            map(torch.equal, gradients(FRAMES, FRAMES, dtype, **masks, **PENALTY, act=number), penalised)
        )
    equal = gradients(FRAMES, FRAMES, dtype, **masks, equal=torch.ones(1))
    assert not torch.equal(equal[0], plain[0])
    assert not equal[1].any()
    assert not equal[2].any()


def test_a_row_needs_no_memory_of_time_by_time():
    frames, longest = 400, 10
    number = torch.ones(1)
    row = {"starts": torch.arange(0, frames + 1, longest)}
    with Largest() as largest:
        gradients(frames, longest, **row, **PENALTY, act=number, equal=number)
    assert largest.nbytes < frames * frames * torch.float32.itemsize, largest.nbytes


@pytest.mark.parametrize("autocast", [False, True])
def test_consumers_of_recorded_passes_share_a_table_of_positions(small_blocks, autocast):
    """Their values, and the gradients of projection and values, are the op's to the bit."""
    leaves = torch.randn(50, 1, HEADS * (2 * DIM + POS_DIM)), torch.randn(1, 39, HEADS * POS_DIM)
    leaves = *leaves, torch.randn(50, 1, HEADS * VALUE_DIM), torch.randn(50, 1, VALUE_DIM)
    masks = {"starts": torch.tensor([3, 20, 40])}

    def found(together):
        x, pos, *values = (t.clone().requires_grad_() for t in leaves)
        with backend("triton"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sums = position_sums(x) if together else None
            positions = collected(pos, sums, 1)[0] if together else pos
            weights = UnmaterialisedWeights(x, positions, HEADS, DIM, sums=sums, **masks)
            results = [w.weighted(v) for w, v in zip((weights, weights[0:1]), values, strict=True)]
            return *results, *torch.autograd.grad(results, (x, pos, *values), [y.sign() for y in results])

    ours, plain = found(True), found(False)
    for number, (a, b) in enumerate(zip(ours, plain, strict=True)):
        if number == 3:  # dpos
            torch.testing.assert_close(a, b, rtol=2e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)
        else:
            assert torch.equal(a, b), number
