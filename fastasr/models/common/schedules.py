# SPDX-License-Identifier: Apache-2.0
"""Schedules of training: modules that are numbers, and that draw a random number when they are read."""

from typing import Any


def peek(x: Any) -> float:
    """Returns float(x) of a number or a schedule, without the random number that reading a schedule draws."""
    if isinstance(x, (int, float)):
        return float(x)
    if x.batch_count is None or not x.training:
        return float(x.default)
    return float(x.schedule(x.batch_count))
