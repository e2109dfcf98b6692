# SPDX-License-Identifier: Apache-2.0
"""Rules for fastasr's own encoders that are of no upstream class: nothing is swapped in them, but their calls are
recorded."""

from fastasr.models.fast_conformer import FastConformerEncoder
from fastasr.swap.rule import Graphed, Rule


def _obstacle(encoder):
    return "it runs without padding, in another shape at every call" if encoder.ragged else None


FAST_CONFORMER = Rule(
    name="fastasr.fast_conformer_encoder",
    class_name="FastConformerEncoder",
    forward=FastConformerEncoder.forward,
    structure=lambda module: None,
    known={},
    graphs=Graphed(obstacle=_obstacle, parts=lambda encoder: list(encoder.layers)),
)

RULES = (FAST_CONFORMER,)
