# SPDX-License-Identifier: Apache-2.0
"""Models of every family run their linear layers in int8: which ones, the bound on the outputs, and the way back.
``tests/parity/test_conformer.py`` does the same with the Conformers."""

import families
import pytest
from in_int8 import check
from steps import moved, seeded


@pytest.mark.parametrize("family", families.IN_INT8)
def test_family(family, monkeypatch):
    seeded(0)
    model, run = family()
    check(moved(model, 0.1).eval(), run, monkeypatch)
