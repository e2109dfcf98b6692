# SPDX-License-Identifier: Apache-2.0
"""Numbers below the normal range, kept or flushed to zero: the contract's tolerance, and the caller's mode stays."""

import pytest
import torch

from fastasr.testing import Make, tables
from fastasr.testing.checks import as_near_as_eager
from fastasr.testing.table import with_tensors

SUBNORMAL = 1e-40


@pytest.fixture(params=[False, True], ids=["kept", "flushed"])
def flush(request):
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this processor does not flush subnormal numbers")
    yield request.param
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", tables())
def test_a_third_of_all_numbers_is_subnormal(name, flush):
    table = tables()[name]

    def arguments(dtype, draw):
        make = Make(dtype, seed=draw)
        return with_tensors(
            table.thorough[0].arguments(make),
            lambda _, t: torch.where(make.uniform(*t.shape) < 0.33, t * SUBNORMAL, t),
        )

    as_near_as_eager(table, arguments)
    tiny = torch.full((64,), SUBNORMAL)
    assert bool((tiny * 0.5).count_nonzero()) != flush
