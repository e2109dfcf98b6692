# SPDX-License-Identifier: Apache-2.0
"""What holds of a model of any family whose linear layers run in int8."""

import pytest
import torch

import fastasr
from fastasr.swap import weights


def check(model, run, monkeypatch, exact_parts=()):
    """Asserts that ``run(model)`` reads every linear layer in int8, small ones included, but for ``exact_parts`` (ends
    of paths) and what a search compares; that the report has the change of the output; and that ``restore`` brings the
    same bits back.
    """
    monkeypatch.setattr(weights, "SMALL", 0)
    with torch.no_grad():
        exact = run(model)
    report = fastasr.accelerate(model, weights="int8", verify=run)
    assert report.ok, str(report)
    with torch.no_grad():
        error = ((run(model) - exact).norm() / exact.norm()).item()
    assert 0 < error < 0.05
    assert report.weights.error == pytest.approx(error, rel=1e-3)
    for row in report.weights.rows:
        exact_part = row.reason == weights.SEARCHED or row.path.endswith(exact_parts)
        assert row.format == "int8" or exact_part, (row.path, row.reason)
    assert len(report.weights.reduced) >= 9
    fastasr.restore(model)
    with torch.no_grad():
        assert torch.equal(run(model), exact)
