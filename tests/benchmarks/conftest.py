# SPDX-License-Identifier: Apache-2.0
import gc

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


@pytest.fixture(autouse=True)
def _little_to_collect():
    """Each measurement collects garbage first, which takes 0.2 s where the models of earlier tests are walked too."""
    gc.collect()
    gc.freeze()
