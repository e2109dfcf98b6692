# SPDX-License-Identifier: Apache-2.0
"""Layers of other packages without padding: values and gradients at the frames that exist are upstream's, changes of a
layer's parts hold, and calls that need padding run on it."""

import copy

import families
import pytest
import torch
from steps import seeded, swapped

import fastasr

CHUNKS = {"speech_encoder_chunk_size": 21, "speech_encoder_left_chunk_num": 128}
KINDS = torch.bool, torch.uint8  # of masks
STILL = {"layers": 2, "hidden_dropout": 0.0, "activation_dropout": 0.0}
# Family -> its model, without dropout, and whether it can train here: batch norms read other frames without padding
LAYERS = {
    "w2v-bert": (families.w2v_bert(conformer_conv_dropout=0.0), True),
    "w2v-bert, relative": (
        families.w2v_bert(conformer_conv_dropout=0.0, position_embeddings_type="relative"),
        True,
    ),
    "seamless m4t": (families.FAMILIES["seamless m4t"], False),
    "seamless m4t v2": (families.seamless_v2(speech_encoder_dropout=0.0, **CHUNKS), True),
    "wav2vec2": (families.wav2vec2("Wav2Vec2", **STILL), True),
    "wav2vec2, eager": (families.wav2vec2("Wav2Vec2", implementation="eager", **STILL), True),
    "wav2vec2 large": (families.wav2vec2("Hubert", norms=("StableLayerNorm",), **STILL), True),
    "omniasr": (families.omniasr(hidden_dropout=0.0, activation_dropout=0.0), True),
    "fireredasr": (families.firered(dropout=0.0), True),
    "gigaam": (families.gigaam("rel_pos"), False),
    "gigaam, rotary": (families.gigaam("rotary"), False),
    "nemo conformer": (families.conformer("nemo", dropout=0.0), False),
    "nemo conformer, layer norm": (
        families.conformer("nemo", dropout=0.0, conv_norm_type="layer_norm"),
        True,
    ),
}


def layers(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2][-1]


def make(name):
    """Returns upstream's model, a copy of it, and a function that runs a model: (output (B, T, C), valid (B, T))."""
    seeded(name)
    model, run = LAYERS[name][0]()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    seen = []
    hook = layers(model)[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append([*args, *kwargs.values()]), with_kwargs=True
    )
    y = run(model)[0]
    hook.remove()
    masks = [t for t in seen[0] if isinstance(t, torch.Tensor) and (t.dtype in KINDS or t.dim() == 4)]
    mask = masks[-1]  # of the convolution, or of the attention if there is none
    mask = mask[:, 0, 0].eq(mask.max()) if mask.dim() == 4 else mask.flatten(1)
    first = mask[:, :1].bool()  # Some masks are True at padding: the first frame is none.
    valid = mask.bool() == first
    assert not valid.all()
    batch_last = y.shape[1:2] != valid.shape[1:2]

    def both(model):
        y = run(model)[0]
        return y.transpose(1, 2) if batch_last else y

    return model, copy.deepcopy(model), both, valid


