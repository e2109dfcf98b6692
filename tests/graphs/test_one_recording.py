# SPDX-License-Identifier: Apache-2.0
"""One recording of a FastConformer serves every batch: recordings in a row of fixed length give what they give without
padding, in values, gradients and statistics."""

import copy
from functools import partial

import pytest
import torch
from recorded import lengths_on_a_row, on_rows
from steps import close, moved, numbers, seeded
from tiny_conformers import WIDTH, nemo_conformer
from tiny_parakeet import SIZES, STILL

import fastasr
from fastasr.graphs import module as graphs_of
from fastasr.models.common.activations import batch_norm_activated
from fastasr.models.common.row import Spans
from fastasr.models.fast_conformer import FastConformerEncoder
from fastasr.ops import _dispatch
from fastasr.testing.tape import TapeRecorder

FRAMES, RECORDINGS, LONGEST = 400, 5, 240
ROOM = {"frames": FRAMES, "recordings": RECORDINGS, "longest": LONGEST}
BINS, NEMO_BINS = SIZES["num_mel_bins"], WIDTH
recorded = partial(on_rows, **ROOM, after=1)


def encoder(kind, **options):
    if kind == "nemo":
        seeded(0)
        return moved(nemo_conformer(dropout=0.0, **options), 0.03).double()
    transformers = pytest.importorskip("transformers")
    seeded(0)
    config = transformers.ParakeetEncoderConfig(**{**SIZES, **STILL, **options})
    model = (
        FastConformerEncoder.from_config(config) if kind == "ours" else transformers.ParakeetEncoder(config)
    )
    return moved(model, 0.03).double()


def is_nemo(model):
    return type(model).__name__ == "ConformerEncoder"


def run(model, x, mask):
    """Returns the hidden states (B, T, width)."""
    if is_nemo(model):
        return model(audio_signal=x.transpose(1, 2), length=mask.sum(1))[0].transpose(1, 2)
    found = model(x, mask)
    return found[0] if isinstance(found, tuple) else found.last_hidden_state


def call(model, x, lengths):
    """Returns the hidden states (B, T, width) of a padded batch and their lengths."""
    mask = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
    return run(model, x, mask.long()), after(model, lengths)


def call_packed(model, given):
    if is_nemo(model):
        return model(audio_signal=given)
    found = model(input_features=given)
    return found if isinstance(model, FastConformerEncoder) else found.last_hidden_state


def after(model, lengths):
    """Returns the lengths behind the front end."""
    factor = 4 if is_nemo(model) else 8
    return (lengths + factor - 1) // factor


def existing(model, y, mask):
    return torch.arange(y.shape[1], device=y.device) < after(model, mask.sum(1))[:, None]


def batch(lengths, frames=None, seed=1, model=None):
    frames = frames or max(lengths)
    bins = NEMO_BINS if is_nemo(model) else BINS
    x = torch.randn(len(lengths), frames, bins, generator=numbers(seed)).double()
    mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
    return x * mask[..., None], mask.long()


def drawn(count):
    """Yields lengths of batches that fit, among them the shortest, empty ones, and a row that is exactly full."""
    first = [100, 60], [1], [240, 160], [80] * 5, [0, 90], [1, 1, 1, 1, 1], [90, 0, 17]
    return lengths_on_a_row(count, (FRAMES, RECORDINGS, LONGEST), first, least=1)


def test_without_a_mask():
    ours, graphs = recorded(encoder("swapped").eval(), after=0)
    x, mask = batch([80, 80])
    with torch.no_grad():
        found = ours(x)
        assert found.attention_mask is None
        assert torch.equal(found.last_hidden_state, ours(x, mask).last_hidden_state)
    assert len(graphs.graphs) == 1


