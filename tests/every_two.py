# SPDX-License-Identifier: Apache-2.0
"""Cases of three parameters in which every two values of different parameters meet: what one value or two of them show
is found by fewer cases than their product has."""

import pytest


def every_two(first, second, third):
    """Returns a case for each pair of values of ``first`` and ``second``, which must not be shorter than ``third``. A
    dictionary gives values their names."""
    first, second, third = (
        {str(v): v for v in p} if not isinstance(p, dict) else p for p in (first, second, third)
    )
    assert len(third) <= min(len(first), len(second))
    names = list(third)
    return [
        pytest.param(a, b, third[c], id=f"{name}-{other}-{c}")
        for i, (name, a) in enumerate(first.items())
        for j, (other, b) in enumerate(second.items())
        for c in [names[(i + j) % len(names)]]
    ]
