# SPDX-License-Identifier: Apache-2.0
import pytest

from fastasr.benchmarks import limits


@pytest.fixture(autouse=True, scope="module")
def _small_products():
    """Products that set a limit are small here: no test looks at the figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(limits.SIDES, "cpu", 256)
        limits.large_product.cache_clear()
        yield
    limits.large_product.cache_clear()
