# SPDX-License-Identifier: Apache-2.0
"""Upstream's models of every framework whose encoders are recorded: swapped and recorded, they compute and train as
swapped and unrecorded, with the same random numbers."""

import copy
import random

import families
import pytest
import torch

import fastasr
from fastasr.testing.tape import TapeRecorder

# Family -> whether its encoder is recorded as a whole, in inference and in training; else its layers are
WHOLE = {
    "zipformer": (True, True),
    "zipformer, causal": (
        None,
        True,
    ),  # in inference it runs chunk by chunk, by a method that is not recorded
    "zipformer recogniser": (True, True),
    "parakeet": (True, False),  # drops layers at random
    "nemo conformer": (True, True),
    "nemo local": (True, True),
    "speechbrain conformer": (True, True),
    "fastspeech2 conformer": (True, True),
    "torchaudio conformer": (False, False),  # these read lengths on the host
    "espnet conformer": (False, False),
    "e-branchformer": (False, False),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_recorded_families(name, train):
    ours, run = families.make(name)
    theirs = copy.deepcopy(ours)
    report = fastasr.accelerate(ours, graphs=fastasr.Graphs(after=1, recorder=TapeRecorder))
    fastasr.accelerate(theirs)
    assert set(report.graphs.values()) == {None}
    ours.train(train), theirs.train(train)
    for seed in range(4):
        found = []
        for model in (ours, theirs):
            torch.manual_seed(seed)
            random.seed(seed)
            model.zero_grad()
            found.append([*run(model), torch.rand(()), torch.tensor(random.random())])
        for a, b in zip(*found, strict=True):
            scale = b.detach().abs().max().item() if b.numel() and b.is_floating_point() else 0.0
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)
    state = {path: kinds for path, kinds in fastasr.graph_state(ours).items() if kinds}
    wholes = [kind for path in report.graphs for kind in state.get(path, ())]
    whole = WHOLE[name][train]
    if whole is not None:
        assert {kind.replayed > 0 for kind in wholes} == {whole}
        assert any(kind.replayed for kinds in state.values() for kind in kinds)
