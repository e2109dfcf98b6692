# SPDX-License-Identifier: Apache-2.0
"""A swapped model drops elements where upstream's does if its dropouts are not in the mode of the modules around them:
in training without dropout, and in inference with it ("Monte Carlo dropout")."""

import families
import pytest
import torch
from families import FAMILIES, SWAP
from steps import close, seeded

import fastasr


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_dropouts_in_another_mode(name, training):
    found = []
    for swapped in (True, False):
        model, run = families.make(name)
        if swapped:
            fastasr.accelerate(model, **SWAP.get(name, {}))
        model.train(training)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train(not training)
        seeded("draws")
        with torch.no_grad(), fastasr.upstream_draws():
            found.append((run(model), torch.get_rng_state()))
    (ours, drawn), (theirs, expected) = found
    assert torch.equal(drawn, expected)
    # In inference modules of channels do not order their frames for the dropouts behind them.
    for one, other in zip(ours, theirs, strict=True) if training else ():
        close(one, other, 2e-4)
