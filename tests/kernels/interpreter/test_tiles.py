# SPDX-License-Identifier: Apache-2.0
"""The tiles of a GPU, which samples that run with small blocks do not reach, give the formula's results."""

import pytest
import torch

from fastasr import ops
from fastasr.kernels import rel_attention


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize(
    ("dim", "hiding", "recordings"),
    [
        (48, False, False),
        (48, True, False),
        (72, False, False),
        (128, True, False),
        (128, False, True),
        (136, False, False),
        (48, False, True),
    ],
)
def test_rel_attention(monkeypatch, generation, dim, hiding, recordings):
    """Kernels take blocks of 64 or 128 channels of wide heads, and tiles by the width, masks and generation."""
    monkeypatch.setattr(rel_attention, "generation", lambda t: generation)
    frames, heads = 70, 1
    q, k, v, g = (torch.randn(1, frames, heads, dim, dtype=torch.bfloat16) for _ in range(4))
    pos = torch.randn(2 * frames - 1, heads, dim, dtype=torch.bfloat16)
    u, w = torch.randn(2, heads, dim, dtype=torch.bfloat16)
    arguments = tuple(t.contiguous() for t in (q, k, v, pos, u, w))
    mask, no_bias = torch.rand(frames, frames) < 0.3 if hiding else None, (None,) * 3
    starts = torch.tensor([0, 9, 52, 66]) if recordings else None
    options = 0.0, -1, -1, 1, 0.0, -1, -1
    hidden = None, mask, starts, None
    kept = rel_attention.rel_attention_forward(*arguments, *no_bias, *hidden, *options, True)
    saved = *hidden, *kept, *options
    found = kept[0], *rel_attention.rel_attention_backward(g, *arguments, *no_bias, *saved)[:6]
    leaves = [t.float().requires_grad_() for t in arguments]
    expected = ops.rel_attention.definition(*leaves, attn_mask=mask, starts=starts)
    for a, b in zip(found, (expected, *torch.autograd.grad(expected, leaves, g.float())), strict=True):
        assert (a - b).abs().max() <= 0.02 * b.abs().max()
