# SPDX-License-Identifier: Apache-2.0
"""bias_norm at the sizes of Zipformer-M's stacks 0 and 3."""

import torch

from fastasr import ops
from fastasr.benchmarks.case import BATCH, FRAMES, Case, costs, module, shaped, upstream_member, versions


def _upstream(x, bias, log_scale):
    norm = upstream_member("zipformer.modules.scaling.BiasNorm")(x.shape[-1]).to(x)
    return module(norm, x, bias=bias, log_scale=log_scale)


def _case(*shape: int) -> Case:
    def make(device: str, dtype: torch.dtype):
        x = torch.randn(shape, device=device, dtype=dtype)
        bias = torch.randn(shape[-1], device=device, dtype=dtype) * 0.1
        inputs = x, bias, torch.tensor(0.5, device=device, dtype=dtype)
        return versions(ops.bias_norm, *inputs, others={"upstream": lambda: _upstream(*inputs)})

    n = torch.Size(shape).numel()
    passes = costs((2 * n, 0), (3 * n, 0))  # x; y. x, dy; dx
    return shaped("bias_norm", shape, make, passes, copy=True)


CASES = (_case(796, 4, 192), _case(100, 4, 512))
ON_DEVICE = (*(_case(FRAMES, BATCH, c) for c in (192, 512, 768)), _case(188, BATCH, 512))
