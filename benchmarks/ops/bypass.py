# SPDX-License-Identifier: Apache-2.0
"""bypass at the sizes of Zipformer-M's stacks 0 and 3."""

import torch

from fastasr import ops
from fastasr.benchmarks.case import BATCH, FRAMES, Case, costs, module, shaped, upstream_member, versions


def _upstream(x_orig, x, scale):
    bypass = upstream_member("zipformer.modules.zipformer.BypassModule")(x.shape[-1]).to(x)
    return module(bypass, x_orig, x, bypass_scale=scale)


def _case(*shape: int) -> Case:
    def make(device: str, dtype: torch.dtype):
        x_orig, x = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        inputs = x_orig, x, torch.rand(shape[-1], device=device, dtype=dtype)
        return versions(ops.bypass, *inputs, others={"upstream": lambda: _upstream(*inputs)})

    n = torch.Size(shape).numel()
    passes = costs((3 * n, 0), (5 * n, 0))  # x_orig, x; y. x_orig, x, dy; dx_orig, dx
    return shaped("bypass", shape, make, passes, copy=True)


CASES = (_case(796, 4, 192), _case(100, 4, 512))
ON_DEVICE = (*(_case(FRAMES, BATCH, c) for c in (192, 512, 768)), _case(188, BATCH, 512))
