# SPDX-License-Identifier: Apache-2.0
"""Models of every family whose norms lack parameters or statistics. ``tests/parity/test_conformer.py`` does the same
with the Conformers."""

import bare_norms
import families
import pytest
import torch
from steps import moved, seeded


@pytest.mark.parametrize("change", bare_norms.CHANGES)
@pytest.mark.parametrize("family", families.ALL)
def test_bare_norms(family, change):
    seeded(0)
    model, run = family()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    bare_norms.check(moved(model, 0.1), lambda net: tensor(run(net)), change)


def tensor(found):
    return torch.cat([t.flatten() for t in found]) if isinstance(found, list) else found
