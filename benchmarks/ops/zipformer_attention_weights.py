# SPDX-License-Identifier: Apache-2.0
"""zipformer_attention_weights at the sizes of Zipformer-M's stacks 0, 1 and 3 (16 s of speech, 4 utterances), and at
60 s of one utterance."""

import torch

from fastasr import ops
from fastasr.benchmarks.case import (
    BATCH,
    FRAMES,
    Case,
    Implementation,
    costs,
    simple,
    upstream_member,
    versions,
)

QUERY_DIM, POS_DIM = 32, 4


def _upstream(x, pos, heads: int, padding) -> Implementation:
    """Returns upstream's module without its projections: the rest is what the op computes."""
    cls = upstream_member("zipformer.modules.zipformer.RelPositionMultiheadAttentionWeights")
    module = cls(8, pos_dim=8, num_heads=heads, query_head_dim=QUERY_DIM, pos_head_dim=POS_DIM).eval()
    module.in_proj = module.linear_pos = torch.nn.Identity()
    return simple(lambda x, pos: module(x, pos, padding), x, pos)


def operands(frames: int, batch: int, heads: int, device: str, dtype: torch.dtype):
    """Returns x, pos and the options of an attention whose sequences are padded up to 30 %."""
    width = heads * (2 * QUERY_DIM + POS_DIM)
    x = torch.randn(frames, batch, width, device=device, dtype=dtype) * 0.5
    pos = torch.randn(1, 2 * frames - 1, heads * POS_DIM, device=device, dtype=dtype)
    lengths = torch.linspace(frames, frames * 0.7, batch, device=device).long()
    padding = torch.arange(frames, device=device) >= lengths[:, None]
    return x, pos, {"num_heads": heads, "query_head_dim": QUERY_DIM, "key_padding_mask": padding}


def attention_case(op: str, make, forward, backward, frames: int, batch: int, heads: int) -> Case:
    name, quick = f"{frames}x{batch}, {heads} heads", frames * frames * batch < 4_000_000
    return Case(op, name, name, make, costs(forward, backward), quick=quick)


def _case(frames: int, batch: int, heads: int) -> Case:
    def make(device: str, dtype: torch.dtype):
        x, pos, options = operands(frames, batch, heads, device, dtype)
        upstream = {"upstream": lambda: _upstream(x, pos, heads, options["key_padding_mask"])}
        return versions(ops.zipformer_attention_weights, x, pos, options=options, others=upstream)

    scores, values = heads * batch * frames * frames, frames * batch * heads * (2 * QUERY_DIM + POS_DIM)
    product = 2 * scores * (QUERY_DIM + POS_DIM)
    forward = scores + values, product  # W; x
    backward = 2 * scores + 2 * values, 2 * product  # W, dW; x, dx
    return attention_case("zipformer_attention_weights", make, forward, backward, frames, batch, heads)


CASES = (_case(796, 4, 4), _case(398, 4, 4), _case(100, 4, 8), _case(2998, 1, 4))
ON_DEVICE = (_case(FRAMES, BATCH, 4), _case(188, BATCH, 8))
