# SPDX-License-Identifier: Apache-2.0
"""One recording of an encoder serves every batch, padded or packed: recordings in a row of fixed length give what they
give without padding, in values, gradients and statistics."""

import copy
import logging

import pytest
import recorded
import test_one_e_branchformer_recording as e_branchformer
import test_one_recording as fast_conformer
import test_one_zipformer_recording as zipformer
import torch
from recorded import on_rows, same_steps, without_padding
from steps import close, seeded

import fastasr
from fastasr.graphs import module as graphs_of

KINDS = {
    "fast_conformer": (fast_conformer, "ours", {}),
    "parakeet": (fast_conformer, "swapped", {}),
    "nemo": (fast_conformer, "nemo", {}),
    "e_branchformer": (e_branchformer, "ours", {}),
    "espnet": (e_branchformer, "espnet", {}),
    "zipformer": (zipformer, "ours", {}),
    "zipformer, chunks": (zipformer, "ours", zipformer.chunks(8, 16)),
    "icefall": (zipformer, "swapped", {}),
    "icefall, chunks of a recording": (zipformer, "swapped", zipformer.chunks(-1, -1)),
}
PLAIN = [name for name in KINDS if not KINDS[name][2]]
# A Zipformer's training steps draw random numbers, which its own file compares. It is not recorded layer by layer.
TRAINED = [name for name in KINDS if KINDS[name][0] is not zipformer]
PASSES = [(name, train) for name in KINDS for train in (False, True) if not train or name in TRAINED]


def made(kind, train=False, **options):
    module, name, fixed = KINDS[kind]
    return module.encoder(name, **fixed, **options).train(train)


def on_row(kind, model, after=0, **options):
    return on_rows(model, **KINDS[kind][0].ROOM, after=after, **options)


def factor(kind):
    """Returns how many frames of a batch make one of output."""
    return 4 if kind == "nemo" else {fast_conformer: 8, e_branchformer: 4, zipformer: 2}[KINDS[kind][0]]


def batch(kind, lengths, frames=None, seed=1):
    bins = KINDS[kind][0].BINS if kind != "nemo" else fast_conformer.NEMO_BINS
    return e_branchformer.batch(lengths, frames, seed, bins)


def padded_step(kind, model, x, lengths):
    return recorded.padded_step(KINDS[kind][0].call, model, x, lengths)


def packed_step(kind, model, x, lengths, frames=None):
    return recorded.packed_step(KINDS[kind][0].call_packed, model, x, lengths, frames)


def expected_of(kind, model, x, lengths):
    """Returns the step of a model without padding, which may compute the padding, so that has to be finite."""
    return padded_step(kind, model, x.nan_to_num(), lengths)


def same_statistics(ours, theirs):
    for (name, t), other in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        close(t, other, 1e-10, name)


