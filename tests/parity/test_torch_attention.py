# SPDX-License-Identifier: Apache-2.0
"""torch's MultiheadAttention inside torchaudio's Conformer, and SpeechBrain's around it, with every kind of mask and
option. ``test_other_conformers.py`` has the encoders."""

import copy

import families
import pytest
import torch
from steps import moved, outcome, same, seeded, swapped
from tiny_conformers import torchaudio_conformer

import fastasr

B, T, WIDTH = 3, 11, families.WIDTH
PADDING = torch.arange(T) >= torch.tensor([T, 6, 2])[:, None]
FUTURE = torch.ones(T, T, dtype=torch.bool).triu(1)
# the call's arguments, and whether upstream's code serves it
CALLS = {
    "no mask": ({}, False),
    "padding": ({"key_padding_mask": PADDING}, False),
    "pairs": ({"attn_mask": FUTURE}, False),
    "both": ({"key_padding_mask": PADDING, "attn_mask": FUTURE}, False),
    "weights": ({"need_weights": True}, True),
    "numbers": ({"attn_mask": FUTURE * -2.0}, True),
    "pairs of each head": ({"attn_mask": FUTURE.expand(B * families.HEADS, T, T)}, True),
    "causal": ({"attn_mask": FUTURE, "is_causal": True}, True),
}


def pair(**options):
    """Returns two copies of a torchaudio Conformer's attention, the first swapped, and the report."""
    seeded("torch attention")
    theirs = torchaudio_conformer(dropout=0.0)
    theirs.conformer_layers[0].self_attn = torch.nn.MultiheadAttention(WIDTH, families.HEADS, **options)
    theirs = moved(theirs, 0.1).double()
    ours = copy.deepcopy(theirs)
    report = fastasr.accelerate(ours)
    return [model.conformer_layers[0].self_attn for model in (ours, theirs)], report


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_calls(name, options):
    models, _ = pair(**options)
    given, is_upstreams = CALLS[name]
    shape = (B, T, WIDTH) if options.get("batch_first") else (T, B, WIDTH)
    x = torch.randn(shape, dtype=torch.float64)
    given = {"need_weights": False} | given

    def run(model):
        y, weights = model(x, x, x, **given)
        return [y] if weights is None else [y, weights]

    for training in (False, True):
        same(*(outcome(model, run, training) for model in models), 1e-10, share=1.0)
    assert bool(fastasr.why(models[0]).to_dict()) == is_upstreams


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 8}, "kdim or vdim is not embed_dim"),
        ({"add_zero_attn": True}, "add_bias_kv or add_zero_attn is set"),
        ({"add_bias_kv": True}, "add_bias_kv or add_zero_attn is set"),
    ],
    ids=str,
)
def test_what_is_declined(options, reason):
    _, report = pair(**options)
    (row,) = [row for row in report.skipped if row.path == "conformer_layers.0.self_attn"]
    assert row.reason == reason


def test_keys_of_another_sequence():
    models, _ = pair()
    x, keys = torch.randn(2, T, B, WIDTH, dtype=torch.float64)
    run = lambda model: [model(x, keys, keys, need_weights=False)[0]]  # noqa: E731
    same(*(outcome(model, run, True) for model in models), 1e-10, share=1.0)


def test_attention_elsewhere_is_left_alone():
    """SpeechBrain's decoders ask for its weights, and torchaudio's WavLM reads its parameters."""
    model, _ = families.make("torchaudio wavlm")
    rows = fastasr.accelerate(model).skipped
    reasons = {row.reason for row in rows if row.class_name == "MultiheadAttention"}
    assert reasons == {"is replaced only beside other classes, which this model lacks"}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("kind", ["no mask", "padding", "no frames", "pairs", "positions"])
def test_speechbrain(kind, weights):
    """Upstream gives NaN for a recording without frames if it is asked for weights."""
    seeded("speechbrain")
    theirs = families.make("speechbrain transformer")[0].double()
    ours = swapped(theirs)
    x = torch.randn(B, T, WIDTH, dtype=torch.float64)
    given = {
        "no mask": {},
        "padding": {"key_padding_mask": PADDING},
        "no frames": {"key_padding_mask": torch.arange(T) >= torch.tensor([T, 6, 0])[:, None]},
        "pairs": {"attn_mask": FUTURE},
        "positions": {"pos_embs": torch.randn(T, T, dtype=torch.float64)},
    }[kind]
    found = []
    for model in (ours, theirs):
        with torch.no_grad():
            y = model.layers[0].self_att(x, x, x, return_attn_weights=weights, **given)
        found.append(y[0] if weights else y)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10, equal_nan=True)
    left = fastasr.why(ours).to_dict()
    assert bool(left) == (kind in ("pairs", "positions"))
    assert all("a mask of pairs of frames, as that of a decoder" in reason for reason in left.values())


def test_a_decoder_of_speechbrain():
    """Its masks are numbers, and its searches read the weights of its attention to the encoder's frames."""
    module = pytest.importorskip("speechbrain.lobes.models.transformer.Transformer")
    seeded("decoder")
    sizes = {"d_ffn": families.HIDDEN, "nhead": families.HEADS, "d_model": WIDTH}
    theirs = moved(module.TransformerDecoder(2, **sizes), 0.1).double().eval()
    ours = swapped(theirs)
    memory, x = torch.randn(2, B, T, WIDTH, dtype=torch.float64)
    mask = torch.zeros(T, T, dtype=torch.float64).masked_fill(FUTURE, -torch.inf)
    with torch.no_grad():
        found, expected = (model(x, memory, tgt_mask=mask) for model in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
