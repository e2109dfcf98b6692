# SPDX-License-Identifier: Apache-2.0
"""icefall's Zipformer2 through the native engine."""

import icefall_checkout
import pytest

pytestmark = pytest.mark.needs("fastasr", "tests/asr/streaming/icefall_chunks.py")


@icefall_checkout.needed
def test_chunks_are_those_of_the_recipe():
    assert float(icefall_checkout.printed(__file__, "icefall_chunks.py")) < 5e-6
