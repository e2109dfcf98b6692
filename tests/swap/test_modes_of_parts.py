# SPDX-License-Identifier: Apache-2.0
"""A swapped model drops elements where upstream's does if its dropouts are not in the mode of the modules around them,
in training without dropout and in inference with it ("Monte Carlo dropout"), or if their rates change after the
swap."""

import families
import pytest
import torch
from families import FAMILIES, SWAP
from steps import close, seeded

import fastasr

# whether the model trains, whether its dropouts do, and their rate, if that changes after the swap
MODES = {
    "training without dropout": (True, False, None),
    "inference with dropout": (False, True, None),
    "training at a rate of 0": (True, True, 0.0),
    "training at a higher rate": (True, True, 0.4),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_dropouts_in_another_mode(name, mode):
    training, dropping, rate = MODES[mode]
    found = []
    for swapped in (True, False):
        model, run = families.make(name)
        if swapped:
            fastasr.accelerate(model, **SWAP.get(name, {}))
        model.train(training)
        for module in model.modules():
            if type(module).__name__.startswith("Dropout"):
                module.train(dropping)
            if isinstance(module, torch.nn.Dropout) and rate is not None:
                module.p = rate
        seeded("draws")
        with torch.no_grad(), fastasr.upstream_draws():
            found.append((run(model), torch.get_rng_state()))
    (ours, drawn), (theirs, expected) = found
    assert torch.equal(drawn, expected)
    close(ours, theirs, 2e-4)
