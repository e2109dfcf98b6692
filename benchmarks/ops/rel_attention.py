# SPDX-License-Identifier: Apache-2.0
"""rel_attention of an E-Branchformer layer (8 heads of 64): four padded sequences of 16 s, and one minute of audio.

It is compared with the definition, with ESPnet's own code between its projections, and with torch's fused attention,
which takes the scores of positions and the padding as one additive mask.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from fastasr import ops
from fastasr.benchmarks.case import (
    BATCH,
    FRAMES,
    Case,
    Unavailable,
    compiled,
    costs,
    simple,
    upstream_member,
    versions,
)
from fastasr.ops.rel_attention import relative_shift

HEADS, WIDTH = 8, 64


def espnet(device: str) -> Callable:
    """Returns ESPnet's attention with projections that return their inputs."""
    name = "espnet2.asr.encoder.e_branchformer_encoder.RelPositionMultiHeadedAttention"
    attention = upstream_member(name)
    module = attention(HEADS, HEADS * WIDTH, 0.0).to(device)
    for name in ("linear_q", "linear_k", "linear_v", "linear_pos", "linear_out"):
        setattr(module, name, torch.nn.Identity())
    del module.pos_bias_u, module.pos_bias_v

    def run(q, k, v, pos, bias_u, bias_v, key_padding_mask):
        module.pos_bias_u, module.pos_bias_v = bias_u, bias_v
        shape, mask = q.shape, ~key_padding_mask.unsqueeze(1)
        q, k, v, pos = (t.flatten(-2) for t in (q, k, v, pos))
        return module(q, k, v, pos.unsqueeze(0), mask).view(shape)

    return run


def additive(q, k, v, pos, bias_u, bias_v, key_padding_mask):
    """Returns torch's fused attention with the scores of positions and padding as its mask."""
    position = ((q + bias_v) * WIDTH**-0.5).transpose(1, 2)
    mask = relative_shift(torch.matmul(position, pos.permute(1, 2, 0)))
    mask = mask.masked_fill(key_padding_mask[:, None, None], torch.finfo(mask.dtype).min)
    content, k, v = (t.transpose(1, 2) for t in (q + bias_u, k, v))
    return F.scaled_dot_product_attention(content, k, v, attn_mask=mask).transpose(1, 2)


def flex(device: str) -> Callable:
    """Returns torch's FlexAttention with a kernel made from scores of positions that were formed before."""
    if torch.device(device).type != "cuda":
        raise Unavailable("FlexAttention is compared on a GPU")
    from torch.nn.attention.flex_attention import flex_attention

    attention = compiled(flex_attention)

    def run(q, k, v, pos, bias_u, bias_v, key_padding_mask):
        frames = q.shape[1]
        position = ((q + bias_v) * WIDTH**-0.5).transpose(1, 2)
        by_offset = torch.matmul(position, pos.permute(1, 2, 0))

        def scores(content, sequence, head, i, j):
            score = content + by_offset[sequence, head, i, frames - 1 + j - i]
            return torch.where(key_padding_mask[sequence, j], -float("inf"), score)

        content, k, v = (t.transpose(1, 2) for t in (q + bias_u, k, v))
        return attention(content, k, v, score_mod=scores).transpose(1, 2)

    return run


def _make(frames: int, batch: int, device: str, dtype: torch.dtype):
    like = {"device": device, "dtype": dtype}
    inputs = [torch.randn(batch, frames, HEADS, WIDTH, **like) for _ in range(3)]
    inputs.append(torch.randn(2 * frames - 1, HEADS, WIDTH, **like))
    inputs += [torch.randn(HEADS, WIDTH, **like) * 0.1 for _ in range(2)]
    lengths = torch.linspace(frames, frames * 0.8, batch, device=device).long()
    padding = torch.arange(frames, device=device) >= lengths[:, None]

    options = {"key_padding_mask": padding}

    def made(function):
        return simple(partial(function, **options), *inputs)

    others = {
        "additive mask": lambda: made(additive),
        "FlexAttention": lambda: made(flex(device)),
        "upstream": lambda: made(espnet(device)),
    }
    return versions(ops.rel_attention, *inputs, options=options, others=others)


def _case(frames: int, batch: int) -> Case:
    name = f"{batch}x{frames}, {HEADS} heads of {WIDTH}"
    product = 2 * batch * HEADS * frames * frames * WIDTH
    rows, offsets = batch * frames * HEADS * WIDTH, 2 * frames * HEADS * WIDTH
    passes = costs((4 * rows + offsets, 3 * product), (7 * rows + 2 * offsets, 8 * product))
    quick = frames * frames * batch < 1_000_000
    return Case("rel_attention", name, name, partial(_make, frames, batch), passes, quick=quick)


CASES = (_case(400, 4), _case(1500, 1))
ON_DEVICE = (_case(400, BATCH), _case(FRAMES, BATCH))
