# SPDX-License-Identifier: Apache-2.0
"""Numbers that the host draws or reads in a call: at once, or, while the call is recorded, before each replay.

Each function below draws the same random numbers in the same order either way.
"""

import torch

from fastasr.models.common.graph_capture import recording


def rate(x):
    """Returns float(x) of a number or schedule. While a call is recorded it returns the number on the device that this
    will be in each replay, or 0.0 if it is 0 now; the recording then holds while it is 0.
    """
    recorded = recording()
    if recorded is None or isinstance(x, (int, float)):
        return float(x)
    return _scheduled(recorded, x, lambda: [float(x)], 1)


def keep_rates(x):
    """Returns (p, 1 / (1 - p)) of a rate of dropout, as ``rate`` does; 0.0 and 1.0 for a rate of 0."""
    recorded = recording()
    if recorded is None or isinstance(x, (int, float)):
        p = float(x)
        return p, 1.0 / (1.0 - p)

    def both():
        p = float(x)
        return [p, 1.0 / (1.0 - p)]

    found = _scheduled(recorded, x, both, 2)
    return (0.0, 1.0) if isinstance(found, float) else tuple(found.unbind())


def _scheduled(recorded, x, plan, count):
    if recorded.phase(x):
        recorded.numbers(lambda: (plan(), [])[1], 0)  # the reading still draws
        return 0.0
    values = recorded.numbers(plan, count).values
    return values[0] if count == 1 else values


def is_zero(number):
    return not isinstance(number, torch.Tensor) and number == 0.0
