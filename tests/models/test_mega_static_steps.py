# SPDX-License-Identifier: Apache-2.0
"""Steps on buffers of fixed size, as a CUDA graph captures them: on CPU all but the capture."""

import random

import pytest
import torch
from mega_decoders import (
    CHANGES,
    KIND_IDS,
    KINDS,
    bits,
    block_by_block,
    copied,
    current,
    labels_of,
    ours,
    same,
    unbatched,
)

from fastasr.models.mega import decoding
from fastasr.models.mega.graph_decoding import StaticStep

pytestmark = pytest.mark.usefixtures("no_gradients")


# --------------------------------------------------------------------------- buffers of fixed size
@pytest.fixture
def static(monkeypatch):
    """Runs the path of CUDA devices on CPU, except for the capture, in whose place the step runs in eager."""
    captured = []
    monkeypatch.setattr(decoding, "_serves_natively", lambda decoder: False)
    monkeypatch.setattr(StaticStep, "capture", lambda self: captured.append(self) or self)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return captured


@pytest.mark.parametrize("phantom", [False, True])
@pytest.mark.parametrize("options", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("batch", [1, 5])
def test_static_steps(static, batch, options, phantom):
    decoder = ours(phantom, **options)
    mine = states = decoder.init_state(batch)
    for t in range(14):
        labels = labels_of(batch)
        if t % 5 == 4:  # not those that are still in the buffers
            mine = copied(mine)
        got, expected = decoding.step(decoder, labels, mine), block_by_block(decoder, labels, states)
        same(got, expected)
        mine, states = got[1], expected[1]
    assert len(static) == 1


@pytest.mark.parametrize("phantom", [False, True])
@pytest.mark.parametrize("options", KINDS, ids=KIND_IDS)
def test_static_steps_in_a_random_search(static, options, phantom):
    decoder = ours(phantom, **options)
    states = [unbatched(decoder.init_state())]
    for _ in range(40):
        batch = decoder.create_batch_states(random.choices(states, k=random.randint(1, 3)))
        labels = labels_of(len(batch[0]["ema_state"]))
        before = copied(batch)
        got = decoding.step(decoder, labels, batch)
        same(got, block_by_block(decoder, labels, before))
        states += [decoder.select_state(got[1], i) for i in range(len(labels))]
        random.shuffle(states)
        del states[8:]
    assert len(static) == 3


def test_static_steps_do_not_share_memory_with_their_results(static):
    decoder = ours()
    _, states = decoding.step(decoder, labels_of(2), decoder.init_state(2))
    kept, labels = copied(states), labels_of(2)
    expected = decoding.step(decoder, labels, states)
    first = copied(expected[1])
    decoding.step(decoder, labels_of(2), decoder.init_state(2))
    bits((expected[0], expected[1]), (expected[0], first))
    bits(decoding.step(decoder, labels, states), expected)
    bits(decoding.step(decoder, labels, kept), expected)
    states[0]["prev_key"].mul_(2)
    again = decoding.step(decoder, labels, states)
    assert not torch.equal(again[0], expected[0])
    same(again, block_by_block(decoder, labels, states))


def test_static_steps_for_longer_histories(static):
    decoder = ours(num_blocks=1, max_positions=150)
    for history in (10, 63, 64, 100, 149):
        states = [
            {
                "ema_state": torch.randn(2, 40, 4),
                "prev_key": torch.randn(2, history, 24),
                "prev_value": torch.randn(2, history, 100),
            }
        ]
        labels = labels_of(2)
        same(decoding.step(decoder, labels, states), block_by_block(decoder, labels, states))
    assert [one.rows for one in static] == [64, 128, 150]
    states[0]["prev_key"] = torch.randn(2, 150, 24)
    states[0]["prev_value"] = torch.randn(2, 150, 100)
    assert decoding.step(decoder, labels, states) is None


def test_static_steps_are_never_stale(static):
    decoder = ours()
    current(decoder)
    for change in CHANGES.values():
        change(decoder)
        decoder.eval()
        current(decoder)


def test_few_static_steps_are_kept(static):
    decoder = ours(num_blocks=1)
    for batch in range(1, 12):
        decoding.step(decoder, labels_of(batch), decoder.init_state(batch))
    assert len(static) == 11
    assert [batch for batch, _ in decoding._PLANS.of(decoder)._graphs] == list(range(4, 12))


@pytest.mark.gpu
@pytest.mark.parametrize("options", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("batch", [1, 4])
def test_captured_steps(batch, options):
    decoder = ours(**options).cuda()
    mine = states = decoder.init_state(batch)
    for t in range(80):
        labels = labels_of(batch).cuda()
        if t % 7 == 6:
            mine = copied(mine)
        got, expected = decoding.step(decoder, labels, mine), block_by_block(decoder, labels, states)
        same(got, expected, rtol=1e-4, atol=1e-4)
        mine, states = got[1], expected[1]


@pytest.mark.gpu
def test_captured_steps_on_other_streams():
    decoder = ours().cuda()
    states = expected = decoder.init_state(3)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for t in range(30):
        labels = labels_of(3).cuda()
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[t % 3]):
            out, states = decoding.step(decoder, labels, states)
        torch.cuda.synchronize()
        other, expected = block_by_block(decoder, labels, expected)
        torch.testing.assert_close(out, other, rtol=1e-4, atol=1e-4)
