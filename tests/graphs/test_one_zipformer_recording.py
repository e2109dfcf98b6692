# SPDX-License-Identifier: Apache-2.0
"""One recording of a Zipformer serves every batch: recordings in a row of fixed length give what they give without
padding. In training a row with room for as many recordings as the batch has draws the same random numbers."""

import copy
import random
import sys
from functools import partial

import pytest
import torch
from recorded import lengths_on_a_row, on_rows, packed_frames, without_padding
from steps import close, cotangent, gradients_by_name, moved, numbers, same_gradients, seeded, set_batch_count

import fastasr
from fastasr.models.common import ragged
from fastasr.models.zipformer import Zipformer
from fastasr.models.zipformer.whitening import Whiten
from fastasr.testing.tape import TapeRecorder

FRAMES, RECORDINGS, LONGEST, BINS = 300, 4, 160, 24  # of the encoder's input
ROOM = {"frames": 2 * FRAMES - 1, "recordings": RECORDINGS, "longest": 2 * LONGEST - 1}  # of features
SIZES = {
    "downsampling_factor": (1, 2, 4),
    "encoder_dim": (BINS, 32, 16),
    "num_encoder_layers": 1,
    "encoder_unmasked_dim": (16, 20, 12),
    "query_head_dim": (8,),
    "pos_head_dim": (4,),
    "value_head_dim": (6,),
    "num_heads": (2,),
    "feedforward_dim": (32,),
    "cnn_module_kernel": (7, 5, 3),
    "pos_dim": 16,
    "warmup_batches": 10.0,
}
KINDS = "ours", "swapped"
# Frames of chunks and of the left context, -1: all. Recordings are shorter and longer than the chunks.
WINDOWS = (4, 4), (8, -1), (16, 32), (64, 16), (-1, -1)


def chunks(size, left):
    return {"causal": True, "chunk_size": (size,), "left_context_frames": (left,)}


FORMS = {
    "ours": {},
    "swapped": {},
    "ours, chunks": chunks(8, 16),
    "swapped, chunks of a recording": chunks(-1, -1),
}
recorded = partial(on_rows, **ROOM, after=1)
ROUNDED = 1e-6  # numbers of the host are float32 on the device


def prepared(model, batch_count=20000.0):
    """Returns the model in float64, this far in its schedules and without random memory checks."""
    for module in set_batch_count(model, batch_count).modules():
        if hasattr(module, "mem_cutoff"):
            module.mem_cutoff = lambda _: False
        if hasattr(module, "encoder_pos"):  # a row draws for the longest recording that it has room for
            module.encoder_pos.dropout.p = 0.0
    return moved(model, 0.03).double()


def encoder(kind, batch_count=20000.0, **options):
    seeded(0)
    if kind == "ours":
        model = Zipformer(**SIZES, **options)
    else:
        modules = pytest.importorskip("zipformer.modules.zipformer")
        import tiny_zipformer

        with tiny_zipformer.plain_swoosh():
            model = modules.Zipformer(**{**SIZES, "num_encoder_layers": (1, 1, 1)}, **options)
    return prepared(model, batch_count)


def batch(lengths, frames=None, seed=1):
    """Returns frames, their numbers and the mask. Padding holds noise."""
    frames = frames or max(lengths)
    x = torch.randn(frames, len(lengths), BINS, generator=numbers(seed)).double() * 3
    lengths = torch.tensor(lengths)
    return x, lengths, torch.arange(frames) >= lengths[:, None]


def drawn(count, recordings=None):
    """Yields lengths of batches that fit, among them the shortest, empty ones, and a row that is exactly full."""
    first = [100, 60], [1], [160, 140], [75] * 4, [0, 90], [1, 1, 1, 1], [90, 0, 17], [90, 0, 17, 0]
    row, first = (FRAMES, RECORDINGS, LONGEST), [n for n in first if recordings in (None, len(n))]
    return lengths_on_a_row(count, row, first, recordings, least=4)


