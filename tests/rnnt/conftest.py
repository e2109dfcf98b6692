# SPDX-License-Identifier: Apache-2.0
"""The package that fastasr.rnnt is compared with, and random lattices."""

import pytest
from steps import seeded


@pytest.fixture(scope="session")
def fast_rnnt():
    """Returns the PyPI package: ``scripts/install_peers.sh`` compiles it where it can."""
    return pytest.importorskip(
        "fast_rnnt", reason="fast_rnnt is not built here: scripts/install_peers.sh", exc_type=ImportError
    )


@pytest.fixture(autouse=True)
def _seeded():
    seeded(0)
