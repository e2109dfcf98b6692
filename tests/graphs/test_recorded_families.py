# SPDX-License-Identifier: Apache-2.0
"""Upstream's models of every framework whose encoders are recorded: swapped and recorded, they compute and train as
swapped and unrecorded, with the same random numbers, also on a batch with other lengths than the recorded one."""

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
    # in inference it runs chunk by chunk, by a method that is not recorded
    "zipformer, causal": (None, True),
    "zipformer recogniser": (True, True),
    "parakeet": (True, False),  # drops layers at random
    "nemo conformer": (True, True),
    "nemo local": (True, True),
    "speechbrain conformer": (True, True),
    "speechbrain transformer": (True, True),
    "fastspeech2 conformer": (True, True),
    "torchaudio conformer": (False, False),  # these read lengths on the host
    "espnet conformer": (False, False),
    "e-branchformer": (False, False),
    "owsm": (False, False),
    "espnet transformer": (False, False),
    "fireredasr": (False, False),
    "phi-4": (False, False),  # reads its mask on the host
    **dict.fromkeys(
        (
            "w2v-bert",
            "wav2vec2 conformer",
            "wav2vec2",
            "wav2vec2 large",
            "wav2vec2's copies",
            "audio flamingo 3",
            "speech2text",
            "omniasr",
            "seamless m4t",
            "lasr",
            "fun-asr-nano",
            "moonshine",
            "nemotron transcribe",
            "nemotron diarization",
            "mimi",
        ),
        (False, False),
    ),  # transformers reads on the host whether the mask hides anything
    **dict.fromkeys(
        (
            "gigaam",
            "gigaam, rotary",
            "nemo transformer",
            "granite speech",
            "granite speech plus",
            "granite speech 5",
        ),
        (True, True),
    ),
    "whisper": (True, True),
    "openai whisper": (True, True),
    "whisper's copies": (True, True),
    **dict.fromkeys(("glm-asr", "moonshine streaming"), (True, True)),
    # Their lengths make the row of recordings.
    **dict.fromkeys(("qwen3-asr", "qwen2.5-omni", "qwen3-omni"), (False, False)),
    **dict.fromkeys(("seamless m4t v2", "wavlm", "wavlm large", "gemma 3n", "gemma 4"), (True, True)),
    **({"zipvoice": (True, True)} if families.CHECKOUT else {}),
}


class _Reversed:
    """Calls a model on the recordings of a batch in the reverse order: equal shapes with other lengths."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.dim()]
        sizes = {len(t) for t in tensors} - {1}
        if len(sizes) > 1:  # not batch first
            return self.model(*args, **kwargs)

        def turned(a):
            return a.flip(0) if isinstance(a, torch.Tensor) and a.dim() else a

        return self.model(*map(turned, args), **{name: turned(a) for name, a in kwargs.items()})


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
            found.append(
                [
                    *run(_Reversed(model) if seed == 3 else model),
                    torch.rand(()),
                    torch.tensor(random.random()),
                ]
            )
        for a, b in zip(*found, strict=True):
            scale = b.detach().abs().max().item() if b.numel() and b.is_floating_point() else 0.0
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)
    state = {path: kinds for path, kinds in fastasr.graph_state(ours).items() if kinds}
    wholes = [kind for path in report.graphs for kind in state.get(path, ())]
    whole = WHOLE[name][train]
    if whole is not None:
        assert {kind.replayed > 0 for kind in wholes} == {whole}
        assert any(kind.replayed for kinds in state.values() for kind in kinds)
