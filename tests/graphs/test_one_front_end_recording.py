# SPDX-License-Identifier: Apache-2.0
"""One recording of Zipformer's front end serves every batch: recordings in a row of fixed length give what each gives
alone. In training the reference runs every convolution on each recording alone, and balancers and whitening on all."""

import copy
import random
from functools import partial

import pytest
import tiny_zipformer
import torch
from recorded import lengths_on_a_row, on_rows, packed_frames
from steps import close, cotangent, gradients_by_name, numbers, same_gradients, seeded
from test_one_zipformer_recording import of_whitening, prepared

import fastasr
from fastasr.models.zipformer import Conv2dSubsampling, Zipformer
from fastasr.testing.tape import TapeRecorder

FRAMES, RECORDINGS, LONGEST, BINS = 301, 4, 161, 20
ROOM = {"frames": FRAMES, "recordings": RECORDINGS, "longest": LONGEST}
SIZES = BINS, 12, 4, 8, 16
KINDS = "ours", "swapped"
recorded = partial(on_rows, **ROOM, after=0)
ROUNDED = 1e-6  # numbers of the host are float32 on the device


def front_end(kind="ours", batch_count=20000.0):
    seeded(0)
    if kind == "ours":
        return prepared(Conv2dSubsampling(*SIZES, dropout=0.5), batch_count)
    modules = pytest.importorskip("zipformer.modules.subsampling")
    with tiny_zipformer.plain_swoosh():
        return prepared(modules.Conv2dSubsampling(*SIZES, dropout=0.5), batch_count)


def batch(lengths, frames=None, seed=1):
    """Returns features and their lengths. Padding is NaN."""
    frames = max([9, frames or 0, *lengths])
    x = torch.randn(len(lengths), frames, BINS, generator=numbers(seed)).double() * 3
    lengths = torch.tensor(lengths)
    return x.masked_fill((torch.arange(frames) >= lengths[:, None])[..., None], torch.nan), lengths


def drawn(count, recordings=None):
    """Yields lengths of batches that fit, among them the shortest, empty ones, and rows that are exactly full."""
    first = [100, 60], [1], [161, 140], [75] * 4, [0, 90], [9, 1, 8, 9], [90, 0, 17], [161, 9, 7, 124]
    return lengths_on_a_row(count, ROOM.values(), () if recordings else first, recordings)


