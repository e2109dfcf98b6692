# SPDX-License-Identifier: Apache-2.0
"""Models of every framework whose norms lack parameters or statistics."""

import bare_norms
import families
import pytest
import torch


@pytest.mark.parametrize("change", bare_norms.CHANGES)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_bare_norms(name, change):
    model, run = families.make(name)
    bare_norms.check(model, lambda net: torch.cat([t.flatten() for t in run(net)]), change)