def test_lengths_beyond_the_batch():
    model = encoder("nemo").eval()
    ours, graphs = recorded(copy.deepcopy(model), after=0)
    x, _ = batch([60, 40], model=model)
    with torch.no_grad():
        found, expected = (
            m(audio_signal=x.transpose(1, 2), length=torch.tensor([90, 40])) for m in (ours, model)
        )
    close(found[0][:, :, :10], expected[0][:, :, :10], 1e-10)
    assert torch.equal(found[1], expected[1])
    assert len(graphs.graphs) == 1


def test_a_mask_of_floats():
    ours, graphs = recorded(encoder("swapped").eval(), after=0)
    x, mask = batch([80, 33])
    with torch.no_grad():
        assert torch.equal(run(ours, x, mask.float()), run(ours, x, mask))
    assert len(graphs.graphs) == 1


def test_what_a_row_cannot_give_runs_as_it_is():
    ours, graphs = recorded(encoder("swapped").eval(), after=0)
    x, mask = batch([80, 40])
    with torch.no_grad():
        asked = ours(x, mask, output_hidden_states=True)
        assert len(asked.hidden_states) == SIZES["num_hidden_layers"] + 1
        assert "output_hidden_states" in str(fastasr.why(ours))
        with fastasr.upstream_draws():
            ours.train()(x, mask)
        seen = []
        handle = ours.eval().layers[0].conv.register_forward_hook(lambda m, args, y: seen.append(y.shape))
        ours(x, mask)
        handle.remove()
    assert seen == [(2, 10, SIZES["hidden_size"])]
    assert not graphs.graphs


@pytest.mark.parametrize("rates", [("dropout", "attention_dropout"), ("activation_dropout",)])
def test_dropout_is_drawn_anew(rates, monkeypatch):
    # the kernel draws that of activations
    monkeypatch.setattr(_dispatch, "serving", lambda family, x: "triton")
    ours, graphs = recorded(encoder("swapped", **dict.fromkeys(rates, 0.3)).train(), after=0)
    x, mask = batch([90, 50])
    first, second = (run(ours, x, mask) for _ in range(2))
    assert len(graphs.graphs) == 1
    assert (first[0] - second[0]).abs().max() > 0.01


@pytest.mark.parametrize("train", [True, False])
def test_a_module_that_no_row_suits_any_more(train):
    ours, graphs = recorded(encoder("swapped").train(train), after=0)
    x, mask = batch([90, 50])
    with torch.set_grad_enabled(train):
        run(ours, x, mask)
        assert len(graphs.graphs) == 1
        norm = ours.layers[0].conv.norm
        ours.layers[0].conv.norm = torch.nn.InstanceNorm1d(len(norm.weight)).double()
        for _ in range(3):
            run(ours, x, mask)
        assert not graphs.graphs
        assert "the norm of the convolution module of layer 0" in str(fastasr.why(ours))
        ours.layers[0].conv.norm = norm
        for _ in range(2):
            run(ours, x, mask)
    assert len(graphs.graphs) == 1


def test_restore_gives_the_padded_encoder_back():
    model = encoder("swapped").eval()
    x, mask = batch([90, 50])
    with torch.no_grad():
        before = run(model, x, mask)
        ours, _ = recorded(model, after=0)
        ours(x, mask)
        fastasr.restore(ours)
        assert torch.equal(run(ours, x, mask), before)
    assert graphs_of.of(ours) is None


def test_options():
    with pytest.raises(ValueError, match="frames and recordings: expected both or neither"):
        fastasr.Graphs(frames=100)
    with pytest.raises(ValueError, match="recordings: expected a number of at least 1, got 0"):
        fastasr.Graphs(frames=100, recordings=0)
    assert fastasr.Graphs(frames=100, recordings=2).longest == 100
    with pytest.raises(ValueError, match="pass ragged=True"):
        fastasr.accelerate(encoder("swapped"), graphs=fastasr.Graphs(frames=100, recordings=2))