def behind(lengths):
    return ((lengths - 7) // 2).clamp(min=0)


def alone(model, x, lengths):
    """Yields the output of each recording alone, (T', channels)."""
    for one, n in zip(x, lengths.tolist(), strict=True):
        if n < 9:
            yield one.new_zeros(0, SIZES[1])
        else:
            yield model(one[None, :n], torch.tensor([n]))[0][0]


def same_as_alone(found, expected):
    for y, wanted in zip(found, expected, strict=True):
        close(y[: len(wanted)], wanted, 1e-10)
        assert not y[len(wanted) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_one_recording_serves_fifty_batches(kind):
    model = front_end(kind).eval()
    theirs = copy.deepcopy(model)
    ours, graphs = recorded(model, after=1)
    with torch.no_grad():
        ours(torch.randn(1, 30, BINS).double(), torch.tensor([30]))  # runs as it is
        for seed, lengths in enumerate(drawn(50)):
            x, lengths = batch(lengths, seed=seed)
            y, after = ours(x, lengths)
            assert y.shape == (len(x), (x.shape[1] - 7) // 2, SIZES[1])
            assert torch.equal(after, (lengths - 7) // 2)
            same_as_alone(y, alone(theirs, x, lengths))
    (found,) = fastasr.graph_state(ours)[""]
    assert (found.seen, found.replayed, found.recorded, found.reason) == (51, 50, 1, None)
    assert len(graphs.graphs) == 1
    assert 0.1 < found.filling < 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["recorded", "unrecorded"])
def test_packed_frames(kind, way):
    model = front_end(kind).eval()
    theirs = copy.deepcopy(model)
    ours = recorded(model)[0] if way == "recorded" else model
    fastasr.accelerate(ours, ragged=True)
    with torch.no_grad():
        for seed, lengths in enumerate(drawn(12)):
            x, lengths = batch(lengths, seed=seed)
            found, after = ours(packed_frames(x, lengths, FRAMES), lengths)
            assert torch.equal(after, behind(lengths))
            assert torch.equal(found.lengths, after)
            assert found.frames.shape == (FRAMES // 2, SIZES[1])
            same_as_alone(found.unpacked(LONGEST), alone(theirs, x, lengths))


class Model(torch.nn.Module):
    """A front end and an encoder without a padded tensor between them, or each recording alone."""

    def __init__(self, kind):
        super().__init__()
        self.encoder_embed = front_end(kind)
        cls = Zipformer
        if kind == "swapped":
            cls = pytest.importorskip("zipformer.modules.zipformer").Zipformer
        widths = {"encoder_dim": (12, 48), "encoder_unmasked_dim": (12, 32)}
        with tiny_zipformer.plain_swoosh():
            self.encoder = prepared(cls(**tiny_zipformer.TINY | widths))
        if kind == "ours":
            self.encoder.ragged = True

    def forward(self, x, lengths):
        return self.encoder(*self.encoder_embed(x, lengths))

    def alone(self, x, lengths):
        for y in alone(self.encoder_embed, x, lengths):
            n = len(y)
            if not n:
                yield y.new_zeros(0, 48)
            else:
                yield self.encoder(y[:, None], torch.tensor([n]), torch.zeros(1, n).bool())[0][:, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["recorded", "unrecorded"])
def test_no_padding_from_features_to_hidden_states(kind, way):
    model = Model(kind).eval()
    theirs = copy.deepcopy(model)
    options = fastasr.Graphs(**ROOM, after=1, recorder=TapeRecorder) if way == "recorded" else False
    report = fastasr.accelerate(model, ragged=True, graphs=options)
    if way == "recorded":
        assert report.graphs == {"encoder_embed": None, "encoder": None}
    with torch.no_grad():
        for seed, lengths in enumerate(drawn(8)):
            x, lengths = batch(lengths, seed=seed)
            found, after = model(packed_frames(x, lengths, FRAMES), lengths)
            assert torch.equal(after, (behind(lengths) + 1) // 2)
            same_as_alone(found.unpacked(LONGEST), theirs.alone(x, lengths))
    if way == "recorded":
        for (kind_of_call,) in filter(None, fastasr.graph_state(model).values()):
            assert (kind_of_call.seen, kind_of_call.replayed, kind_of_call.recorded) == (8, 7, 1)


def is_a(module, name):
    return type(module).__name__ == name


def reference(model, x, lengths):
    """Yields the output of each recording alone, with statistics of regularisers over those frames of all that exist,
    and draws for all."""

    def together(module, maps, dim=2):
        return module(torch.cat(maps, dim)).split([y.shape[dim] for y in maps], dim)

    def convolved(conv, y):
        taps = conv.kernel_size[0]
        if y.shape[2] >= max(1, taps - 2 * conv.padding[0]):
            return conv(y)
        return conv(y.new_zeros(*y.shape[:2], taps, y.shape[3]))[:, :, :0]

    maps = [one[None, None, :n] for one, n in zip(x, lengths.tolist(), strict=True)]
    for module in model.conv:
        if is_a(module, "Balancer"):
            maps = together(module, maps)
        elif is_a(module, "Conv2d"):
            maps = [convolved(module, y) for y in maps]
        else:
            maps = [module(y) for y in maps]
    layer = model.convnext
    kept = torch.rand(len(maps), 1, 1, 1, dtype=x.dtype) > float(layer.layerdrop_rate)
    hidden = [convolved(layer.pointwise_conv1, convolved(layer.depthwise_conv, y)) for y in maps]
    hidden = [layer.activation(y) for y in together(layer.hidden_balancer, hidden)]
    hidden = [convolved(layer.pointwise_conv2, y) for y in hidden]
    maps = together(layer.out_balancer, [y + z * k for y, z, k in zip(maps, hidden, kept, strict=True)])
    maps = together(lambda y: layer.out_whiten(y.transpose(1, 3)).transpose(1, 3), maps)
    rows = [model.out(y.transpose(1, 2).flatten(2)) for y in maps]
    rows = together(lambda y: model.out_norm(model.out_whiten(y)), rows, 1)
    p = float(model.dropout.p)
    kept = torch.rand(len(rows), 1, SIZES[1]) > p
    for y, k in zip(rows, kept, strict=True):
        yield y[0] * k / (1 - p)


def step(model, outputs, x, lengths):
    """Returns values, gradients by name, what Whiten keeps and the state of all generators after a training step."""
    x = x.clone().requires_grad_()
    y = torch.cat(list(outputs(model, x, lengths)))
    found = gradients_by_name(model, (y * cotangent(y)).sum(), x)
    state = of_whitening(model), random.random(), torch.rand(())
    return y.detach(), found, state


def on_the_row(model, x, lengths):
    y = model(x, lengths)[0]
    return [one[:n] for one, n in zip(y, behind(lengths).tolist(), strict=True)]


def on_packed_frames(model, x, lengths):
    y = model(packed_frames(x, lengths, FRAMES), lengths)[0].unpacked(LONGEST)
    return [one[:n] for one, n in zip(y, behind(lengths).tolist(), strict=True)]


@pytest.mark.parametrize("batch_count", [0.0, 20000.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [on_the_row, on_packed_frames])
def test_training_steps(kind, batch_count, way):
    """Values, gradients, every draw and what Whiten keeps, in one recording for all batches."""
    model = front_end(kind, batch_count).train()
    theirs = copy.deepcopy(model)
    if kind == "swapped":
        fastasr.accelerate(theirs, exclude=["", "convnext"])
    ours, graphs = recorded(model)
    for seed, lengths in enumerate(drawn(10, RECORDINGS)):
        if max(lengths) < 40:
            continue
        x, lengths = batch(lengths, seed=seed)
        results = []
        for each, outputs in ((ours, way), (theirs, reference)):
            seeded(seed)
            results.append(step(each, outputs, x, lengths))
        (y, gradients, state), (expected, wanted, states) = results
        close(y, expected, 1e-9)
        same_gradients(gradients, wanted, ROUNDED)
        assert state == states
    assert len(graphs.graphs) == 1
    (found,) = fastasr.graph_state(ours)[""]
    assert (found.recorded, found.reason) == (1, None)


@pytest.mark.parametrize("train", [True, False])
def test_under_autocast(train):
    model = front_end().float().train(train)
    theirs = copy.deepcopy(model)
    ours, graphs = recorded(model)
    for seed, lengths in enumerate(([100, 60, 9, 40], [161, 0, 30, 110])):
        x, lengths = batch(lengths, seed=seed)
        results = []
        for each, outputs in ((ours, on_the_row), (theirs, reference)):
            seeded(seed)
            outputs = alone if each is theirs and not train else outputs
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
                results.append(torch.cat(list(outputs(each, x.float(), lengths))).float())
        close(*results, 0.05)
    assert len(graphs.graphs) == 1


def test_graphs_of_parts_record_a_front_end_as_a_whole():
    ours, graphs = recorded(front_end().train(), parts=True)
    for lengths in ([100, 60], [90, 0, 40]):
        assert ours(*batch(lengths))[0].isfinite().all()
    assert len(graphs.graphs) == 1


TOO_LARGE = {
    "recordings": ([20] * 5, "it has more recordings than Graphs(recordings=4) allows"),
    "a recording": ([162], "it is padded to more frames than Graphs(longest=161) allows"),
    "frames": ([150, 152], "it has more frames than Graphs(frames=301) allows"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_a_larger_batch_runs_padded(case):
    lengths, reason = TOO_LARGE[case]
    model = front_end().eval()
    theirs = copy.deepcopy(model)
    ours, graphs = recorded(model)
    x, lengths = batch(lengths)
    with torch.no_grad():
        x = x.nan_to_num()
        assert torch.equal(ours(x, lengths)[0], theirs(x, lengths)[0])
        assert f"not replayed: {reason}" in str(fastasr.why(ours))
        assert not graphs.kinds


def change(model, what):
    if what == "a convolution":
        model.conv[4] = torch.nn.Sequential(model.conv[4])
    elif what == "taps of a convolution":
        model.conv[0] = torch.nn.Conv2d(1, 4, (7, 3), padding=(0, 1)).double()
        model.conv[7] = torch.nn.Conv2d(8, 16, (1, 3), stride=(1, 2)).double()
    elif what == "a hook":
        model.conv[3].register_forward_hook(lambda module, inputs, y: None)
    elif what == "taps":
        model.convnext.depthwise_conv = torch.nn.Conv2d(16, 16, (11, 7), groups=16, padding=(5, 3)).double()
    elif what == "ConvNeXt":
        model.convnext.pointwise_conv1 = torch.nn.Sequential(model.convnext.pointwise_conv1)
    else:
        model.dropout = torch.nn.Dropout(0.1).eval()


NO_ROW = {
    "a convolution": "conv.4 is not swapped or not upstream's, or has hooks",
    "taps of a convolution": "its convolutions see other frames than upstream's",
    "a hook": "conv.3 is not swapped or not upstream's, or has hooks",
    "taps": "convnext sees more than 4 frames on one side",
    "ConvNeXt": "convnext is not swapped, or has parts that are not upstream's, or hooks",
    "a dropout": "dropout is not upstream's Dropout3 over time, or has hooks",
}


@pytest.mark.parametrize("what", NO_ROW)
def test_what_no_row_can_hold(what):
    model = front_end().eval()
    change(model, what)
    theirs = copy.deepcopy(model)
    report = fastasr.accelerate(model, ragged=True, graphs=fastasr.Graphs(**ROOM, recorder=TapeRecorder))
    assert f"recorded by shape, not on a row: {NO_ROW[what]}" in report.rows[0].reason
    x, lengths = batch([60, 60])
    with torch.no_grad():
        assert torch.equal(model(x, lengths)[0], theirs(x, lengths)[0])
        with pytest.raises(ValueError, match=f"the call has PackedFrames, but {NO_ROW[what]}"):
            model(packed_frames(x, lengths, FRAMES), lengths)


def test_regularisers_that_are_not_swapped():
    pytest.importorskip("zipformer.modules.subsampling")
    model = front_end("swapped")
    options = fastasr.Graphs(**ROOM, recorder=TapeRecorder)
    report = fastasr.accelerate(model, exclude=["out_whiten"], ragged=True, graphs=options)
    assert "not on a row: out_whiten is not swapped, or has hooks" in report.rows[0].reason


def test_lengths_of_packed_frames_must_fit():
    model = front_end().eval()
    frames = torch.zeros(30, BINS).double()
    with pytest.raises(ValueError, match=r"a sum of at most 30 frames, got \[20, 20\]"):
        model(fastasr.PackedFrames(frames, torch.tensor([20, 20])), None)
    found, lengths = model(fastasr.PackedFrames(frames[:0], torch.tensor([0, 0])), None)
    assert found.frames.shape == (0, SIZES[1])
    assert lengths.tolist() == [0, 0]
