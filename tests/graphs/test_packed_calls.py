# SPDX-License-Identifier: Apache-2.0
"""An encoder takes PackedFrames in place of a padded batch, and gives PackedFrames: the same frames, gradients and
statistics, recorded on a row or not."""

import copy
import math

import pytest
import torch
from recorded import without_padding
from steps import close, cotangent, same_gradients
from test_one_recording import (
    FRAMES,
    KINDS,
    LONGEST,
    RECORDINGS,
    TOO_LARGE,
    after,
    batch,
    drawn,
    encoder,
    existing,
    is_nemo,
    recorded,
    step,
)
from tiny_parakeet import SIZES

import fastasr
from fastasr import PackedFrames
from fastasr.graphs import module as graphs_of
from fastasr.models.fast_conformer import FastConformerCTC, FastConformerEncoder


def packed(x, mask, frames=None):
    """Returns PackedFrames with NaN in frames of nobody."""
    lengths = mask.sum(1)
    rows = torch.cat([one[:n] for one, n in zip(x, lengths.tolist(), strict=True)])
    more = 0 if frames is None else frames - len(rows)
    return PackedFrames(torch.cat([rows, rows.new_full((more, x.shape[2]), math.nan)]), lengths)


def run(model, given):
    if is_nemo(model):
        return model(audio_signal=given)
    found = model(input_features=given)
    return found if isinstance(model, FastConformerEncoder) else found.last_hidden_state


def packed_step(model, x, mask, frames=None):
    """Does as ``step`` with PackedFrames; the output and the features' gradient are the padded batch's."""
    given = packed(x, mask, frames)
    given.frames.requires_grad_(model.training)
    with torch.set_grad_enabled(model.training):
        found = run(model, given)
    assert isinstance(found, PackedFrames)
    assert torch.equal(found.lengths, after(model, mask.sum(1)))
    assert not found.frames[int(found.lengths.sum()) :].any()
    y = found.unpacked(after(model, x.shape[1]))
    if not model.training:
        return found, y, {}, {}
    leaves = dict(model.named_parameters()) | {"features": given.frames}
    weight = cotangent(y.cpu()).to(y)
    gradients = torch.autograd.grad((y * weight).sum(), list(leaves.values()), allow_unused=True)
    gradients = dict(zip(leaves, gradients, strict=True))
    gradients["features"] = PackedFrames(gradients["features"], given.lengths).unpacked(x.shape[1])
    return found, y, gradients, dict(model.named_buffers())


def same(found, expected, model, mask, close=close):
    """Compares the step of a packed batch with that of a padded one."""
    (_, y, gradients, state), (expected_y, wanted, kept) = found, expected
    close(y, expected_y * existing(model, expected_y, mask)[..., None], 1e-10)
    if wanted:
        wanted["features"] = wanted["features"] * mask[..., None]
        same_gradients(gradients, wanted)
    for name, t in state.items():
        close(t, kept[name], 1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False])
