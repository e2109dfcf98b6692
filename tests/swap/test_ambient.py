# SPDX-License-Identifier: Apache-2.0
"""What a swapped module computes does not depend on torch's default dtype and default device.
``tests/parity/test_conformer.py`` does the same with the Conformers."""

import copy

import ambient
import families
import pytest
import torch
from steps import moved, seeded
from tiny_zipformer import training_step

import fastasr


@pytest.mark.parametrize("family", families.ALL)
def test_the_same_in_every_setting(family):
    seeded(0)
    model, run = family()
    ambient.same_swapped_everywhere(moved(model, 0.1).eval(), run)


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
        model, inputs = families.parakeet()
    with ambient.ambient(setting):
        report = fastasr.accelerate(model.eval(), verify=inputs)
    assert report.ok, str(report)
    assert any(row.errors for row in report.replaced)
