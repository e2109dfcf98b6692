# SPDX-License-Identifier: Apache-2.0
"""An encoder takes PackedFrames in place of a padded batch, and gives PackedFrames: the same frames, gradients and
statistics, recorded on a row or not."""

import copy
import math

import pytest
import torch
from recorded import packed_frames, without_padding
from steps import close
from test_one_recording import (
    FRAMES,
    LONGEST,
    RECORDINGS,
    batch,
    call_packed,
    drawn,
    encoder,
    existing,
    recorded,
    run,
)
from tiny_parakeet import SIZES

import fastasr
from fastasr import PackedFrames
from fastasr.models.fast_conformer import FastConformerCTC
from fastasr.testing.tape import TapeRecorder


def test_recordings_without_frames():
    for ours in (without_padding(encoder("ours").eval()), recorded(encoder("swapped").eval(), after=0)[0]):
        given = PackedFrames(torch.full((7, SIZES["num_mel_bins"]), math.nan).double(), torch.tensor([0, 0]))
        with torch.no_grad():
            found = call_packed(ours, given)
        assert found.lengths.tolist() == [0, 0]
        assert not found.frames.any()


def test_a_head_of_ctc():
    model = FastConformerCTC(without_padding(encoder("ours").eval()), 11).double()
    x, mask = batch([90, 33])
    with torch.no_grad():
        found, (expected, _) = model(packed_frames(x, mask.sum(1))), model(x, mask)
    assert isinstance(found, PackedFrames)
    valid = existing(model.encoder, expected, mask)
    close(found.frames, expected[valid], 1e-10)


X, MASK = batch([20, 9])
GIVEN = packed_frames(X, MASK.sum(1))


def _asks(model):
    return model(GIVEN, output_hidden_states=True)


def _nemo(**more):
    x, mask = batch([20, 9], model=encoder("nemo"))
    ours, _ = recorded(encoder("nemo").eval())
    return ours(audio_signal=packed_frames(x, mask.sum(1)), **more)


PAD = r"pass the padded batch, packed.unpacked\(longest\)"
REFUSED = {
    "ours on padding": (ValueError, lambda: encoder("ours")(GIVEN), "encoder.ragged is False: " + PAD),
    "a mask": (ValueError, lambda: without_padding(encoder("swapped"))(GIVEN, MASK), "a mask too: " + PAD),
    "inner outputs": (
        ValueError,
        lambda: _asks(recorded(encoder("swapped").eval())[0]),
        "but the call asks for output_hidden_states: " + PAD,
    ),
    "lengths too": (ValueError, lambda: _nemo(length=MASK.sum(1)), "but length too: " + PAD),
    "not swapped": (
        AttributeError,
        lambda: encoder("swapped")(GIVEN),
        r"after fastasr.accelerate\(model, ragged=True\): pass others the padded batch",
    ),
    "on padding": (
        AttributeError,
        lambda: fastasr.accelerate(model := encoder("swapped")) and model(GIVEN),
        r"Only some encoders take it, after fastasr.accelerate\(model, ragged=True\)",
    ),
    "recorded by shape": (
        AttributeError,
        lambda: by_shape()(GIVEN),
        r"Only some encoders take it, after fastasr.accelerate\(model, ragged=True\)",
    ),
}  # fmt: skip


def by_shape():
    model = encoder("swapped").eval()
    fastasr.accelerate(model, graphs=fastasr.Graphs(recorder=TapeRecorder, after=0))
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    error, call, message = REFUSED[case]
    with torch.no_grad(), pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ours", "swapped", "nemo"])
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
        given = packed_frames(x.float(), mask.sum(1), FRAMES)
        given = given._replace(lengths=given.lengths.cpu()) if seed % 2 else given
        with torch.set_grad_enabled(train):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if seed > 3 else "default")
            try:
                found = call_packed(model, given)
                if train:
                    found.frames.sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        with torch.set_grad_enabled(train):
            expected = run(theirs, x.float(), mask)
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
    given = packed_frames(x.float(), mask.sum(1))
    with torch.no_grad():
        model(PackedFrames(given.frames.cuda(), given.lengths))
    assert "it has a recording of 241 frames" in str(fastasr.why(model))
