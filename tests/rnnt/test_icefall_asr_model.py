# SPDX-License-Identifier: Apache-2.0
"""The transducer loss of icefall's AsrModel, whose labels are ragged. FASTASR_ICEFALL: a checkout of icefall."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from icefall_loss import Ragged

from fastasr.models.transducer import AsrModel
from fastasr.swap.rules.zipformer.asr_model import ICEFALL_MODEL

pytestmark = pytest.mark.needs("fastasr", "tests/rnnt/icefall_loss.py")
CHECKOUT = os.environ.get("FASTASR_ICEFALL")


def test_ragged_labels_give_the_losses_of_lists():
    from tiny_recogniser import RECOGNISER

    model = AsrModel(**RECOGNISER)
    frames, lengths = torch.randn(3, 20, model.simple_am_proj.in_features), torch.tensor([20, 14, 9])
    rows = [[3, 5, 2, 1], [], [4, 1]]
    ((_, ragged),) = ICEFALL_MODEL.methods
    y = Ragged(rows)
    ours = ragged(model, frames, lengths, y, y.shape.row_splits(1).diff(), 4, 0.1, 0.2)
    assert ours == model.forward_transducer(frames, lengths, rows, 4, 0.1, 0.2)


@pytest.mark.skipif(not CHECKOUT, reason="FASTASR_ICEFALL names no checkout of icefall")
def test_the_recipes_model_both_ways():
    folder = Path(CHECKOUT) / "egs/librispeech/ASR/zipformer"
    script = Path(__file__).with_name("icefall_loss.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, rule, error = done.stdout.split()
    assert (status, rule) == ("replaced", "icefall.asr_model")
    assert float(error) < 1e-5
