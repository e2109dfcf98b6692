# SPDX-License-Identifier: Apache-2.0
"""conv_spatial_gate at the sizes of ESPnet's E-Branchformers: 3072 linear units of the large one, 1024 of a small one.

Upstream is ESPnet's ConvolutionalSpatialGatingUnit.
"""

from functools import partial

import torch

from fastasr import ops
from fastasr.benchmarks.case import BATCH, Case, costs, module, shaped, upstream_member, versions

EPS = 1e-12


def _upstream(x, norm_weight, norm_bias, weight, bias):
    unit = upstream_member("espnet2.asr.layers.cgmlp.ConvolutionalSpatialGatingUnit")
    unit = unit(2 * weight.shape[0], weight.shape[-1], 0.0, False, "identity").to(x)
    norm = {"norm.weight": norm_weight, "norm.bias": norm_bias}
    return module(unit, x, **norm, **{"conv.weight": weight, "conv.bias": bias})


def _case(shape, taps: int) -> Case:
    def make(device: str, dtype: torch.dtype):
        randn = partial(torch.randn, device=device, dtype=dtype)
        batch, frames, channels = shape
        inputs = [randn(batch, frames, 2 * channels), 1 + 0.2 * randn(channels), 0.1 * randn(channels)]
        inputs += [0.2 * randn(channels, 1, taps), 1 + 0.1 * randn(channels)]
        upstream = {"upstream": lambda: _upstream(*inputs)}
        return versions(ops.conv_spatial_gate, *inputs, options={"eps": EPS}, others=upstream)

    n = torch.Size(shape).numel()
    passes = costs((3 * n, 2 * n * taps), (5 * n, 6 * n * taps))
    return shaped("conv_spatial_gate", shape, make, passes, f", {taps} taps")


CASES = (_case((4, 400, 1536), 31), _case((4, 400, 512), 31))
ON_DEVICE = tuple(_case((BATCH, 750, channels), 31) for channels in (1536, 512))
