# SPDX-License-Identifier: Apache-2.0
"""The penalty and equal weights of zipformer_attention are those of the weights in memory."""

import pytest
import torch
from torch import Tensor

from fastasr import backend
from fastasr.ops import _decided, zipformer_attention, zipformer_attention_weights

HEADS, DIM, POS_DIM, VALUE_DIM, FRAMES = 2, 4, 3, 3, 20
PENALTY = {"score_penalty": 0.3, "score_limit": 2.0}
MASKS = {
    "chunks, padding": lambda: {"chunk_size": 6, "key_padding_mask": torch.rand(2, FRAMES) < 0.3},
    "mask": lambda: {"attn_mask": torch.rand(FRAMES, FRAMES) < 0.4},
    "recordings": lambda: {"starts": torch.tensor([0, 9, 13, FRAMES])},
    "recordings, chunks": lambda: {"starts": torch.tensor([0, 9, 13, FRAMES]), "chunk_size": 3},
}


def _number(value: float | None) -> Tensor | None:
    return None if value is None else torch.tensor([value])


def _of_first_heads(x: Tensor, pos: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    sizes = DIM, DIM, POS_DIM
    parts = x.split([HEADS * size for size in sizes], -1)
    x = torch.cat([part[..., : heads * size] for part, size in zip(parts, sizes, strict=True)], -1)
    return x, pos[..., : heads * POS_DIM]


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("equal", [None, 0.0, 1.0])
@pytest.mark.parametrize("act", [None, 0.0, 1.0])
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("device_backend", ["eager", "cpu"])
def test_as_with_weights_in_memory(device_backend, heads, act, equal, masks):
    given = MASKS[masks]()
    double = {"dtype": torch.float64, "requires_grad": True}
    x = torch.randn(FRAMES, 2, HEADS * (2 * DIM + POS_DIM), **double)
    reach = 9 if "starts" in given else FRAMES
    pos = torch.randn(1, 2 * reach - 1, HEADS * POS_DIM, **double)
    value = torch.randn(FRAMES, 2, heads * VALUE_DIM, **double)
    numbers = {"act": _number(act), "equal": _number(equal)}
    with backend(device_backend):
        found = zipformer_attention(
            x, pos, value, HEADS, DIM, value_heads=heads, **given, **PENALTY, **numbers
        )

    penalty = PENALTY if act != 0 else {}
    with backend("eager"):
        weights = zipformer_attention_weights(*_of_first_heads(x, pos, heads), heads, DIM, **given, **penalty)
        if equal:  # a part of 0 brings the penalty
            weights = _decided.either(weights.detach(), torch.ones(1)) + 0 * weights
    by_head = value.reshape(FRAMES, 2, heads, VALUE_DIM).permute(2, 1, 0, 3)
    expected = (weights @ by_head).permute(2, 1, 0, 3).flatten(2)
    grad, leaves = torch.randn_like(expected), (x, pos, value)
    with backend(device_backend):
        gradients = torch.autograd.grad(found, leaves, grad)
    torch.testing.assert_close(
        (found, *gradients), (expected, *torch.autograd.grad(expected, leaves, grad)), rtol=1e-10, atol=1e-10
    )
