# SPDX-License-Identifier: Apache-2.0
"""icefall's Zipformer2 without padding."""

import icefall_checkout
import pytest

pytestmark = pytest.mark.needs(
    "fastasr", "tests/models/ragged_icefall.py", "tests/asr/streaming/icefall_chunks.py"
)


@icefall_checkout.needed
def test_each_recording_as_alone():
    reasons, errors = icefall_checkout.printed(__file__, "ragged_icefall.py").splitlines()[-2:]
    assert reasons == "[{'': None}, {'': None}]"
    of_values, of_gradients = map(float, errors.split())
    assert of_values < 1e-10
    assert of_gradients < 1e-10