def compare(ours, theirs, run, valid, gradients=True):
    found, weight = [], None
    for model in (ours, theirs):
        model.zero_grad()
        y = run(model)
        weight = torch.randn_like(y) * valid.unsqueeze(-1) if weight is None else weight
        if gradients:
            (y * weight).sum().backward()
        found.append((y.detach()[valid], {k: p.grad for k, p in model.named_parameters()}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    if gradients:
        largest = max(g.abs().max() for g in found[1][1].values() if g is not None)
        for name, expected in found[1][1].items():
            grad = found[0][1][name]
            assert (grad is None) == (expected is None), name
            if grad is not None:
                assert (grad - expected).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize("name", LAYERS)
def test_frames_that_exist(name):
    theirs, ours, run, valid = make(name)
    report = fastasr.accelerate(ours, ragged=True)
    assert list(report.ragged.values()) == [None, None]
    assert "without padding: 2 of 2" in report.summary
    outputs = []
    hook = layers(ours)[1].register_forward_hook(lambda layer, args, y: outputs.append(y))
    for training in (False, True)[: 1 + LAYERS[name][1]]:
        ours.train(training), theirs.train(training)
        compare(ours, theirs, run, valid)
    last = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    assert not last[~valid].any()
    assert last[valid].any(-1).all()
    hook.remove()
    assert fastasr.explain(ours).ragged == report.ragged
    with fastasr.backend("eager"):  # without native calls for packed frames
        compare(ours.eval(), theirs.eval(), run, valid)
    fastasr.restore(ours)
    with torch.no_grad():
        assert torch.equal(run(ours), run(theirs))


@pytest.mark.parametrize("name", ["gigaam", "gigaam, rotary", "nemo conformer", "seamless m4t"])
def test_a_training_step_with_batch_norm(name):
    _, ours, run, valid = make(name)
    fastasr.accelerate(ours.train(), ragged=True)
    seeded(1)
    run(ours)[valid].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


class _Other(torch.nn.Linear):
    """Stands for an adapter in the place of a layer."""

    def __init__(self, layer):
        super().__init__(1, 1)
        self.inner = [layer]
        self.kernel_size = getattr(layer, "kernel_size", None)  # upstream reads it

    def forward(self, *args, **kwargs):
        return self.inner[0](*args, **kwargs) * 1.5


@pytest.mark.parametrize("change", ["hook", "adapter", "taps", "scaling"])
@pytest.mark.parametrize(
    "name", ["w2v-bert", "seamless m4t", "fireredasr", "gigaam", "nemo conformer", "wav2vec2"]
)
def test_changed_parts(name, change):
    """A change of any part after the swap holds: the layer calls the part, or runs on padding."""
    theirs, start, run, valid = make(name)
    paths = [path for path, _ in layers(theirs)[0].named_modules() if path]
    for path in paths:
        ours, changed = copy.deepcopy(start), copy.deepcopy(theirs)
        fastasr.accelerate(ours, ragged=True)
        for model in (ours, changed):
            layer = layers(model)[0]
            part = layer.get_submodule(path)
            if change == "hook":
                part.register_forward_hook(
                    lambda part, args, y: (
                        tuple(t if t is None else 1.1 * t for t in y) if isinstance(y, tuple) else 1.1 * y
                    )
                )
            elif change == "adapter" and isinstance(part, torch.nn.Linear | torch.nn.Conv1d):
                layer.set_submodule(path, _Other(part))
            elif change == "taps" and isinstance(part, torch.nn.Conv1d) and part.kernel_size == (1,):
                seeded(path)
                layer.set_submodule(path, _wider(part))
            elif change in vars(part):
                setattr(part, change, 3.0)
        with torch.no_grad():
            found, expected = run(ours)[valid], run(changed)[valid]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=path)


def _wider(conv):
    """Returns a convolution of the same sizes that sees the frames around its own."""
    bias = conv.bias is not None
    return torch.nn.Conv1d(conv.in_channels, conv.out_channels, 3, padding=1, bias=bias)


def test_reasons():
    ours = make("w2v-bert")[1]
    report = fastasr.accelerate(ours, ragged=True, exclude="layers.1.self_attn")
    assert report.ragged == {"layers.0": None, "layers.1": "its attention is not swapped"}
    ours = make("w2v-bert")[1]
    report = fastasr.accelerate(ours, ragged=True, exclude="layers.0.conv_module")
    assert report.ragged == {"layers.0": "its convolution module is not swapped", "layers.1": None}
    ours = make("w2v-bert")[1]
    options = {"ragged": True, "graphs": fastasr.Graphs(recorder=dict)}
    report = fastasr.accelerate(ours, **options)
    assert report.graphs == {"": "it runs without padding, in another shape at every call"}


ON_PADDING = {
    "a limited context": families.conformer("nemo", dropout=0.0, att_context_size=[3, 3]),
    "chunks of a limited context": families.conformer(
        "nemo", dropout=0.0, att_context_size=[4, 3], att_context_style="chunked_limited"
    ),
    "chunks": families.seamless_v2(speech_encoder_chunk_size=8, speech_encoder_left_chunk_num=1),
}


@pytest.mark.parametrize("made", ON_PADDING.values(), ids=ON_PADDING)
def test_what_runs_on_padding(made):
    seeded(0)
    theirs, run = made()
    ours = swapped(theirs.eval(), ragged=True)
    with torch.no_grad():
        torch.testing.assert_close(run(ours)[0], run(theirs)[0], rtol=1e-4, atol=1e-5)


def test_upstream_draws_run_on_padding():
    seeded(0)
    theirs, run = families.FAMILIES["seamless m4t v2"]()
    ours = swapped(theirs, ragged=True)
    results = []
    with fastasr.upstream_draws():
        for model in (ours, theirs):
            seeded(1)
            results.append(run(model.train())[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