def existing(y, lengths):
    return (torch.arange(len(y), device=y.device)[:, None] < (lengths + 1) // 2)[..., None]


def call(model, x, lengths):
    """Returns the hidden states (B, T, D) of a padded batch (B, T, BINS), and their lengths."""
    mask = torch.arange(x.shape[1], device=x.device) >= lengths.to(x.device)[:, None]
    y, after = model(x.transpose(0, 1), lengths, mask)
    return y.transpose(0, 1), after


def call_packed(model, given):
    found, after = model(given, given.lengths)
    assert torch.equal(found.lengths, after)
    return found


def given_packed(x, x_lens):
    """Returns the arguments of a call with PackedFrames: NaN in the frames behind the last recording."""
    return packed_frames(x.transpose(0, 1), x_lens, FRAMES), x_lens


def step(model, x, lengths, mask, packed=False):
    """Returns the output and the gradients by name, of a padded batch or of its PackedFrames."""
    x = x.clone().requires_grad_(model.training)
    with torch.set_grad_enabled(model.training):
        y, after = model(*given_packed(x, lengths)) if packed else model(x, lengths, mask)
    if packed:
        y = y.unpacked((len(x) + 1) // 2).transpose(0, 1)
    assert torch.equal(after, (lengths + 1) // 2)
    if not model.training:
        return y, {}
    loss = (y * cotangent(y.cpu()).to(y) * existing(y, lengths)).sum()
    return y.detach(), gradients_by_name(model, loss, x)


def of_whitening(model):
    return [m.prob for m in model.modules() if isinstance(m, Whiten) or type(m).__name__ == "Whiten"]


def same_steps(ours, theirs, count, packed=False, batches=()):
    """Asserts that training steps have the same values, gradients, draws and probabilities of whitening."""
    for seed, lengths in enumerate(batches or drawn(count, recordings=RECORDINGS)):
        inputs, results = batch(lengths, seed=seed), []
        for each, more in ((ours, packed), (theirs, False)):
            seeded(seed)
            found = step(each, *inputs, packed=more)
            results.append((*found, of_whitening(each), random.random(), torch.rand(())))
        (y, gradients, *state), (expected, wanted, *states) = results
        close(y * existing(y, inputs[1]), expected * existing(y, inputs[1]), 1e-9)
        same_gradients(gradients, wanted, ROUNDED)
        assert state == states


@pytest.mark.parametrize("batch_count", [6000.0, 60000.0])
@pytest.mark.parametrize("form", FORMS)
def test_training_steps_as_without_padding(form, batch_count):
    """Values, gradients, every draw and what Whiten keeps, in one recording for all batches."""
    model = encoder(form.partition(",")[0], batch_count, **FORMS[form]).train()
    theirs = without_padding(copy.deepcopy(model))
    ours, graphs = recorded(model)
    same_steps(ours, theirs, 8)
    assert len(graphs.graphs) == 1
    (found,) = fastasr.graph_state(ours)[""]
    assert (found.recorded, found.replayed, found.reason) == (1, 7, None)


def test_training_steps_that_no_row_holds():
    model = encoder("ours").train()
    theirs = without_padding(copy.deepcopy(model))
    ours, graphs = recorded(model)
    same_steps(ours, theirs, 2, batches=([FRAMES // 3] * 4, [LONGEST + 1, 1, 0, 9]))
    assert not graphs.graphs


def test_every_decision(monkeypatch):
    """Layers are skipped, attention is constant and scores are penalised in some steps of one recording."""
    attention = sys.modules["fastasr.models.zipformer.attention"]
    monkeypatch.setattr(attention, "PENALISED_CALLS", 0.5)
    monkeypatch.setattr(attention, "SCORE_LIMIT", 0.1)
    monkeypatch.setattr(attention, "SCORE_PENALTY", 0.1)
    # the penalty acts on hidden scores of recordings that share a call
    monkeypatch.setattr(ragged, "LACKING", 0)
    model = encoder("ours", 6000.0).train()
    for layer in (m for m in model.modules() if hasattr(m, "const_attention_rate")):
        del layer.const_attention_rate
        layer.const_attention_rate = 0.5
    theirs = without_padding(copy.deepcopy(model))
    ours, graphs = recorded(model, after=0)
    same_steps(ours, theirs, 12)
    assert len(graphs.graphs) == 1


def test_the_first_batches_run_on_an_unrecorded_row():
    """Positions are skipped at random in them, which no recording can decide. Later batches are recorded."""
    model = encoder("ours", 3999.0).train()
    theirs = without_padding(copy.deepcopy(model))
    ours, graphs = recorded(model, after=0)
    same_steps(ours, theirs, 8)
    (kind,) = graphs.kinds.values()
    assert "skipped at random in the first batches" in kind.reason
    assert not graphs.graphs
    for each in (ours, theirs):
        set_batch_count(each, 4000.0)
    same_steps(ours, theirs, 4)
    assert (kind.reason, kind.recorded, kind.seen, kind.replayed) == (None, 1, 12, 4)


def test_without_a_mask_all_frames_exist():
    ours, graphs = recorded(encoder("ours").eval(), after=0)
    x, x_lens, mask = batch([80, 80])
    with torch.no_grad():
        assert torch.equal(ours(x, x_lens)[0], ours(x, x_lens, mask)[0])
    assert len(graphs.graphs) == 1


def test_stacks_are_not_recorded_one_by_one():
    ours, graphs = recorded(encoder("ours").eval(), after=0, parts=True)
    theirs = without_padding(encoder("ours").eval())
    inputs = batch([90, 0, 40])
    with torch.no_grad():
        assert torch.equal(ours(*inputs)[0], theirs(*inputs)[0])
    assert not graphs.graphs
    assert "its stacks are not recorded one by one on a row" in str(fastasr.why(ours))


def change(model, what):
    layer = model.encoders[0].layers[0]
    if what == "a convolution":
        conv = layer.conv_module1.depthwise_conv
        layer.conv_module1.depthwise_conv = torch.nn.Sequential(conv)
    elif what == "straight through":
        layer.bypass.straight_through_rate = 0.1
    else:
        layer.norm.register_forward_hook(lambda module, inputs, y: None)


NO_ROW = {
    "a convolution": "encoders.0.layers.0.conv_module1 has parts that are not upstream's, or have hooks",
    "straight through": "encoders.0.layers.0.bypass lets sequences straight through",
}


@pytest.mark.parametrize("what", NO_ROW)
def test_what_no_row_can_hold(what):
    model = encoder("ours").eval()
    change(model, what)
    theirs = without_padding(copy.deepcopy(model))
    model.ragged = True
    options = fastasr.Graphs(**ROOM, recorder=TapeRecorder)
    report = fastasr.accelerate(model, ragged=True, graphs=options)
    assert NO_ROW[what] in f"{report.graphs['']} {report.rows[0].reason}"
    inputs = batch([100, 60])
    with torch.no_grad():
        assert torch.equal(model(*inputs)[0], theirs(*inputs)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_no_row_holds_runs_in_windows(kind):
    """A call without padding makes no mask of time by time either."""
    model = encoder(kind, **chunks(8, 16)).eval()
    theirs = without_padding(copy.deepcopy(model))
    ours, _ = recorded(model)
    inputs = batch([LONGEST + 9] * 2)
    with torch.no_grad():
        close(ours(*inputs)[0], theirs(*inputs)[0], 1e-12)
    (row,) = [row for row in fastasr.why(ours).rows if row.key == "forward"]
    assert row.calls == 1
    assert row.left.startswith("not replayed: it is padded to more frames than Graphs(longest=")


@pytest.mark.parametrize("causal", [True, False])
def test_without_padding_only_a_row_has_one_shape(causal):
    model = without_padding(encoder("ours", causal=causal))
    report = fastasr.accelerate(model, ragged=True, graphs=fastasr.Graphs(recorder=TapeRecorder))
    assert report.graphs[""].endswith("Graphs(frames=..., recordings=...) gives it one shape")


@pytest.mark.parametrize("kind", KINDS)
def test_each_choice_of_chunks_is_recorded_once(kind):
    choices = {"chunk_size": (4, 16, -1), "left_context_frames": (16, -1)}
    model = encoder(kind, 60000.0, causal=True, **choices).train()
    theirs = without_padding(copy.deepcopy(model))
    ours, _ = recorded(model)
    same_steps(ours, theirs, 10)
    kinds = fastasr.graph_state(ours)[""]
    assert 1 < len(kinds) <= 5  # no left context is drawn for whole recordings
    assert any(kind.recorded for kind in kinds)
    assert all((kind.recorded, kind.replayed) == (kind.seen > 1, kind.seen - 1) for kind in kinds)


def test_gradients_of_packed_frames():
    model = encoder("ours", 60000.0).train()
    theirs = without_padding(copy.deepcopy(model))
    ours, _ = recorded(model, after=0)
    same_steps(ours, theirs, 4, packed=True)


def test_packed_frames_need_an_encoder_without_padding():
    model = encoder("ours").eval()
    given, lengths = given_packed(*batch([20, 30])[:2])
    with pytest.raises(ValueError, match=r"PackedFrames, but encoder\.ragged is False"):
        model(given, lengths)
    model.ragged = True
    with pytest.raises(ValueError, match="a mask too"):
        model(given, lengths, torch.zeros(2, 30, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"a sum of at most 300 frames, got \[200, 200\]"):
        model(given._replace(lengths=torch.tensor([200, 200])), lengths)
    assert model(given._replace(lengths=torch.tensor([0, 0])), lengths)[0].frames.shape == (0, 32)


def still(model):
    """Returns the model without random decisions."""
    rates = "attention_skip_rate", "conv_skip_rate", "ff2_skip_rate", "ff3_skip_rate", "const_attention_rate"
    for module in model.modules():
        for name in (*rates, "skip_rate", "dropout_p", "prob", "grad_scale"):
            if hasattr(module, name):
                module._modules.pop(name, None)
                setattr(module, name, 0.0)
    kept = [1.0] * len(SIZES["encoder_dim"])
    model.get_feature_masks = lambda x: kept
    return model


def each_alone(model):
    """Returns the model, whose forward runs each recording alone."""
    forward = model.forward

    def of_batch(x, lengths, mask):
        y = []
        for i, n in enumerate(lengths.tolist()):
            one = x[:n, i : i + 1]
            found = forward(one, lengths[i : i + 1], mask[i : i + 1, :n])[0][:, 0] if n else None
            y.append(x.new_zeros(0, max(SIZES["encoder_dim"])) if found is None else found)
        rows = [torch.nn.functional.pad(one, (0, 0, 0, (len(x) + 1) // 2 - len(one))) for one in y]
        return torch.stack(rows, 1), (lengths + 1) // 2

    model.forward = of_batch
    return model


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("way", ["recorded", "without padding"])
@pytest.mark.parametrize("train", [True, False])
def test_chunks_as_of_each_recording_alone(window, way, train, monkeypatch):
    """The other model is upstream's own code, unswapped, on one recording at a time."""
    monkeypatch.setattr(random, "random", lambda: 0.5)  # no call of either model penalises large scores
    model = still(encoder("swapped", 60000.0, **chunks(*window))).train(train)
    theirs = each_alone(copy.deepcopy(model))
    ours = recorded(model)[0] if way == "recorded" else without_padding(model)
    batches = list(drawn(6, RECORDINGS) if train else drawn(9))
    for seed, lengths in enumerate(batches):
        inputs = batch(lengths, seed=seed)
        y, gradients = step(ours, *inputs)
        expected, wanted = step(theirs, *inputs)
        close(y * existing(y, inputs[1]), expected, 1e-9)
        if train:
            same_gradients(gradients, wanted, ROUNDED)
    if way == "recorded":
        (found,) = fastasr.graph_state(ours)[""]
        assert (found.recorded, found.replayed, found.reason) == (1, len(batches) - 1, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_without_decisions_as_in_float64_on_a_cpu(kind, train, device, monkeypatch):
    monkeypatch.setattr(sys.modules["fastasr.models.zipformer.attention"], "PENALISED_CALLS", 0.0)
    model = still(encoder(kind, 60000.0)).train(train)
    theirs = without_padding(copy.deepcopy(model))
    if kind == "ours":
        model.ragged = True
    tapes = TapeRecorder()
    recorder = None if device == "cuda" else lambda: tapes
    options = fastasr.Graphs(**ROOM, recorder=recorder)
    model = model.float().to(device)
    fastasr.accelerate(model, ragged=True, graphs=options)
    for seed, lengths in enumerate(drawn(8, recordings=RECORDINGS)):
        inputs = batch(lengths, seed=seed)
        y, gradients = step(model, inputs[0].float().to(device), *(t.to(device) for t in inputs[1:]))
        expected, wanted = step(theirs, *inputs)
        valid = existing(expected, inputs[1])
        close(y.cpu().double() * valid, expected * valid, 1e-3)
        if train:
            same_gradients({name: g.cpu().double() for name, g in gradients.items()}, wanted, 1e-2)
    (found,) = fastasr.graph_state(model)[""]
    assert (found.replayed, found.recorded, found.reason) == (6, 1, None)
