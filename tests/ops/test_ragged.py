# SPDX-License-Identifier: Apache-2.0
"""Any shape of any op, found and shrunk by hypothesis: values and gradients are those of the float64 definition."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastasr.testing import Make, tables
from fastasr.testing.table import flat, floating, with_tensors


class Drawn:
    """Draws from hypothesis the sizes that a table's ``random`` entry asks for."""

    def __init__(self, data):
        self.data = data

    def __call__(self):
        return tuple(self.data.draw(st.lists(st.integers(0, 40), max_size=3), label="dimensions"))

    def size(self):
        return self.data.draw(st.integers(0, 70), label="size")

    def choice(self, options):
        return self.data.draw(st.sampled_from(options), label="option")


@pytest.mark.parametrize("name", tables())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_ragged_shapes(name, data):
    table = tables()[name]
    arguments = table.random(
        Make(torch.float32, seed=data.draw(st.integers(0, 9), label="seed")), Drawn(data)
    )
    arguments = with_tensors(arguments, lambda _, t: t.requires_grad_())
    wide = with_tensors(arguments, lambda _, t: t.detach().double().requires_grad_())
    out, reference = flat(table.function(**arguments)), flat(table.definition(**wide))
    assert out.shape == reference.shape
    if not reference.isfinite().all():  # a row of one channel has no spread to normalise by
        assert torch.equal(out.isfinite(), reference.float().isfinite())
        return
    torch.testing.assert_close(out.double(), reference, rtol=1e-4, atol=1e-5)
    cotangent = Make(seed="cotangent").normal(*out.shape)
    out.backward(cotangent)
    reference.backward(cotangent.double())
    for key, tensor in floating(arguments).items():
        if not out.numel():  # a sum of nothing is 0, where the definition may divide 0 by 0
            assert not tensor.grad.count_nonzero()
            continue
        scale = max(1.0, wide[key].grad.abs().max().item()) if tensor.numel() else 1.0
        torch.testing.assert_close(tensor.grad.double(), wide[key].grad, rtol=1e-3, atol=1e-4 * scale)
