# SPDX-License-Identifier: Apache-2.0
"""One native step of a MEGA decoder: equal to ESPnet's streaming and to the whole sequence, for any search."""

import copy
import io
import random
import threading

import pytest
import torch
from mega_decoders import (
    KIND_IDS,
    KINDS,
    SIZES,
    TOLERANCE,
    bits,
    block_by_block,
    copied,
    labels_of,
    ours,
    same,
    unbatched,
)

from fastasr.models.mega import decoding
from fastasr.ops import _dispatch, _gemm

pytestmark = [
    pytest.mark.skipif(bool(_dispatch.why_not_native()), reason=_dispatch.why_not_native()),
    pytest.mark.usefixtures("no_gradients"),
]


# --------------------------------------------------------------------------- values
@pytest.mark.parametrize("options", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_streaming_is_the_whole_sequence(batch, options):
    decoder = ours(**options)
    labels = torch.randint(1, SIZES["vocab_size"], (batch, 23))
    states, outs = decoder.init_state(batch), []
    for t in range(labels.shape[1]):
        out, states = decoding.step(decoder, labels[:, t : t + 1], states)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), decoder(labels), **TOLERANCE)


@pytest.mark.parametrize("phantom", [False, True])
@pytest.mark.parametrize("options", KINDS, ids=KIND_IDS)
def test_a_random_search(options, phantom):
    """Hypotheses of different lengths are selected, dropped, joined and continued in any order."""
    decoder = ours(phantom, **options)
    hypotheses = [([1], unbatched(decoder.init_state()))]
    for _ in range(60):
        chosen = random.choices(hypotheses, k=random.randint(1, 5))
        labels = labels_of(len(chosen))
        states = decoder.create_batch_states([state for _, state in chosen])
        before = copied(states)
        out, after = decoding.step(decoder, labels, states)
        same((out, after), block_by_block(decoder, labels, before))
        for state, kept in zip(states, before, strict=True):
            assert all(torch.equal(state[name], kept[name]) for name in kept), "a state was written to"
        for i, (sequence, _) in enumerate(chosen):
            hypotheses.append((sequence + labels[i].tolist(), decoder.select_state(after, i)))
        random.shuffle(hypotheses)
        del hypotheses[12:]
    if not phantom:
        for sequence, state in hypotheses:
            if len(sequence) < 2:
                continue
            out, _ = decoding.step(decoder, labels_of(), decoder.create_batch_states([state]))
            assert out.isfinite().all()


def test_hypotheses_of_a_batch_do_not_see_the_padding_of_others():
    decoder = ours()
    states, expected = [], []
    for length in (1, 4, 9):
        labels = torch.randint(1, SIZES["vocab_size"], (1, length))
        state = decoder.init_state(1)
        for t in range(length):
            out, state = decoding.step(decoder, labels[:, t : t + 1], state)
        states.append(decoder.select_state(state, 0))
        expected.append(decoder(torch.cat([labels, torch.tensor([[7]])], dim=1))[:, -1])
    out, after = decoding.step(decoder, torch.full((3, 1), 7), decoder.create_batch_states(states))
    torch.testing.assert_close(out[:, 0], torch.cat(expected), **TOLERANCE)
    assert after[0]["prev_length"].tolist() == [2, 5, 10]


def test_error_is_no_worse_than_torchs(monkeypatch):
    # Torch's products add blocks of terms here, as the step does. On some processors MKL adds shorter sums where rows
    # are few: the step's error is up to twice that of theirs.
    monkeypatch.setenv("FASTASR_GEMM", "native")
    monkeypatch.setattr(_gemm, "_MOST_FEW", 0)
    _gemm.forget()
    decoder = ours(block_size=128, v_size=256, qk_size=64, linear_size=256)
    exact = copy.deepcopy(decoder).double()
    labels = torch.randint(1, SIZES["vocab_size"], (4, 40))
    expected = exact(labels)
    errors = {}
    for name, run in {"step": decoding.step, "torch": block_by_block}.items():
        states, outs = decoder.init_state(4), []
        for t in range(labels.shape[1]):
            out, states = run(decoder, labels[:, t : t + 1], states)
            outs.append(out)
        errors[name] = (torch.cat(outs, dim=1) - expected).square().mean().sqrt().item()
    _gemm.forget()
    assert errors["step"] <= 1.1 * errors["torch"], errors


def test_a_rotary_history_has_no_end():
    decoder = ours(rel_pos_bias_type="rotary", num_blocks=1)
    history = 700  # beyond the positions that are laid out at first
    states = [
        {
            "ema_state": torch.randn(1, 40, 4),
            "prev_key": torch.randn(1, history, 24),
            "prev_value": torch.randn(1, history, 100),
        }
    ]
    labels = labels_of()
    same(decoding.step(decoder, labels, states), block_by_block(decoder, labels, states))


# --------------------------------------------------------------------------- bits
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_the_threads(threads):
    decoder = ours(block_size=256, v_size=520, linear_size=512, num_blocks=1)
    states = decoder.init_state(6)
    for _ in range(4):
        labels = labels_of(6)
        kept = copied(states)
        one = decoding.step(decoder, labels, states)
        torch.set_num_threads(threads)
        many = decoding.step(decoder, labels, kept)
        torch.set_num_threads(1)
        bits(many, one)
        states = one[1]