def test_the_report_says_what_a_row_needs():
    model = encoder("swapped")
    model.layers[1].conv.norm = torch.nn.SyncBatchNorm(SIZES["hidden_size"]).double()
    options = fastasr.Graphs(frames=100, recordings=2, recorder=TapeRecorder)
    report = fastasr.accelerate(model, ragged=True, graphs=options)
    reason = "not on a row: the norm of the convolution module of layer 1 is not torch's BatchNorm"
    assert report.graphs[""] == f"it runs without padding, in another shape at every call, and {reason}"
    report = fastasr.accelerate(encoder("ours"), ragged=True, graphs=options)
    assert report.graphs[""] is None
    assert (
        "recorded by shape, not on a row: it runs on padding: set its attribute ragged"
        in report.rows[0].reason
    )
    report = fastasr.accelerate(encoder("swapped"), ragged=True, graphs=fastasr.Graphs(recorder=TapeRecorder))
    assert report.graphs[""].endswith("Graphs(frames=..., recordings=...) gives it one shape")


NOT_ON_A_ROW = {
    "its attention has a limited context": {"att_context_size": [3, 3]},
    "it reduces the rate between its layers": {
        "reduction": "striding",
        "reduction_position": 0,
        "reduction_factor": 2,
    },
}


@pytest.mark.parametrize("reason", NOT_ON_A_ROW)
def test_what_of_nemo_is_recorded_by_shape(reason):
    options = fastasr.Graphs(frames=100, recordings=2, recorder=TapeRecorder)
    model = encoder("nemo", **NOT_ON_A_ROW[reason])
    report = fastasr.accelerate(model, ragged=True, graphs=options, exclude="layers.*")
    assert reason in next(row.reason for row in report.rows if not row.path)


def test_statistics_are_those_of_the_frames_that_exist():
    z = torch.randn(2, 9, 4, generator=numbers(1)).double().requires_grad_()
    hidden_frames = torch.rand(2, 9, generator=numbers(2)) < 0.4
    weight = torch.randn(z.shape, generator=numbers(3)).double() * ~hidden_frames[..., None]
    norms = [torch.nn.BatchNorm1d(4, eps=1e-3, momentum=m).double() for m in (0.1, None) for _ in range(2)]
    for ours, theirs in zip(norms[::2], norms[1::2], strict=True):
        for norm in (ours, theirs):
            torch.nn.init.normal_(norm.weight, generator=numbers(4))
        for _ in range(2):
            y = batch_norm_activated(ours, "identity", z, hidden_frames)
            expected = theirs(z[~hidden_frames])
            close(y[~hidden_frames], expected, 1e-12)
            leaves = (z, ours.weight, ours.bias), (z, theirs.weight, theirs.bias)
            found = torch.autograd.grad((y * weight).sum(), leaves[0])
            wanted = torch.autograd.grad((expected * weight[~hidden_frames]).sum(), leaves[1])
            close(found, wanted, 1e-12)
            for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
                close(a.double(), b.double(), 1e-12, name)


def test_statistics_of_no_frame_stay():
    norm = torch.nn.BatchNorm1d(3)
    y = batch_norm_activated(norm, "silu", torch.randn(1, 5, 3), torch.ones(1, 5, dtype=torch.bool))
    assert y.isfinite().all()
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert torch.equal(norm.running_var, torch.ones(3))


def test_a_batch_comes_back_from_its_row():
    lengths, slots = torch.tensor([3, 0, 2]), torch.tensor([5, 1, 4])
    spans = Spans.laid_out(lengths, slots, 4)
    assert spans.begins.tolist() == [0, 5, 6, 10]
    assert spans.ends.tolist() == [3, 5, 8, 10]
    x = torch.arange(1.0, 25.0).view(3, 4, 2).double().requires_grad_()
    row = spans.packed(x, 12)
    assert row[0, :, 0].tolist() == [1, 3, 5, 0, 0, 0, 17, 19, 0, 0, 0, 0]
    back = spans.unpacked(row, 3, 4)
    valid = torch.arange(4) < lengths[:, None]
    assert torch.equal(back, x * valid[..., None])
    assert torch.autograd.gradcheck(lambda x: spans.unpacked(spans.packed(x, 12).square(), 3, 4), x)
