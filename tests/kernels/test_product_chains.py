# SPDX-License-Identifier: Apache-2.0
"""Products of float32 begin at zero: Triton folds an addition behind a product into the product, whose chain of fused
multiply-adds then rounds at the size of the whole sum. The interpreter does not fold.
"""

import re

import pytest
import torch

from fastasr.testing.table import forward_and_backward, tables

triton = pytest.importorskip("triton")

KERNELS = {
    "layer_norm_lstm": ("forward_kernel", "backward_kernel"),
    "zipformer_attention": ("forward_kernel",),
    "zipformer_attention_weights": ("forward_kernel",),
}


@pytest.mark.parametrize("op", KERNELS)
def test_products_begin_at_zero(op):
    from triton.backends.compiler import GPUTarget

    from fastasr.testing.fake_gpu import fake_gpu

    with fake_gpu(capability=(9, 0)) as gpu:
        forward_and_backward(tables()[op], tables()[op].richest, torch.float32)
    launches = {launch.name: launch for launch in gpu.launches if launch.name in KERNELS[op]}
    assert set(launches) == set(KERNELS[op])
    for name, launch in launches.items():
        compiled = triton.compile(launch.source, GPUTarget("cuda", 90, 32), launch.options)
        found = re.findall(r"tt\.dot %\S+, %\S+, %([^\s,:]+)", compiled.asm["ttir"])
        assert found, name
        zeros = re.findall(r"%(\S+) = arith\.constant dense<0\.0+e\+00>", compiled.asm["ttir"])
        assert set(found) <= set(zeros), f"{name}: products begin at {set(found) - set(zeros)}"