def test_bits_do_not_depend_on_the_batch():
    decoder = ours()
    states = decoder.init_state(16)
    for _ in range(3):
        _, states = decoding.step(decoder, labels_of(16), states)
    labels = labels_of(16)
    parts = [decoder.select_state(states, i) for i in range(16)]
    whole = decoding.step(decoder, labels, copied(states))
    for size in (1, 2, 3, 5, 7, 11):
        order = random.sample(range(16), size)
        out, after = decoding.step(
            decoder, labels[order], decoder.create_batch_states([parts[i] for i in order])
        )
        assert torch.equal(out, whole[0][order])
        for state, expected in zip(after, whole[1], strict=True):
            assert all(torch.equal(state[name], expected[name][order]) for name in state)


# --------------------------------------------------------------------------- states
def test_two_hypotheses_go_on_from_one_state():
    decoder = ours(phantom=True)
    states = decoder.init_state()
    for _ in range(5):
        _, states = decoding.step(decoder, labels_of(), states)
    kept = copied(states)
    branches = {label: decoding.step(decoder, torch.tensor([[label]]), states) for label in (3, 4, 5)}
    again = {
        label: decoding.step(decoder, torch.tensor([[8]]), after) for label, (_, after) in branches.items()
    }
    for label in branches:
        expected = decoding.step(decoder, torch.tensor([[label]]), copied(kept))
        bits(branches[label], expected)
        bits(again[label], decoding.step(decoder, torch.tensor([[8]]), copied(expected[1])))
    for state, before in zip(states, kept, strict=True):
        assert all(torch.equal(state[name], before[name]) for name in before)


def test_histories_grow_in_place():
    decoder = ours()
    states, moves = decoder.init_state(), 0
    for _ in range(200):
        before = [state[name].data_ptr() for state in states for name in ("prev_key", "prev_value")]
        _, states = decoding.step(decoder, labels_of(), states)
        after = [state[name].data_ptr() for state in states for name in ("prev_key", "prev_value")]
        moves += before != after
    assert moves <= 8
    assert states[0]["prev_key"].shape == (1, 200, 24)


def test_a_stacked_batch_grows_in_place():
    decoder = ours()
    state = decoder.init_state()
    for _ in range(3):
        _, state = decoding.step(decoder, labels_of(), state)
    states = decoder.create_batch_states([unbatched(state)] * 4)
    _, after = decoding.step(decoder, labels_of(4), states)
    assert after[0]["prev_value"].data_ptr() == states[0]["prev_value"].data_ptr()


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    "keep",
    [
        copy.deepcopy,
        _saved,
        copied,
        lambda states: [{n: t.mT.contiguous().mT for n, t in s.items()} for s in states],
    ],
    ids=["deepcopy", "saved", "cloned", "transposed"],
)
def test_states_can_be_kept(keep):
    decoder = ours()
    states = decoder.init_state(2)
    for _ in range(4):
        _, states = decoding.step(decoder, labels_of(2), states)
    kept = keep(states)
    labels = labels_of(2)
    expected = decoding.step(decoder, labels, states)
    for _ in range(2):  # the second copies: the row is taken
        bits(decoding.step(decoder, labels, kept), expected)


def test_states_of_one_sequence_of_a_batch():
    """Rows of a batch grow by themselves, in the memory of the batch."""
    decoder = ours()
    _, states = decoding.step(decoder, labels_of(3), decoder.init_state(3))
    _, states = decoding.step(decoder, labels_of(3), states)
    alone = [{name: tensor[1:2] for name, tensor in state.items()} for state in states]
    labels = labels_of()
    expected = decoding.step(decoder, labels, copied(alone))
    bits(decoding.step(decoder, labels, alone), expected)
    whole = labels_of(3)
    kept = copied(states)
    bits(decoding.step(decoder, whole, states), decoding.step(decoder, whole, kept))
    expanded = [{name: t.expand(3, *t.shape[1:]) for name, t in state.items()} for state in alone]
    same(decoding.step(decoder, whole, expanded), block_by_block(decoder, whole, expanded))


def test_threads_branch_from_one_state():
    decoder = ours()
    states = decoder.init_state()
    for _ in range(4):
        _, states = decoding.step(decoder, labels_of(), states)
    kept, results = copied(states), {}

    def go_on(label):
        with torch.no_grad():
            after, outs = states, []
            for i in range(20):
                out, after = decoding.step(decoder, torch.tensor([[(label + i) % 50]]), after)
                outs.append(out)
            results[label] = torch.cat(outs)

    workers = [threading.Thread(target=go_on, args=(label,)) for label in range(1, 7)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for label, got in results.items():
        after, outs = kept, []
        for i in range(20):
            out, after = decoding.step(decoder, torch.tensor([[(label + i) % 50]]), after)
            outs.append(out)
        assert torch.equal(got, torch.cat(outs))


def test_missing_states_count_as_none():
    decoder = ours()
    labels = labels_of(2)
    nothing = [{"ema_state": None, "prev_key": None, "prev_value": None} for _ in decoder.mega_blocks]
    bits(decoding.step(decoder, labels, nothing), decoding.step(decoder, labels, decoder.init_state(2)))
