# SPDX-License-Identifier: Apache-2.0
"""Results that are exact, or the same to the bit by another way."""

import pytest
import torch

from fastasr.kernels import bypass, residual_norm, segment_attention, zipformer_attention
from fastasr.ops._segments import rows_of


def test_a_scale_of_zero_or_one_selects():
    x_orig, x, grad = (torch.randn(6, 40) for _ in range(3))
    for value in (0.0, 1.0):
        scale = torch.full((40,), value)
        dx_orig, dx, _ = bypass.bypass_backward(grad, x_orig, x, scale)
        assert torch.equal(dx, grad * value)
        assert torch.equal(dx_orig, grad * (1.0 - value))
    assert torch.equal(bypass.bypass_forward(x_orig, x, torch.zeros(40)), x_orig)


def test_rows_of_one_value_are_normalised_to_zeros():
    """This holds however small eps is, at any number of channels."""
    x, zero = torch.full((5, 193), 0.1), torch.zeros(5, 193)
    weight, bias = torch.ones(193), torch.full((193,), 0.25)
    y, _ = residual_norm.residual_norm_forward(x, zero, None, None, None, weight, bias, 1e-12, 0, False)
    assert torch.equal(y, bias.expand(5, 193))


def test_pieces_of_zipformer_attention_change_rounding_alone(small_blocks, monkeypatch):
    x, pos, value = 0.5 * torch.randn(50, 1, 20), torch.randn(1, 108, 4), torch.randn(59, 1, 4)
    call = x, pos, value, 0.5 * torch.randn(9, 1, 8), None, None, None, 1, 8, 1, 8, 1
    given = torch.randn(50, 1, 4), *zipformer_attention.zipformer_attention_forward(*call, keep=True)
    pieces = zipformer_attention.zipformer_attention_backward(*given, *call)
    monkeypatch.setattr(zipformer_attention, "PIECE_BYTES", 1 << 26)
    whole = zipformer_attention.zipformer_attention_backward(*given, *call)
    for number, (a, b) in enumerate(zip(whole, pieces, strict=True)):
        if number == 1:  # dpos
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("sizes", "endless"),
    [
        ((9, 4, 20, 1, 9, 0, 0), (9, 4, 1 << 40, 1, 1 << 40, 0, 0)),
        ((9, 9, 5, 1, 2, 5, 2), (9, 1 << 40, 5, 1, 2, 5, 2)),
    ],
    ids=["contexts", "a segment"],
)
def test_segment_attention_sees_what_there_is(sizes, endless):
    """Contexts without end see all frames; one segment longer than the utterance is as long as it."""
    frames, segment, _, right, memory, *past = sizes
    queries, keys = rows_of(frames, segment, right, memory, *past)
    query, key, value, grad = (torch.randn(rows, 1, 8) for rows in (queries, keys, keys, queries))

    def run(sizes):
        call = query, key, value, None, None, None, 1, *sizes
        y = segment_attention.segment_attention_forward(*call)
        return y, *segment_attention.segment_attention_backward(grad, *call)

    for a, b in zip(run(endless), run(sizes), strict=True):
        assert torch.equal(a, b)
