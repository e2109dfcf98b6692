# SPDX-License-Identifier: Apache-2.0
"""depthwise_conv_residual as E-Branchformer's merge calls it: both branches of a layer of 512 channels, with the 3 taps
that ESPnet and RETURNN use by default and the 31 of ESPnet's large recipes.

Upstream is ESPnet's code of the merge: a torch.nn.Conv1d between two transpositions, and the sum.
"""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import BATCH, FRAMES, Case, costs, module, shaped, versions


class Merge(torch.nn.Conv1d):
    def forward(self, x):
        return x + super().forward(x.transpose(1, 2)).transpose(1, 2)


def _upstream(x, weight, bias):
    channels, _, taps = weight.shape
    merge = Merge(channels, channels, taps, padding=taps // 2, groups=channels).to(x)
    return module(merge, x, weight=weight, bias=bias)


def _case(shape, taps: int) -> Case:
    def make(device: str, dtype: torch.dtype):
        randn = partial(torch.randn, device=device, dtype=dtype)
        inputs = randn(shape), 0.3 * randn(shape[-1], 1, taps), randn(shape[-1])
        upstream = {"upstream": lambda: _upstream(*inputs)}
        return versions(ops.depthwise_conv_residual, *inputs, others=upstream)

    n = torch.Size(shape).numel()
    passes = costs((2 * n, 2 * n * taps), (3 * n, 4 * n * taps))  # x; y. x, dy; dx
    return shaped("depthwise_conv_residual", shape, make, passes, f", {taps} taps")


CASES = (_case((4, 400, 1024), 3), _case((4, 400, 1024), 31))
ON_DEVICE = (_case((BATCH, FRAMES // 2, 1024), 3),)
