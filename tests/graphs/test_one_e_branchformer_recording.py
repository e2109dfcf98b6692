# SPDX-License-Identifier: Apache-2.0
"""One recording of an E-Branchformer serves every batch: recordings in a row of fixed length give what they give alone,
in values, gradients and numbers of frames. So does a row that just fits a batch, without graphs."""

import copy
import math
from functools import partial

import pytest
import torch
from recorded import (
    gradients,
    lengths_on_a_row,
    on_rows,
    packed_frames,
    packed_step,
    padded_step,
    same_steps,
    without_padding,
)
from steps import moved, numbers, seeded

import fastasr
from fastasr.models.common.row import MULTIPLE, Room
from fastasr.models.e_branchformer import EBranchformerEncoder, row
from fastasr.testing.tape import TapeRecorder

BINS, FRAMES, RECORDINGS, LONGEST = 21, 300, 5, 180
KINDS = "ours", "espnet"
WIDE = "conv2d1", "conv2d2", "conv2d6", "conv2d8"  # other input layers of convolutions
NOTHING = torch.zeros(0, 12).double()
ROOM = {"frames": FRAMES, "recordings": RECORDINGS, "longest": LONGEST}
recorded = partial(on_rows, **ROOM, after=1)


def encoder(kind="ours", **options):
    cls = EBranchformerEncoder
    if kind == "espnet":
        cls = pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder").EBranchformerEncoder
    seeded(0)
    sizes = {"output_size": 12, "attention_heads": 3, "cgmlp_linear_units": 16, "cgmlp_conv_kernel": 7}
    sizes |= {"num_blocks": 2, "linear_units": 14, "use_ffn": True, "macaron_ffn": True}
    still = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0}
    return moved(cls(BINS, **{**sizes, **still, **options}), 0.1).double()


def batch(lengths, frames=None, seed=1, bins=BINS):
    """Returns features with NaN behind each recording's end, and lengths."""
    lengths = torch.tensor(lengths)
    x = torch.randn(len(lengths), frames or int(lengths.max()), bins, generator=numbers(seed)).double()
    return x.masked_fill((torch.arange(x.shape[1]) >= lengths[:, None])[..., None], math.nan), lengths


def call(model, x, lengths):
    """Returns the hidden states (B, T, D) of a padded batch and their lengths."""
    y, after, _ = model(x, lengths)
    return y, after


def call_packed(model, given):
    return model(given, given.lengths)


def alone(model, x, lengths):
    """Returns the hidden states of recordings, a list of (T, D), each of which is a batch of its own, and gradients."""
    x = x.clone().requires_grad_(model.training)
    hidden = []
    for one, n in zip(x, lengths.tolist(), strict=True):
        try:
            hidden.append(model(one[None, :n], torch.tensor([n]))[0][0] if n else NOTHING)
        except Exception as error:  # ESPnet's has a class of its own
            if "frames" not in str(error):
                raise
            hidden.append(NOTHING)
    return hidden, gradients(model, hidden, x) if model.training else {}


def together(model, x, lengths):
    """Does the same in one padded batch."""
    *found, behind = padded_step(call, model, x, lengths)
    assert not behind
    return found


in_a_row = partial(packed_step, call_packed)


def drawn(count):
    """Yields lengths of batches that fit, among them short ones, empty ones, and a row that is exactly full."""
    first = [100, 60], [7], [180, 120], [60] * 5, [0, 90], [7, 1, 1, 1, 1], [90, 0, 17]
    return lengths_on_a_row(count, (FRAMES, RECORDINGS, LONGEST), first, least=7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [True, False])
def test_without_graphs(kind, train):
    model = encoder(kind).train(train)
    ours = without_padding(copy.deepcopy(model))
    for lengths, frames in (
        ([100, 60], None),
        ([33, 0, 8], None),
        ([40], None),
        ([20, 3], None),
        ([20, 20], 31),
    ):
        x, lengths = batch(lengths, frames)
        with torch.set_grad_enabled(train):
            expected = alone(model, x, lengths)
            same_steps(together(ours, x, lengths), expected)
            *found, size = in_a_row(ours, x, lengths, int(lengths.sum()) + 5)
            same_steps(found, expected)
        assert size == sum(map(len, expected[0]))


