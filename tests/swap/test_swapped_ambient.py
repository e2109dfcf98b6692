# SPDX-License-Identifier: Apache-2.0
"""What a swapped module computes does not depend on torch's default dtype and default device, nor on whether the
backend that serves it is forced."""

import ambient
import families
import pytest
import torch
from steps import seeded, swapped
from tiny_zipformer import training_step

import fastasr
from fastasr.models.zipformer.self_attention import weighted
from fastasr.ops import _dispatch


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_same_in_every_setting(name):
    ambient.same_swapped_everywhere(*families.make(name))


@pytest.mark.skipif(bool(_dispatch.why_not_native()), reason=_dispatch.why_not_native())
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_same_on_a_forced_backend(name, training):
    found = []
    for backend in ("auto", "cpu"):
        model, run = families.make(name)
        fastasr.accelerate(model.train(training), **families.SWAP.get(name, {}))
        seeded("draws")
        with fastasr.backend(backend), torch.set_grad_enabled(training):
            found.append(run(model))
    assert all(map(torch.equal, *found))


def test_dtypes_without_kernels_on_a_forced_backend():
    """An op says that it cannot serve them, and a step between ops computes them."""
    weights, values = torch.softmax(torch.randn(2, 3, 5, 5), -1), torch.randn(5, 3, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        given = weights.to(dtype), values.to(dtype)
        with fastasr.backend("cpu"):
            found = weighted(*given)
        assert torch.equal(found, weighted(*given))
        with fastasr.backend("cpu"), pytest.raises(RuntimeError, match="cannot serve linear on cpu"):
            fastasr.ops.linear(given[1], torch.ones(8, 8, dtype=dtype))


@pytest.mark.parametrize("setting", [torch.bfloat16, torch.float64], ids=str)
def test_training_draws_what_upstream_draws(setting, model, inputs):
    """Upstream draws in the default dtype."""
    ours = swapped(model)
    with ambient.ambient(setting):
        found, expected = (training_step(each, inputs, 3) for each in (ours, model))
    assert found[2] == expected[2]
    assert (found[0] - expected[0]).abs() <= 1e-3 * expected[0].abs() + 1e-4


@pytest.mark.parametrize("setting", ambient.SETTINGS, ids=str)
def test_verified_in_every_setting(setting, model, inputs):
    if isinstance(setting, torch.device):  # upstream's Zipformer draws and masks on the default device
        model, inputs = families.make("parakeet")
    with ambient.ambient(setting):
        report = fastasr.accelerate(model.eval(), verify=inputs)
    assert report.ok, str(report)
    assert any(row.errors for row in report.replaced)