def trainable(kind, lengths):
    """Returns these lengths, or others where BatchNorm would see fewer than two frames."""
    return lengths if sum(-(-n // factor(kind)) for n in lengths) > 1 else [20]


@pytest.mark.parametrize(("kind", "train"), PASSES)
def test_one_recording_serves_padded_and_packed_batches(kind, train):
    module, model = KINDS[kind][0], made(kind, train)
    theirs = without_padding(copy.deepcopy(model))
    ours, graphs = on_row(kind, model, after=1)
    sizes = set()
    for seed, lengths in enumerate(module.drawn(24)):
        x, lengths = batch(kind, trainable(kind, lengths), seed=seed)
        if seed % 2:
            frames = (None, module.FRAMES, int(lengths.sum()) + 3)[seed % 3]
            *found, size = packed_step(kind, ours, x, lengths, frames)
            sizes.add(size)
        else:
            *found, behind = padded_step(kind, ours, x, lengths)
            assert not behind
        same_steps(found, expected_of(kind, theirs, x, lengths))
        same_statistics(ours, theirs)
    (found,) = fastasr.graph_state(ours)[""]
    assert (found.seen, found.replayed, found.recorded, found.reason) == (24, 23, 1, None)
    assert len(graphs.graphs) == 1
    assert 0.1 < found.filling < 1.0
    assert sizes == {module.FRAMES // factor(kind) + module.RECORDINGS}


@pytest.mark.parametrize(("kind", "train"), PASSES)
def test_unrecorded(kind, train):
    """Without graphs, and with more calls to come before a recording."""
    model = made(kind, train)
    theirs = without_padding(copy.deepcopy(model))
    ours = on_row(kind, model, after=9)[0] if kind in ("nemo", "icefall") else without_padding(model)
    for seed, lengths in enumerate([[100, 60], [33, 0, 8], [40], [20, 20]]):
        x, lengths = batch(kind, lengths, seed=seed)
        found = packed_step(kind, ours, x, lengths, int(lengths.sum()) + 5 * (seed % 2))
        same_steps(found, expected_of(kind, theirs, x, lengths))


@pytest.mark.parametrize("kind", [name for name in PLAIN if KINDS[name][0] is not e_branchformer])
def test_each_recording_as_alone(kind):
    model = made(kind)
    alone = copy.deepcopy(model)
    x, lengths = batch(kind, [130, 1, 0, 77], frames=140)
    hidden, _, behind = padded_step(kind, on_row(kind, model)[0], x, lengths)
    assert not behind
    for y, one, n in zip(hidden, x, lengths.tolist(), strict=True):
        if n:
            (expected,), *_ = padded_step(kind, alone, one[None, :n], torch.tensor([n]))
            close(y, expected, 1e-10)


@pytest.mark.parametrize("kind", ["parakeet", "espnet", "zipformer"])
@pytest.mark.parametrize("train", [True, False])
def test_under_autocast(kind, train):
    model = made(kind).float().train(train)
    theirs = without_padding(copy.deepcopy(model))
    ours, graphs = on_row(kind, model)
    for lengths in ([100, 60, 20, 33], [33, 8, 50, 12], [90, 0, 40, 9]):  # a row draws for so many recordings
        x, lengths = batch(kind, lengths)
        found = []
        for each in (ours, theirs):
            seeded(1)
            with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
                y, after = KINDS[kind][0].call(each, x.float(), lengths)
            found.append(torch.cat([one[:n] for one, n in zip(y, after.tolist(), strict=True)]).float())
        close(*found, 0.05)
    assert len(graphs.graphs) == 1


TOO_LARGE = "recordings", "a recording", "frames"


def too_large(kind, case):
    """Returns lengths for which a row has no room, and why in a padded and in a packed batch."""
    module = KINDS[kind][0]
    option = "longest" if case == "a recording" else case
    per = " / 2" if module is zipformer and case != "recordings" else ""  # the room is in frames of features
    allowed = f"than Graphs({option}={module.ROOM[option]}){per} allows"
    if case == "a recording":
        reasons = f"it is padded to more frames {allowed}", f"it has a recording of more frames {allowed}"
        return [module.LONGEST + 1, 3], *reasons
    if case == "recordings":
        return [20] * (module.RECORDINGS + 1), *[f"it has more recordings {allowed}"] * 2
    return [module.FRAMES // 2, module.FRAMES // 2 + 1], *[f"it has more frames {allowed}"] * 2


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("case", TOO_LARGE)
def test_a_larger_batch_runs_unrecorded(case, kind):
    lengths, *reasons = too_large(kind, case)
    model = made(kind, kind in TRAINED)
    theirs = without_padding(copy.deepcopy(model))
    ours, graphs = on_row(kind, model)
    x, lengths = batch(kind, lengths)
    for step, reason in zip((padded_step, packed_step), reasons, strict=True):
        same_steps(step(kind, ours, x, lengths), expected_of(kind, theirs, x, lengths))
        same_statistics(ours, theirs)
        assert f"not replayed: {reason}" in str(fastasr.why(ours))
        assert not graphs.kinds
    # whose recordings are few enough
    packed_step(kind, ours, *batch(kind, [100, 20]), KINDS[kind][0].FRAMES + 100)
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("step", [padded_step, packed_step])
@pytest.mark.parametrize("case", TOO_LARGE)
def test_larger_batches_are_logged_once(case, step, caplog):
    caplog.set_level(logging.INFO, "fastasr")
    lengths, padded, packed = too_large("parakeet", case)
    ours, _ = on_row("parakeet", made("parakeet"))
    for more in range(3):
        larger = [*lengths, *[20] * more] if case == "recordings" else [lengths[0], lengths[1] + more]
        if case == "a recording":
            larger[0] += more
        step("parakeet", ours, *batch("parakeet", larger))
    (said,) = [text for text in caplog.messages if "not replayed" in text]
    assert said.endswith(f"not replayed: {padded if step is padded_step else packed}")


def layers_of(kind, model):
    return model.encoders if KINDS[kind][0] is e_branchformer else model.layers


@pytest.mark.parametrize("kind", TRAINED)
def test_parts(kind):
    model = made(kind, train=True)
    theirs = without_padding(copy.deepcopy(model))
    ours, graphs = on_row(kind, model, parts=True)
    for seed, lengths in enumerate([[100, 60], [33], [90, 0, 40], [20, 21]]):
        x, lengths = batch(kind, lengths, seed=seed)
        step = packed_step if seed % 2 else padded_step
        same_steps(step(kind, ours, x, lengths), expected_of(kind, theirs, x, lengths))
    assert not graphs.graphs
    for layer in layers_of(kind, ours):
        (kind_of_call,) = graphs_of.of(layer).kinds.values()
        assert (kind_of_call.seen, kind_of_call.replayed, kind_of_call.recorded) == (4, 4, 1)


@pytest.mark.parametrize("kind", TRAINED)
def test_dropped_layers_are_recorded_one_by_one(kind):
    drops = {
        "nemo": "stochastic_depth_drop_prob",
        "espnet": "layer_drop_rate",
        "e_branchformer": "layer_drop_rate",
    }
    ours, graphs = on_row(kind, made(kind, train=True, **{drops.get(kind, "layerdrop"): 0.5}))
    for seed, lengths in enumerate(KINDS[kind][0].drawn(12)):
        *_, behind = padded_step(kind, ours, *batch(kind, lengths, seed=seed))
        assert not behind
    (whole,) = graphs.kinds.values()
    assert (whole.recorded, whole.reason) == (0, "Waits: aten::_local_scalar_dense shows a value to the host")
    for layer in map(graphs_of.of, layers_of(kind, ours)):
        (kind_of_call,) = layer.kinds.values()
        assert len(layer.graphs) == 1
        assert 0 < kind_of_call.replayed == kind_of_call.seen <= 12


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("train", [True, False])
def test_on_a_gpu(kind, train):
    model = made(kind).float().cuda().train(train)
    theirs = without_padding(copy.deepcopy(model))
    if hasattr(model, "ragged"):
        model.ragged = True
    fastasr.accelerate(model, ragged=True, graphs=fastasr.Graphs(**KINDS[kind][0].ROOM))
    for seed, lengths in enumerate(KINDS[kind][0].drawn(20)):
        x, lengths = batch(kind, lengths if sum(lengths) > 8 else [20], seed=seed)
        x = x.nan_to_num().float().cuda()
        found = padded_step(kind, model, x, lengths.cuda() if seed % 2 else lengths)
        expected = expected_of(kind, theirs, x, lengths)
        close(found[0], expected[0], 1e-4)
        for name, g in found[1].items():
            close(g, expected[1][name], 2e-3, name, least=1e-3)
    (kind_of_call,) = fastasr.graph_state(model)[""]
    assert (kind_of_call.recorded, kind_of_call.reason) == (1, None)
    assert kind_of_call.replayed >= 16
