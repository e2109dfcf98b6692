# SPDX-License-Identifier: Apache-2.0
"""Meta and fake tensors, which have no values, get results of the shapes, dtypes and strides of real ones."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastasr import ops
from fastasr.ops import _gemm
from fastasr.testing.table import Make, table

CALLS = [
    pytest.param(name, sample, id=f"{name}-{sample.name}".replace(" ", "_"))
    for name in ops.NAMES
    for sample in table(name).thorough
]


def _layout(t):
    return t.dtype, [(n, stride) for n, stride in zip(t.shape, t.stride(), strict=True) if n != 1]


def _layouts(results):
    return [_layout(t) for t in tree_leaves(results) if t is not None and t.numel()]


@pytest.mark.parametrize(("name", "sample"), CALLS)
def test_results_lie_as_real_ones(name, sample):
    arguments, function = sample.arguments(Make()), table(name).function
    expected = _layouts(function(**arguments))
    on_meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments)
    assert _layouts(function(**on_meta)) == expected
    with FakeTensorMode() as mode:
        assert _layouts(function(**tree_map_only(torch.Tensor, mode.from_tensor, arguments))) == expected


@torch.no_grad()
def test_a_large_product_of_real_tensors(monkeypatch):
    """fastasr's own product, which such sizes may choose, has real results alone."""
    monkeypatch.setenv("FASTASR_GEMM", "native")
    monkeypatch.setattr(_gemm, "_choices", {})
    x, weight = torch.ones(64, 256, dtype=torch.float32), torch.ones(256, 256, dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = ops.linear(x, weight)
    assert found.shape == (64, 256)
