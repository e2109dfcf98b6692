# SPDX-License-Identifier: Apache-2.0
"""The parts of models that searches read: they have no rules, and stay in float32 (fastasr/swap/weights.py)."""

from fastasr.models.transducer.predictors import find_predictor
from fastasr.swap.rule import Upstream


def searched(model: Upstream) -> tuple:
    """Returns predictor and joint network of a transducer that greedy search knows; () for other modules."""
    predictor = find_predictor(model)
    return () if predictor is None else predictor.parts()
