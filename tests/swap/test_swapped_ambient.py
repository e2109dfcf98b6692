# SPDX-License-Identifier: Apache-2.0
"""What a swapped module computes does not depend on torch's default dtype and default device."""

import copy

import ambient
import families
import pytest
import torch
from tiny_zipformer import training_step

import fastasr


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_same_in_every_setting(name):
    ambient.same_swapped_everywhere(*families.make(name))


@pytest.mark.parametrize("setting", [torch.bfloat16, torch.float64], ids=str)
def test_training_draws_what_upstream_draws(setting, model, inputs):
    """Upstream draws in the default dtype."""
    ours = copy.deepcopy(model)
    fastasr.accelerate(ours)
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
