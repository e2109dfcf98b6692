# SPDX-License-Identifier: Apache-2.0
import copy

import pytest

pytest.importorskip("zipformer", reason="upstream's package is not installed")

import tiny_zipformer


@pytest.fixture(scope="session")
def _tiny():
    return tiny_zipformer.tiny()


@pytest.fixture
def model(_tiny):
    """Returns a fresh, unswapped tiny Zipformer."""
    return copy.deepcopy(_tiny)


@pytest.fixture
def inputs():
    return tiny_zipformer.batch()
