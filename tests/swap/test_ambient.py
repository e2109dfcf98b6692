# SPDX-License-Identifier: Apache-2.0
"""What a swapped module computes does not depend on torch's default dtype and default device.
``tests/parity/test_conformer.py`` does the same with the Conformers."""

import ambient
import families
import pytest
from steps import moved, seeded


@pytest.mark.parametrize("family", families.ALL)
def test_the_same_in_every_setting(family):
    seeded(0)
    model, run = family()
    ambient.same_swapped_everywhere(moved(model, 0.1).eval(), run)
