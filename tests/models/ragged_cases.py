# SPDX-License-Identifier: Apache-2.0
"""The ways to run packed frames, and the cases of lengths that run in each of them."""

import pytest
from every_two import every_two

WAYS = "one call", "copies", "copies as on a GPU", "groups as on a GPU"


def each_of(lengths, name, values):
    """Parametrises a test over lengths, the ways, and a parameter of this name."""
    cases, names = every_two(lengths, WAYS, values), ("lengths", "one_call_or_copies", name)
    by_case = pytest.mark.parametrize(names, cases, indirect=["one_call_or_copies"])
    return lambda test: by_case(pytest.mark.usefixtures("one_call_or_copies")(test))
