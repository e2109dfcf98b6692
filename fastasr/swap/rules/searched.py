# SPDX-License-Identifier: Apache-2.0
"""The parts of models that searches read: they have no rules, and stay in float32 (fastasr/swap/weights.py)."""

from fastasr.models.transducer.looping_transducers import looping_transducer
from fastasr.swap.rule import Upstream


def searched(model: Upstream) -> tuple:
    """Returns predictor and joint network of a transducer that greedy search knows; () for other modules."""
    transducer = looping_transducer(model)
    return () if transducer is None else transducer.parts()
