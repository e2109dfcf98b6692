# SPDX-License-Identifier: Apache-2.0
"""Rules for torchaudio's Conformer (torchaudio/models/conformer.py), whose attention is torch's own."""

import torch

from fastasr.swap.forwards import espnet as models
from fastasr.swap.rule import Known, Upstream, check_parts, check_sequence
from fastasr.swap.rules.conformer import convolution_rule, feed_forward_rule
from fastasr.swap.rules.torch import ATTENTION

_TORCHAUDIO = Known("torchaudio 2.11")
_NN = torch.nn
_CONVOLUTION = (
    _NN.Conv1d,
    _NN.GLU,
    _NN.Conv1d,
    (_NN.BatchNorm1d, _NN.GroupNorm),
    _NN.SiLU,
    _NN.Conv1d,
    _NN.Dropout,
)
_FEED_FORWARD = (_NN.LayerNorm, _NN.Linear, _NN.SiLU, _NN.Dropout, _NN.Linear, _NN.Dropout)


def _convolution_structure(module: Upstream) -> str | None:
    reason = check_parts(module, ("layer_norm", "sequential"))
    reason = reason or check_sequence(module, "sequential", _CONVOLUTION)
    if reason is None and module.sequential[1].dim != 1:
        return f"submodule sequential.1 gates dimension {module.sequential[1].dim}, expected 1"
    return reason


def _feed_forward_structure(module: Upstream) -> str | None:
    reason = check_parts(module, ("sequential",))
    return reason or check_sequence(module, "sequential", _FEED_FORWARD)


CONVOLUTION = convolution_rule(
    name="torchaudio.conformer_convolution",
    class_name="_ConvolutionModule",
    forward=models.torchaudio_convolution,
    structure=_convolution_structure,
    known={"738a24b7bf15278a784bd0f6": _TORCHAUDIO},
)

FEED_FORWARD = feed_forward_rule(
    name="torchaudio.conformer_feed_forward",
    class_name="_FeedForwardModule",
    forward=models.torchaudio_feed_forward,
    structure=_feed_forward_structure,
    known={"3dcdc142e81cadddd1921a11": _TORCHAUDIO},
)

RULES = (CONVOLUTION, FEED_FORWARD, ATTENTION)
