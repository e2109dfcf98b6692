# SPDX-License-Identifier: Apache-2.0
"""fastasr.models.mega by itself: streaming, caches, states, errors, devices and types, compilation."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from steps import cotangent, moved, numbers, seeded

from fastasr.models import mega
from fastasr.models.mega import decoder as decoder_file
from fastasr.models.mega.positional_bias import matrix, relative


def decoder(seed=0, **arguments):
    """Returns a tiny decoder in eval mode, with parameters far from their initial values."""
    seeded(seed)
    sizes = {"block_size": 16, "linear_size": 24, "qk_size": 8, "v_size": 20, "num_heads": 2}
    return moved(
        mega.MEGADecoder(12, **{**sizes, "num_blocks": 2, "max_positions": 24, **arguments}), 0.3
    ).eval()


def sequence(length, seed=1):
    generator = numbers(seed)
    return [0, *torch.randint(1, 12, (length - 1,), generator=generator).tolist()]


def scored(model, labels):
    """Returns step by step outputs, (L, D)."""
    states, outs = model.init_state(), []
    for t in range(len(labels)):
        out, states = model.score(labels[: t + 1], states)
        outs.append(out)
    return torch.cat(outs)


@pytest.mark.parametrize("chunk_size", [-1, 1, 4])
@pytest.mark.parametrize("bias", ["simple", "rotary"])
def test_streaming_equals_training(bias, chunk_size):
    model = decoder(rel_pos_bias_type=bias, chunk_size=chunk_size).double()
    labels = sequence(11)
    with torch.no_grad():
        torch.testing.assert_close(scored(model, labels), model(torch.tensor([labels]))[0])


def test_the_phantom_first_step_is_an_option():
    ours, phantom = decoder(), decoder(phantom_first_step=True)
    labels = sequence(3)
    with torch.no_grad():
        expected = ours(torch.tensor([labels]))[0]
        torch.testing.assert_close(phantom(torch.tensor([labels]))[0], expected, rtol=0, atol=0)
        assert (scored(ours, labels) - expected).abs().max() < 1e-5
        assert (scored(phantom, labels) - expected).abs().max() > 1e-2
    assert phantom.init_state()[0]["prev_key"].shape == (1, 1, 8)
    assert ours.init_state()[0]["prev_key"].shape == (1, 0, 8)


def test_gradients_of_streaming():
    """Pieces carry gradients through their states."""
    model = decoder().double()
    labels = torch.tensor([sequence(7), sequence(7, seed=2)])
    scores = model(labels)
    weights = cotangent(scores)
    whole = torch.autograd.grad(scores, list(model.parameters()), weights)
    out, states = model.inference(labels[:, :3], model.init_state(2))
    rest, _ = model.inference(labels[:, 3:], states)
    pieces = (out * weights[:, :3]).sum() + (rest * weights[:, 3:]).sum()
    torch.testing.assert_close(torch.autograd.grad(pieces, list(model.parameters())), whole)


# --------------------------------------------------------------------------- states
def test_states_of_a_batch_and_of_one():
    model = decoder()
    one, batch = model.init_state(), model.init_state(3)
    assert [t.shape for t in one[0].values()] == [(16, 2), (1, 0, 8), (1, 0, 20)]
    assert [t.shape for t in batch[0].values()] == [(3, 16, 2), (3, 0, 8), (3, 0, 20)]
    for states in (one, model.init_state(1), model.select_state(batch, 1)):
        stacked = model.create_batch_states([states, states])
        assert [t.shape for t in stacked[0].values()] == [(2, 16, 2), (2, 0, 8), (2, 0, 20)]


def test_shorter_states_of_a_batch_stay_what_they_are():
    model = decoder()
    with torch.no_grad():
        states = []
        for length in (3, 5):
            labels = torch.tensor([sequence(length)])
            states.append(model.select_state(model.inference(labels, model.init_state(1))[1], 0))
        batch = model.create_batch_states(states)
        assert batch[0]["prev_length"].tolist() == [3, 5]
        assert batch[0]["prev_key"].shape == (2, 5, 8)
        for i in range(2):
            for a, b in zip(model.select_state(batch, i), states[i], strict=True):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[key], b[key]) for key in b)


def test_the_longest_leaves_its_chunk():
    """After that no state is longer than the longest remaining one."""
    model = decoder(chunk_size=3)
    with torch.no_grad():
        two = model.inference(torch.tensor([[0, 3]]), model.init_state(1))[1]
        batch = model.create_batch_states([model.select_state(two, 0), model.init_state()])
        _, after = model.inference(torch.tensor([[5], [0]]), batch)
        assert after[0]["prev_length"].tolist() == [0, 1]
        assert after[0]["prev_key"].shape == (2, 1, 8)
        _, after = model.inference(torch.tensor([[5], [4]]), after)
        _, after = model.inference(torch.tensor([[5], [4]]), after)
        assert after[0]["prev_length"].tolist() == [2, 0]


def test_stacking_keeps_type_and_place():
    model = decoder()
    parts = [torch.randn(2, 8, dtype=torch.float64), torch.randn(1, 3, 8, dtype=torch.float64)]
    stacked = model.stack_qk_states(parts, 8)
    assert stacked.dtype == torch.float64
    assert torch.equal(stacked[0], torch.cat([torch.zeros(1, 8), parts[0]]))
    assert torch.equal(stacked[1], parts[1][0])
    meta = model.stack_qk_states([torch.empty(2, 8, device="meta"), torch.empty(1, 8, device="meta")], 8)
    assert meta.device.type == "meta"


def test_batch_score_takes_any_hypothesis():
    model = decoder()
    with torch.no_grad():
        _, states = model.score([0], model.init_state())
        hyps = [
            SimpleNamespace(yseq=[0, 4], dec_state=states),
            SimpleNamespace(yseq=[0], dec_state=model.init_state()),
        ]
        out, after = model.batch_score(hyps)
        assert out.shape == (2, 16)
        torch.testing.assert_close(out[0], scored(model, [0, 4])[1])
        torch.testing.assert_close(out[1], scored(model, [0])[0])
    assert len(after) == 2


# --------------------------------------------------------------------------- caches
def counting(model):
    """Records the labels on which ``inference`` is called from now on."""
    calls, inference = [], model.inference

    def counted(labels, states):
        calls.append(labels.flatten().tolist())
        return inference(labels, states)

    model.inference = counted
    return calls


def test_scores_are_remembered_for_one_utterance():
    model = decoder()
    calls = counting(model)
    with torch.no_grad():
        start = model.init_state()
        first, states = model.score([0], start)
        again, same = model.score([0], start)
        assert torch.equal(first, again)
        assert same is states
        model.score([0, 3], states)
        model.score([0, 3], states)
        assert calls == [[0], [3]]
        model.score([0], model.init_state())  # another utterance
        assert list(model.score_cache) == [(0,)]
        assert len(calls) == 3


def test_scores_belong_to_their_states():
    model = decoder()
    with torch.no_grad():
        _, states = model.score([0], model.init_state())
        _, others = model.inference(torch.tensor([[7]]), model.init_state())
        a, _ = model.score([0, 3], states)
        b, _ = model.score([0, 3], others)
    assert not torch.allclose(a, b)


def test_the_score_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(decoder_file, "SCORE_CACHE_SIZE", 5)
    model = decoder()
    calls = counting(model)
    with torch.no_grad():
        _, states = model.score([0], model.init_state())
        for label in range(1, 8):
            model.score([0, label], states)
        assert list(model.score_cache) == [(0, label) for label in range(3, 8)]
        model.score([0, 3], states)  # the oldest: from now on the youngest
        model.score([0, 1], states)
        assert (0, 3) in model.score_cache
        assert (0, 4) not in model.score_cache
    assert len(calls) == 9


@pytest.mark.parametrize("change", ["load_state_dict", "double", "train", "step"])
def test_nothing_is_stale(change):
    model, other = decoder(), decoder(seed=5)
    labels = sequence(4)
    with torch.no_grad():
        scored(model, labels)
        if change == "load_state_dict":
            model.load_state_dict(other.state_dict())
        elif change == "double":
            model.double()
        elif change == "train":
            model.train().eval()
    if change == "step":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(torch.tensor([labels])).square().sum().backward()
        optimizer.step()
        model.eval()
    assert not model.score_cache
    with torch.no_grad():
        torch.testing.assert_close(
            scored(model, labels), model(torch.tensor([labels]))[0], rtol=1e-4, atol=1e-5
        )


def test_set_device():
    model = decoder()
    assert model.device == torch.device("cpu")
    model.set_device("meta")
    assert model.init_state()[0]["prev_key"].device.type == "meta"
    model.double()
    assert model.init_state()[0]["ema_state"].device.type == "cpu"
    assert model.init_state()[0]["ema_state"].dtype == torch.float64


# --------------------------------------------------------------------------- parts
def test_the_rotary_bias_depends_on_the_offset_alone():
    bias = mega.RotaryRelativePositionBias(8, max_positions=4).double()
    a, b = bias.alpha[0], bias.beta[0]
    theta = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)

    def rotated(x, m):
        first, second = x.chunk(2)
        c, s = torch.cos(m * theta), torch.sin(m * theta)
        return torch.cat([first * c - second * s, second * c + first * s])

    expected = torch.stack([torch.stack([rotated(a, m) @ rotated(b, n) for n in range(9)]) for m in range(9)])
    torch.testing.assert_close(bias(9), expected)
    torch.testing.assert_close(relative(bias, 9), torch.cat([expected[:, 0].flip(0), expected[0, 1:]]))


def test_the_gradient_of_a_bias_in_16_bits_is_added_up_in_float32():
    bias = mega.RelativePositionBias(120).bfloat16()
    grad = torch.randn(120, 1).expand(120, 120).bfloat16()
    parameters = [m.relative_position_bias for m in (bias, copy.deepcopy(bias).double())]
    found, exact = (torch.autograd.grad(matrix(p), p, grad.to(p.dtype))[0] for p in parameters)
    assert (found - exact).norm() < 2.0**-8 * exact.norm()


def test_a_long_rotary_bias_in_float32():
    bias = mega.RotaryRelativePositionBias(128)
    exact = relative(copy.deepcopy(bias).double(), 3000)
    assert (relative(bias, 3000) - exact).abs().max() < 1e-6 * exact.abs().max()


def test_simple_values_are_a_view_of_the_parameter():
    bias = mega.RelativePositionBias(10)
    values = relative(bias, 3)
    assert values.data_ptr() == bias.relative_position_bias[7:].data_ptr()
    assert values.shape == (5,)
    with pytest.raises(ValueError, match=r"length: expected at most 10 \(max_positions\), got 11"):
        bias(11)


def test_modules_alone_take_a_size_only():
    for module, x in (
        (mega.MEGA(16, qk_size=8, v_size=12), torch.randn(5, 2, 16)),
        (mega.NormalizedPositionwiseFeedForward(16, 24), torch.randn(5, 2, 16)),
        (mega.MultiHeadDampedEMA(16), torch.randn(5, 2, 16)),
    ):
        out = module(x)
        assert (out[0] if isinstance(out, tuple) else out).shape == x.shape


# --------------------------------------------------------------------------- errors
ONE, THREE = torch.tensor([[1]]), torch.tensor([[1], [2], [3]])


def other_keys(model):
    return [{**state, "prev_key": torch.zeros(1, 2, 9)} for state in model.init_state()]


ERRORS = {
    r"labels: expected shape \(B, L\), got \(3,\)": lambda m: m(torch.zeros(3, dtype=torch.long)),
    "labels: expected dtype int64 or int32, got torch.float32": lambda m: m(torch.zeros(1, 3)),
    "labels: expected 0 to 11, got 0 to 12": lambda m: m(torch.tensor([[0, 12]])),
    "length: expected at most 24": lambda m: m(torch.ones(1, 25, dtype=torch.long)),
    "states: expected 2 dicts": lambda m: m.inference(ONE, m.init_state()[:1]),
    "states: lack ema_state, prev_value": lambda m: m.inference(ONE, [{"prev_key": None}] * 2),
    r"prev_key: expected shape \(B, H, 8\), got \(1, 2, 9\)": lambda m: m.inference(ONE, other_keys(m)),
    r"ema_state: expected shape \(3, 16, 2\), got \(2, 16, 2\)": lambda m: m.inference(
        THREE, m.init_state(2)
    ),
    r"MEGA: x: expected shape \(L, B, 16\)": lambda m: m.mega_blocks[0][0](torch.zeros(3, 2, 15)),
    "expected 'simple' or 'rotary', got 'alibi'": lambda m: decoder(rel_pos_bias_type="alibi"),
    "activation_type: expected one of ftswish, ": lambda m: decoder(activation_type="swosh"),
    "normalization_type: expected one of basic_norm": lambda m: decoder(normalization_type="bn"),
    "size: expected an even number, got 7": lambda m: mega.RotaryRelativePositionBias(7),
}


@pytest.mark.parametrize(("message", "call"), ERRORS.items(), ids=ERRORS)
def test_errors(message, call):
    error = TypeError if "dtype" in message else ValueError
    with pytest.raises(error, match=message), torch.no_grad():
        call(decoder())


# --------------------------------------------------------------------------- surroundings
def test_empty_sequences_and_batches():
    model = decoder()
    assert model(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 16)
    assert model(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 16)


def test_int32_labels():
    model, labels = decoder(), torch.tensor([sequence(5)])
    assert torch.equal(model(labels.int()), model(labels))


def test_copies():
    model, labels = decoder(activation_args={"swish_beta": 1.5}), torch.tensor([sequence(5)])
    expected = model(labels)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(labels), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, labels = decoder(), torch.tensor([sequence(8), sequence(8, 2)])
    with torch.no_grad():
        expected = model(labels)
        out = model.to(dtype)(labels)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_autocast():
    model, labels = decoder(), torch.tensor([sequence(8), sequence(8, 2)])
    expected = model(labels)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.train()(labels)
        grads = torch.autograd.grad(out.float().square().sum(), list(model.parameters()))
    assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("bias", ["simple", "rotary"])
def test_compile(bias):
    """A block compiles without a graph break."""
    block, _ = decoder(rel_pos_bias_type=bias, num_blocks=1).mega_blocks[0]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 2, 16, requires_grad=True)
    padding = torch.arange(9).unsqueeze(0) >= torch.tensor([[9], [6]])
    leaves = [x, *block.parameters()]
    results = []
    for run in (compiled, block):
        out, _ = run(x, mask=padding.unsqueeze(1), attn_mask="causal")
        results.append([out, *torch.autograd.grad(out, leaves, cotangent(out))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
