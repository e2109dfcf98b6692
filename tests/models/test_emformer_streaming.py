# SPDX-License-Identifier: Apache-2.0
"""A segment through a layer in one native call: it gives what the operations give, and runs only where it may."""

import copy

import pytest
import torch
from packed_layers import assert_near, check_declined
from steps import moved, seeded

import fastasr
from fastasr.models import emformer
from fastasr.models.emformer import packed_step, stream

SIZES = {
    "memory": {"segment_length": 4, "left_context_length": 6, "max_memory_size": 3},
    "tanh": {
        "segment_length": 5, "left_context_length": 2, "max_memory_size": 1, "tanh_on_mem": True, "activation": "gelu",
    },
    "no memory": {"segment_length": 3, "left_context_length": 7, "activation": "silu"},
    "no context": {"segment_length": 2},
}  # fmt: skip


def _layer(dim=24, heads=3, ffn=70, **options):
    seeded(3)
    return moved(emformer.EmformerLayer(dim, heads, ffn, **(SIZES["memory"] | options)), 0.1).eval()


def _segment(layer, streams=2, right=2, past=9, lengths=None):
    """Returns the arguments of the step: the utterance lies batch first, as the encoder has it."""
    dim, frames, memory = layer.input_dim, layer.segment_length, layer.max_memory_size
    x = torch.randn(streams, frames + right, dim).transpose(0, 1)
    rows = memory, layer.left_context_length, layer.left_context_length
    state = [torch.randn(n, streams, dim) for n in rows]
    state.append(torch.full((1, streams), past, dtype=torch.int32))
    lengths = torch.full((streams,), frames) if lengths is None else torch.tensor(lengths)
    shared = stream.Step(layer, frames, streams, lengths, state[3], x.device)
    return x[:frames], x[frames:], state, torch.randn(min(1, memory), streams, dim), shared


def _wide(segment):
    utterance, right_context, state, mems, shared = segment
    return (
        utterance.double(),
        right_context.double(),
        [*(t.double() for t in state[:3]), state[3]],
        mems.double(),
        shared,
    )


def _by_operations(layer):
    return lambda *segment: stream.infer_by_operations(layer, *segment)


def _step(layer, segment):
    return packed_step.step(layer, *segment, _by_operations(layer))


def _served(layer, segment):
    """Returns the native call's result and requires that it serves."""
    out = _step(layer, segment)
    assert out is not None, packed_step.why_not(layer)
    return out


@torch.no_grad()
@pytest.mark.parametrize("options", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("dim", "heads", "streams", "right"), [(24, 3, 2, 2), (66, 2, 1, 0), (64, 1, 3, 1)])
def test_a_segment(options, dim, heads, streams, right):
    """Segments range from the first one to full contexts, with all frames and with fewer."""
    layer = _layer(dim, heads, **options)
    exact = copy.deepcopy(layer).double()
    short = [layer.segment_length - 1 - i % 2 for i in range(streams)]
    for past, lengths in ((0, None), (5, None), (40, None), (40, short)):
        segment = _segment(layer, streams, right, past, lengths)
        got = _served(layer, segment)
        assert_near(got, _by_operations(exact)(*_wide(segment)))
        state = list(segment[2])
        y, block, state, mems = stream.infer_segment(layer, *segment[:2], state, *segment[3:])
        assert all(torch.equal(a, b) for a, b in zip((y, block, mems, *state), got, strict=True))


@torch.no_grad()
def test_streams_and_threads_change_no_bit():
    layer = _layer(128, 4, 200, segment_length=8)
    together = _segment(layer, 3, 4)
    got = _served(layer, together)
    torch.set_num_threads(2)
    again = _served(layer, together)
    utterance, right_context, state, mems, shared = together
    one = slice(1, 2)
    alone = utterance[:, one], right_context[:, one], [t[:, one] for t in state], mems[:, one], shared
    shared.lengths = None
    for a, b, c in zip(got, again, _served(layer, alone), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[:, one], c)


def test_what_is_declined():
    layer = _layer()
    segment = _segment(layer)
    utterance, right_context, state, mems, shared = segment
    others = (
        _segment(layer, streams=13),
        (utterance[:3], right_context, state, mems, shared),
        (utterance, right_context, state, mems.expand(2, -1, -1), shared),
    )

    def declined(layer, segment):
        return _step(layer, segment) is None

    def run():
        stream.infer_segment(layer, *segment[:2], list(segment[2]), *segment[3:])

    check_declined(layer, segment, declined, run, layer.pos_ff[2], layer.dropout, others)
    with torch.no_grad():
        assert declined(layer.double(), _wide(segment))
        assert not declined(layer.float(), segment)


@torch.no_grad()
def test_a_submodule_that_computes_something_else_is_called():
    layer = _layer()
    segment = _segment(layer)
    layer.pos_ff[2] = torch.nn.Tanh().eval()
    assert _step(layer, segment) is None
    assert "pos_ff" in packed_step.why_not(layer)
    layer.pos_ff[2] = torch.nn.GELU(approximate="tanh").eval()
    assert _step(layer, segment) is None
    assert "approximate" in packed_step.why_not(layer)
    layer.pos_ff[2] = torch.nn.GELU().eval()
    _served(layer, segment)
    layer.memory_op = torch.nn.AvgPool1d(1, 1).eval()
    assert _step(layer, segment) is None
    assert packed_step.why_not(layer) == "its operations compute something else"
    stream.infer_segment(layer, *segment[:2], list(segment[2]), *segment[3:])


@torch.no_grad()
def test_a_stream_through_swapped_layers():
    """torchaudio's layers, swapped, take the same path and give the same bits as fastasr's."""
    upstream = pytest.importorskip("torchaudio.models.emformer")
    options = {
        "left_context_length": 5,
        "right_context_length": 2,
        "max_memory_size": 2,
        "activation": "gelu",
    }
    seeded(0)
    theirs = upstream.Emformer(24, 3, 40, 2, 4, **options).eval()
    ours = emformer.Emformer(24, 3, 40, 2, 4, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    fastasr.accelerate(theirs)
    x, states = torch.randn(2, 26, 24), [None, None]
    for step in range(6):
        chunk, found = x[:, 4 * step : 4 * step + 6], []
        for i, model in enumerate((ours, theirs)):
            y, _, states[i] = model.infer(chunk, torch.tensor([6, 6 - step // 5]), states[i])
            found.append([y, *(t for layer in states[i] for t in layer)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for model in (ours, theirs):
        assert [packed_step.why_not(layer) for layer in model.emformer_layers] == ["", ""]
