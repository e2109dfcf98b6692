# SPDX-License-Identifier: Apache-2.0
"""swoosh_l and swoosh_r against the formula, torch.compile, upstream's modules and a copy of the same bytes."""

import torch

from fastasr import ops
from fastasr.benchmarks.case import BATCH, FRAMES, Case, costs, module, shaped, upstream_member, versions

UPSTREAM = {"swoosh_l": "zipformer.modules.scaling.SwooshL", "swoosh_r": "zipformer.modules.scaling.SwooshR"}


def _case(op: str, *shape: int, quick: bool = True) -> Case:
    def make(device: str, dtype: torch.dtype):
        x = torch.randn(shape, device=device, dtype=dtype) * 3
        upstream = {"upstream": lambda: module(upstream_member(UPSTREAM[op])(), x)}
        return versions(getattr(ops, op), x, others=upstream)

    n = torch.Size(shape).numel()
    passes = costs((2 * n, 0), (3 * n, 0))  # x; y. x, dy; dx
    return shaped(op, shape, make, passes, copy=True, quick=quick)


CASES = (
    _case("swoosh_l", 4, 1600, 512),
    _case("swoosh_r", 4, 1600, 512),
    # the first activations of Zipformer-M's front end: 16 s, after the first convolution
    _case("swoosh_r", 4, 8, 1598, 80, quick=False),
)
ON_DEVICE = tuple(_case(op, FRAMES, BATCH, c) for c in (512, 768, 1536) for op in ("swoosh_l", "swoosh_r"))