OPTIONS = {
    **{kind: {"input_layer": kind} for kind in WIDE},
    "ESPnet's conv2d8": {"kind": "espnet", "input_layer": "conv2d8"},
    "frames": {"input_layer": "linear"},
    "layers within the gate": {"use_linear_after_conv": True, "gate_activation": "swish"},
    "no feed-forward blocks": {"use_ffn": False, "merge_conv_kernel": 9, "cgmlp_conv_kernel": 3},
}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, train):
    model = encoder(**OPTIONS[case]).train(train)
    ours, graphs = recorded(copy.deepcopy(model), after=0)
    for lengths in ([60, 31, 19], [1, 90, 2], [60] * 5):
        x, lengths = batch(lengths)
        with torch.set_grad_enabled(train):
            expected = alone(model, x, lengths)
            same_steps(together(ours, x, lengths), expected)
            same_steps(in_a_row(ours, x, lengths)[:2], expected)
    assert len(graphs.graphs) == 1


def test_tokens():
    model = encoder(input_layer="embed").eval()
    ours, graphs = recorded(copy.deepcopy(model), after=0)
    with torch.no_grad():
        for lengths in ([9, 30], [1, 0, 4]):
            lengths = torch.tensor(lengths)
            x = torch.randint(0, BINS, (len(lengths), int(lengths.max())), generator=numbers(2))
            same_steps(together(ours, x, lengths), alone(model, x, lengths))
    assert len(graphs.graphs) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_for_the_row(kind):
    """A replay draws the numbers of the unrecorded call on the same row, and others in the next call."""
    drops = {"dropout_rate": 0.2, "positional_dropout_rate": 0.1, "attention_dropout_rate": 0.2}
    ours, graphs = recorded(encoder(kind, **drops).train(), after=0)
    x, lengths = batch([90, 50])
    together(ours, x, lengths)
    seeded(4)
    found = together(ours, x, lengths)
    kept = {name: g.clone() for name, g in found[1].items()}  # the next step overwrites them
    other = together(ours, x, lengths)
    seeded(4)
    leaf = x.clone().requires_grad_()
    call = row.packed(ours, Room(FRAMES, RECORDINGS, LONGEST), leaf, lengths)
    hidden = row.encoded(ours, *call.arguments)
    assert hidden.shape[1] % MULTIPLE == 0
    y, after, _ = call.unpack(hidden)
    hidden = [one[:n] for one, n in zip(y, after.tolist(), strict=True)]
    same_steps((found[0], kept), (hidden, gradients(ours, hidden, leaf)))
    assert (found[0][0] - other[0][0]).abs().max() > 0.01
    assert len(graphs.graphs) == 1