def test_one_recording_serves_padded_and_packed_batches(kind, train):
    model = encoder(kind).train(train)
    theirs = without_padding(copy.deepcopy(model))
    ours, _ = recorded(model)
    sizes = set()
    for seed, lengths in enumerate(drawn(30)):
        if train and sum(after(model, n) for n in lengths) < 2:
            lengths = [20]  # BatchNorm needs two frames
        x, mask = batch(lengths, seed=seed, model=model)
        expected = step(theirs, x, mask)
        if seed % 5 == 4:
            close(step(ours, x, mask)[0], expected[0] * existing(ours, expected[0], mask)[..., None], 1e-10)
            continue
        found = packed_step(ours, x, mask, (None, FRAMES, sum(lengths) + 3)[seed % 3])
        same(found, expected, model, mask)
        if seed:
            sizes.add(len(found[0].frames))
    (kind_of_call,) = fastasr.graph_state(ours)[""]
    assert (kind_of_call.seen, kind_of_call.replayed, kind_of_call.recorded) == (30, 29, 1)
    assert 0.1 < kind_of_call.filling < 1.0
    factor = 4 if kind == "nemo" else 8
    assert sizes == {FRAMES // factor + RECORDINGS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False])
def test_unrecorded(kind, train):
    """Without graphs, and with more calls to come before a recording."""
    model = encoder(kind).train(train)
    theirs = without_padding(copy.deepcopy(model))
    ours = recorded(model, after=9)[0] if kind == "nemo" else without_padding(model)
    for seed, lengths in enumerate([[100, 60], [33, 0, 8], [40], [20, 20]]):
        x, mask = batch(lengths, seed=seed, model=model)
        same(packed_step(ours, x, mask, sum(lengths) + 5 * (seed % 2)), step(theirs, x, mask), model, mask)


def test_recordings_without_frames():
    for ours in (without_padding(encoder("ours").eval()), recorded(encoder("swapped").eval(), after=0)[0]):
        given = PackedFrames(torch.full((7, SIZES["num_mel_bins"]), math.nan).double(), torch.tensor([0, 0]))
        with torch.no_grad():
            found = run(ours, given)
        assert found.lengths.tolist() == [0, 0]
        assert not found.frames.any()


TOO_LARGE = TOO_LARGE | {"a recording": ([241, 3], "it has a recording of 241 frames, and Graphs allows 240")}


@pytest.mark.parametrize("case", TOO_LARGE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_batch_runs_unrecorded(case, kind):
    lengths, reason = TOO_LARGE[case]
    model = encoder(kind).train()
    theirs = without_padding(copy.deepcopy(model))
    ours, graphs = recorded(model, after=0)
    x, mask = batch(lengths, model=model)
    found, expected = packed_step(ours, x, mask), step(theirs, x, mask)
    assert f"not replayed: {reason}" in str(fastasr.why(ours))
    assert not graphs.kinds
    same(found, expected, model, mask)
    packed_step(ours, *batch([100, 20], model=model), frames=FRAMES + 100)  # whose recordings are few enough
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_layers_recorded_one_by_one(kind):
    model = encoder(kind).train()
    theirs = without_padding(copy.deepcopy(model))
    ours, _ = recorded(model, after=0, parts=True)
    for seed, lengths in enumerate([[100, 60], [33], [90, 0, 40]]):
        x, mask = batch(lengths, seed=seed, model=model)
        same(packed_step(ours, x, mask), step(theirs, x, mask), model, mask)
    for layer in ours.layers:
        (kind_of_call,) = graphs_of.of(layer).kinds.values()
        assert (kind_of_call.replayed, kind_of_call.recorded) == (3, 1)


def test_a_head_of_ctc():
    model = FastConformerCTC(without_padding(encoder("ours").eval()), 11).double()
    x, mask = batch([90, 33])
    with torch.no_grad():
        found, (expected, _) = model(packed(x, mask)), model(x, mask)
    assert isinstance(found, PackedFrames)
    valid = existing(model.encoder, expected, mask)
    close(found.frames, expected[valid], 1e-10)


X, MASK = batch([20, 9])


def _asks(model):
    return model(packed(X, MASK), output_hidden_states=True)


def _nemo(**more):
    x, mask = batch([20, 9], model=encoder("nemo"))
    ours, _ = recorded(encoder("nemo").eval())
    return ours(audio_signal=packed(x, mask), **more)


PAD = r"pass the padded batch, packed.unpacked\(longest\)"
REFUSED = {
    "ours on padding": (ValueError, lambda: encoder("ours")(packed(X, MASK)), "encoder.ragged is False: " + PAD),
    "a mask": (ValueError, lambda: without_padding(encoder("swapped"))(packed(X, MASK), MASK), "a mask too: " + PAD),
    "inner outputs": (
        ValueError,
        lambda: _asks(recorded(encoder("swapped").eval())[0]),
        "but the call asks for output_hidden_states: " + PAD,
    ),
    "lengths too": (ValueError, lambda: _nemo(length=MASK.sum(1)), "but length too: " + PAD),
    "not swapped": (
        AttributeError,
        lambda: encoder("swapped")(packed(X, MASK)),
        r"after fastasr.accelerate\(model, ragged=True\): pass others the padded batch",
    ),
    "on padding": (
        AttributeError,
        lambda: fastasr.accelerate(model := encoder("swapped")) and model(packed(X, MASK)),
        r"Only some encoders take it, after fastasr.accelerate\(model, ragged=True\)",
    ),
    "recorded by shape": (
        AttributeError,
        lambda: by_shape()(packed(X, MASK)),
        r"Only some encoders take it, after fastasr.accelerate\(model, ragged=True\)",
    ),
}  # fmt: skip


def by_shape():
    from fastasr.testing.tape import TapeRecorder

    model = encoder("swapped").eval()
    fastasr.accelerate(model, graphs=fastasr.Graphs(recorder=TapeRecorder, after=0))
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    error, call, message = REFUSED[case]
    with torch.no_grad(), pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False])
def test_nothing_waits_on_a_gpu(kind, train):
    """Whether the lengths are on the host or not."""
    model = encoder(kind).float().cuda().train(train)
    theirs = without_padding(copy.deepcopy(model))
    if kind == "ours":
        model.ragged = True
    options = fastasr.Graphs(frames=FRAMES, recordings=RECORDINGS, longest=LONGEST)
    fastasr.accelerate(model, ragged=True, graphs=options)
    for seed, lengths in enumerate(drawn(12)):
        x, mask = (t.cuda() for t in batch(lengths if sum(lengths) > 8 else [20], seed=seed, model=model))
        given = packed(x.float(), mask, FRAMES)
        given = given._replace(lengths=given.lengths.cpu()) if seed % 2 else given
        with torch.set_grad_enabled(train):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if seed > 3 else "default")
            try:
                found = run(model, given)
                if train:
                    found.frames.sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        expected = step(theirs, x.float(), mask)[0]
        valid = existing(model, expected, mask)
        close(found.frames[: int(found.lengths.sum())], expected[valid], 1e-4)
    (kind_of_call,) = fastasr.graph_state(model)[""]
    assert (kind_of_call.replayed, kind_of_call.recorded, kind_of_call.reason) == (10, 1, None)


@pytest.mark.gpu
def test_a_longer_recording_on_a_gpu_whose_lengths_the_host_knows():
    model = encoder("ours").float().cuda().eval()
    model.ragged = True
    options = fastasr.Graphs(frames=FRAMES, recordings=RECORDINGS, longest=LONGEST)
    fastasr.accelerate(model, ragged=True, graphs=options)
    x, mask = batch([LONGEST + 1, 3])
    given = packed(x.float(), mask)
    with torch.no_grad():
        model(PackedFrames(given.frames.cuda(), given.lengths))
    assert "it has a recording of 241 frames" in str(fastasr.why(model))
