# SPDX-License-Identifier: Apache-2.0
"""Every option of ``accelerate`` on the encoders of other packages: it is served, or the report says why not.
``tests/graphs/test_recorded_families.py`` has ``graphs=True``."""

import families
import pytest
import torch
from steps import relative

import fastasr
from fastasr.ops import _reduced_weights
from fastasr.swap import weights
from fastasr.swap.rules.recorded import IN_A_ROW, PADDED

NO_LENGTHS = "it takes no lengths, so its frames see padding"
PACKED = {"layers.0": None, "layers.1": None}
POSITIONS = ("linear_pos",)  # Projected positions are kept, so that no product is left to measure.
# Family -> why an encoder or a layer runs on padding (None: it does not), and the layers that stay in float32
OPTIONS = {
    "wav2vec2 conformer": ({"": PADDED}, POSITIONS),
    "seamless m4t": (PACKED, POSITIONS),
    "seamless m4t v2": (PACKED, ()),
    "w2v-bert": (PACKED, ()),
    "granite speech": ({"": NO_LENGTHS}, ()),
    "granite speech plus": ({"": NO_LENGTHS}, ()),
    "granite speech 5": ({"": PADDED}, ()),
    "lasr": ({"": PADDED}, ()),
    "fun-asr-nano": ({"": PADDED}, ()),
    "wavlm": ({"": PADDED}, ()),
    "wavlm large": ({"": PADDED}, ()),
    "whisper": ({"": NO_LENGTHS}, ()),
    "openai whisper": ({"": NO_LENGTHS}, ()),
    "audio flamingo 3": ({"": PADDED}, ()),
    "speech2text": ({"": PADDED}, ()),
    "speecht5": ({}, ()),
    "wav2vec2": (PACKED, ()),
    "wav2vec2 large": (PACKED, ()),
    "omniasr": (PACKED, ()),
    **dict.fromkeys(("qwen3-asr", "qwen2.5-omni", "qwen3-omni"), ({"": IN_A_ROW}, ())),
    "glm-asr": ({"": NO_LENGTHS}, ()),
    **dict.fromkeys(("moonshine", "moonshine streaming"), ({"": PADDED}, ())),
    "voxtral realtime": ({}, ()),
    "mimi": ({"encoder_transformer": NO_LENGTHS}, ("block.3.conv",)),  # torch's convolution of one tap
    **dict.fromkeys(("nemotron transcribe", "nemotron diarization"), ({"": PADDED}, ())),
    "gemma 3n": ({"": PADDED}, ()),
    "gemma 4": ({"": PADDED}, ()),
    "phi-4": ({"": "its attention does not hide padding, but adds 1 to scores"}, ()),
    "funasr": ({}, ()),
    "nemo transformer": ({"": PADDED}, POSITIONS),
    "speechbrain transformer": ({"": PADDED}, ()),
    "owsm": ({"": "layer 0: its attention has no relative positions"}, ()),
    "espnet transformer": ({"": PADDED}, ()),
    "fireredasr": ({"layer_stack.0": None, "layer_stack.1": None}, POSITIONS),
    "gigaam": (PACKED, POSITIONS),
    "gigaam, rotary": (PACKED, ()),
    **({"zipvoice": ({"": PADDED}, ())} if families.CHECKOUT else {}),
}


# Families of other options -> the layers that stay in float32
IN_INT8 = {
    **{name: parts for name, (_, parts) in OPTIONS.items()},
    **dict.fromkeys(("zipformer", "e-branchformer", "emformer", "emformer rnn-t", "mega"), ()),
    **dict.fromkeys(("torchaudio wav2vec2", "torchaudio wav2vec2 large", "torchaudio wavlm"), ()),
    **{f"{name} conformer": POSITIONS for name in families.MODELS},
}


@pytest.mark.parametrize("name", IN_INT8)
def test_int8(name, monkeypatch):
    """Every linear layer runs in int8, small ones included, but for those above and what a search compares; the report
    has the change of the output; and ``restore`` brings the same bits back."""
    monkeypatch.setattr(weights, "SMALL", 0)
    model, calls = families.make(name)
    run = lambda model: calls(model)[0]  # noqa: E731
    with torch.no_grad():
        exact = run(model)
    report = fastasr.accelerate(model, weights="int8", verify=run)
    assert report.ok, str(report)
    with torch.no_grad():
        error = relative(run(model), exact)
    assert 0 < error < 0.05
    assert report.weights.error == pytest.approx(error, rel=1e-3)
    for row in report.weights.rows:
        exact_part = row.reason == weights.SEARCHED or row.path.endswith(IN_INT8[name])
        assert row.format == "int8" or exact_part, (row.path, row.reason)
    assert len(report.weights.reduced) >= 7
    fastasr.restore(model)
    with torch.no_grad():
        assert torch.equal(run(model), exact)


@pytest.mark.parametrize("name", OPTIONS)
def test_bfloat16(name, monkeypatch):
    monkeypatch.setattr(weights, "SMALL", 0)
    model, run = families.make(name)
    with torch.no_grad():
        exact = run(model)[0]
        report = fastasr.accelerate(model, weights="bf16").weights
        error = relative(run(model)[0], exact)
    why_not = _reduced_weights.why_not("bf16")
    kept = [row for row in report.rows if row.format != "bf16"]
    if why_not:  # the instructions of this machine
        assert len(kept) == len(report.rows)
        assert {row.reason for row in kept} == {why_not}
    else:
        assert 1e-5 < error < 0.02
        assert all(row.path.endswith(OPTIONS[name][1]) and row.reason for row in kept)
        assert len(report.reduced) >= 9


@pytest.mark.parametrize("name", OPTIONS)
def test_padding(name):
    model, run = families.make(name)
    with torch.no_grad():
        exact = run(model)[0]
        report = fastasr.accelerate(model, ragged=True)
        found = run(model)[0]
    assert report.ragged == OPTIONS[name][0]
    if None not in report.ragged.values():  # tests/swap/test_ragged_layers.py has the others
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_no_encoder():
    report = fastasr.accelerate(torch.nn.Linear(2, 2), ragged=True)
    assert "without padding: the model holds no encoder that fastasr knows" in str(report)
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2), 1)  # not NeMo's
    report = fastasr.accelerate(model, ragged=True, graphs=fastasr.Graphs(recorder=dict))
    assert report.ragged == report.graphs == {"": "is torch's own class"}