def test_positions_are_dropped_too():
    model, shapes = encoder(positional_dropout_rate=0.5).train(), []
    model.embed.out[1].dropout.register_forward_hook(lambda module, args, y: shapes.append(y.shape[1:]))
    call = row.packed(model, Room(FRAMES, RECORDINGS, LONGEST), *batch([90, 50]))
    hidden = row.encoded(model, *call.arguments)
    assert shapes == [hidden.shape[1:], (2 * (LONGEST // 4 - 1) - 1, 12)]


def test_a_mask_in_place_of_lengths():
    ours, graphs = recorded(encoder().eval(), after=0)
    x, lengths = batch([90, 50])
    with torch.no_grad():
        mask = torch.arange(90) >= lengths[:, None]
        found, expected = ours(x, None, masks=mask), ours(x, lengths)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert len(graphs.graphs) == 1


def _exclude(path):
    return {"exclude": lambda name, module: name == path}


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _other_forward(model):
    cls = type(model)
    body = {"__module__": cls.__module__, "forward": lambda self, *args: cls.forward(self, *args)}
    model.__class__ = type(cls.__name__, (cls,), body)


def _replace(model, path, other):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, other)


NOT_ON_A_ROW = {
    "inner outputs": ("espnet", {"interctc_layer_idx": [1]}, {}, None, "it gives outputs of inner layers"),
    "checkpoints": ("ours", {"gradient_checkpoint_layers": [1]}, {}, None, "it checkpoints activations"),
    "weights": ("ours", {"zero_triu": True}, {}, None, "layer 0: its attention forms the weights"),
    "no positions": ("espnet", {"input_layer": None}, {}, None, "its positions are not relative ones"),
    "conv1d2": ("espnet", {"input_layer": "conv1d2"}, {}, None, "its input layer has modules that are not torch's"),
    "a layer": ("espnet", {}, _exclude("encoders.1"), None, "layer 1: it is not swapped"),
    "attention": ("espnet", {}, _exclude("encoders.0.attn"), None, "layer 0: its attention is not swapped"),
    "cgMLP": ("espnet", {}, _exclude("encoders.0.cgmlp"), None, "layer 0: its cgMLP is not swapped"),
    "gate": ("espnet", {}, _exclude("encoders.0.cgmlp.csgu"), None, "layer 0: its gate is not swapped"),
    "another forward": ("espnet", {}, {}, _other_forward, "EBranchformerEncoder runs code that is not upstream's"),
    "a convolution": (
        "ours",
        {},
        {},
        lambda model: _replace(model, "encoders.1.depthwise_conv_fusion", torch.nn.Conv1d(24, 24, 3, padding=1)),
        "layer 1: one of its convolutions is not torch's depthwise convolution",
    ),
    "an input layer": (
        "ours",
        {"input_layer": "linear"},
        {},
        lambda model: _replace(model, "embed.0", Doubled(BINS, 12)),
        "its input layer has modules that are not torch's, or have hooks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_ON_A_ROW)
def test_what_is_not_on_a_row(case):
    kind, options, selection, change, reason = NOT_ON_A_ROW[case]
    model = encoder(kind, **options).eval()
    if change is not None:
        change(model.double())
    if kind == "ours":
        model.ragged = True
    options = fastasr.Graphs(frames=FRAMES, recordings=RECORDINGS, recorder=TapeRecorder)
    report = fastasr.accelerate(model, ragged=True, graphs=options, **selection)
    assert reason in report.graphs[""] if kind == "ours" else reason in report.ragged[""], str(report)
    assert reason in report.rows[0].reason
    x, lengths = batch([60, 20])
    if case in ("an input layer", "a convolution"):
        with pytest.raises(ValueError, match=reason):
            model.double()(packed_frames(x, lengths), lengths)


def test_ours_runs_on_padding_unless_it_is_ragged():
    model = encoder().eval()
    options = fastasr.Graphs(frames=FRAMES, recordings=RECORDINGS, recorder=TapeRecorder)
    report = fastasr.accelerate(model, ragged=True, graphs=options)
    assert "by shape, not on a row: it runs on padding: set its attribute ragged" in report.rows[0].reason


def test_calls_that_want_the_padded_batch():
    model = encoder().eval()
    ours, graphs = recorded(copy.deepcopy(model), after=0)
    x, lengths = batch([60, 20])
    x = x.nan_to_num()
    with torch.no_grad():
        for more in ({"max_layer": 1}, {"return_all_hs": True}):
            found, expected = (m(x, lengths, **more)[0] for m in (ours, model))
            assert str(found) == str(expected)
            assert "the call asks for outputs of inner layers" in str(fastasr.why(ours))
        seen = []
        handle = ours.encoders[0].cgmlp.register_forward_hook(lambda m, args, y: seen.append(y[0].shape))
        ours(x, lengths)
        handle.remove()
    assert seen == [(2, 14, 12)]
    assert not graphs.graphs


REFUSED = {
    "on padding": (lambda: encoder(), {}, "encoder.ragged is False"),
    "a mask": (
        lambda: recorded(encoder())[0],
        {"masks": torch.zeros(2, 60, dtype=torch.bool)},
        "it has a mask beside its PackedFrames",
    ),
    "inner outputs": (
        lambda: without_padding(encoder("espnet")),
        {"max_layer": 1},
        "the call asks for outputs of inner layers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, more, reason = REFUSED[case]
    model = make().eval()
    x, lengths = batch([60, 20])
    with torch.no_grad(), pytest.raises(ValueError, match=f"but {reason}: pass the padded batch"):
        model(packed_frames(x, lengths), lengths, **more)
