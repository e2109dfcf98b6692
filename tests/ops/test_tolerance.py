# SPDX-License-Identifier: Apache-2.0
"""How many draws the numerical contract needs to judge a call."""

import statistics

import pytest

from fastasr.testing.tolerance import JUDGED_DRAWS, Comparison, judged


@pytest.mark.parametrize(
    ("excess", "wide", "right"), [(1.35, True, True), (1.35, False, False), (3.0, True, False)]
)
def test_medians_that_vary_are_judged_over_more_draws(excess, wide, right):
    """Errors that one rounding decides are wide: their median over 64 draws may exceed eager's by a third, by chance.
    Where errors hardly vary, as those of many numbers do, that is a fault."""
    few, most = JUDGED_DRAWS[-2:]
    normal, seen = statistics.NormalDist(), set()

    def compared(draw: int, single: bool) -> list[tuple[str, Comparison]]:
        seen.add(draw)
        place = 0.5 + 0.5 * (draw % few + 0.5) / few  # 64 places of a half normal
        error = 1e-4 * (normal.inv_cdf(place) if wide else 0.9 + 0.2 * place)
        ours = error * excess if draw < few or not right else error
        return [("y", Comparison(ours, error, ours, error, 2.0**-23, 100))]

    assert (not judged(compared, few)) == right
    assert len(seen) == (most if right else few)
