# SPDX-License-Identifier: Apache-2.0
"""The transducer loss of icefall's AsrModel, whose labels are ragged."""

import icefall_checkout
import torch
from icefall_loss import Ragged

from fastasr.asr.recogniser import AsrModel
from fastasr.swap.rules.zipformer.asr_model import ICEFALL_MODEL


def test_ragged_labels_give_the_losses_of_lists():
    from tiny_recogniser import RECOGNISER

    model = AsrModel(**RECOGNISER)
    frames, lengths = torch.randn(3, 20, model.simple_am_proj.in_features), torch.tensor([20, 14, 9])
    rows = [[3, 5, 2, 1], [], [4, 1]]
    ((_, ragged),) = ICEFALL_MODEL.methods
    y = Ragged(rows)
    ours = ragged(model, frames, lengths, y, y.shape.row_splits(1).diff(), 4, 0.1, 0.2)
    assert ours == model.forward_transducer(frames, lengths, rows, 4, 0.1, 0.2)


@icefall_checkout.needed
def test_the_recipes_model_both_ways():
    status, rule, error = icefall_checkout.printed(__file__, "icefall_loss.py").split()
    assert (status, rule) == ("replaced", "zipformer.asr_model")
    assert float(error) < 1e-5
