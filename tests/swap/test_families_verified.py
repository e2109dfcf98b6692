# SPDX-License-Identifier: Apache-2.0
"""A model of every framework is verified when it is swapped, and undone it is what it was."""

import families
import pytest
import torch

import fastasr

UNCALLED = {  # a call reaches other methods of these, or runs packed frames
    "emformer stream": {"torchaudio.emformer", "torchaudio.emformer_layer"},
    "zipformer, causal": {"zipformer.causal_encoder"},
    "zipformer, ragged": {"zipformer.encoder"},
}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_verified_and_restored(name):
    model, run = families.make(name)
    with torch.no_grad():
        expected = run(model)  # upstream's first call may set attributes
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    report = fastasr.accelerate(model, verify=run, **families.SWAP.get(name, {}))
    assert report.ok, str(report)
    rows = {
        rule: [row for row in report.replaced if row.rule == rule]
        for rule in {r.rule for r in report.replaced}
    }
    assert {rule for rule, found in rows.items() if not any(row.errors for row in found)} <= UNCALLED.get(
        name, set()
    )
    assert fastasr.restore(model) == len(report.replaced)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    with torch.no_grad():
        assert all(map(torch.equal, run(model), expected))
