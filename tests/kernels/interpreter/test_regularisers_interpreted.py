# SPDX-License-Identifier: Apache-2.0
"""The kernels of balancer_gradient and whitening_gradient in what no sample of the contract says."""

import pytest
import torch

from fastasr import ops
from tests.ops.test_regularisers import test_in_place_with_numbers_in_tensors, test_the_metric_at_its_limit  # noqa: F401, these run here too

pytestmark = pytest.mark.usefixtures("by_triton")


@pytest.mark.parametrize("x", [torch.zeros(1, 8).add(2.5), torch.full((50, 8), 0.1), torch.zeros(50, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whitening_without_covariance(x, dtype):
    grad, x = torch.randn(x.shape).to(dtype), x.to(dtype)
    found, white = ops.whitening_gradient(grad, x, 2, 1.5, 0.1)
    assert found.isfinite().all()
    if dtype is torch.float32 or len(x) == 1 or not x.any():  # products of 16-bit numbers differ in rounding
        assert white
        assert torch.equal(found, grad)
