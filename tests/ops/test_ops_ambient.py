# SPDX-License-Identifier: Apache-2.0
"""An op's values and gradients, and its formula's, do not depend on torch's default dtype and default device."""

import ambient
import pytest
import torch

from fastasr.testing import Make, tables
from fastasr.testing.checks import values_and_gradients

CALLS = [
    pytest.param(
        table,
        sample,
        id=f"{name}-{sample.name}".replace(" ", "_"),
        marks=() if sample.thorough else pytest.mark.long,
    )
    for name, table in tables().items()
    for sample in table.samples
    if not sample.large
]


@pytest.mark.parametrize(("table", "sample"), CALLS)
def test_the_same_in_every_setting(table, sample):
    arguments = sample.arguments(Make(torch.float32))
    *_, cotangent = values_and_gradients(table.function, arguments)
    for function in (table.function, table.definition):

        def run(function=function):
            return values_and_gradients(function, arguments, cotangent)[:2]

        ambient.same_everywhere(lambda run=run: run)
