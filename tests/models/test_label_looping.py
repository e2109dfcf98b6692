# SPDX-License-Identifier: Apache-2.0
"""Label looping, natively and by operations, against a loop over one sequence that is written from the formulas."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from steps import close, numbers, seeded
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastasr
from fastasr.models.transducer import label_looping
from fastasr.models.transducer.label_looping import LabelLooping, Rules, Weights


def drawn_weights(
    tokens, durations=0, layers=1, embedding=5, hidden=7, joint=6, context=1, group=0, **options
):
    """Returns weights with random numbers. 0 layers: a predictor without state."""

    def normal(*shape):
        return torch.randn(shape) * shape[-1] ** -0.5

    lstm, inputs = [], embedding
    for _ in range(layers):
        gates = 4 * hidden
        lstm.append((normal(gates, inputs), normal(gates, hidden), torch.randn(gates), torch.randn(gates)))
        inputs = hidden
    outputs = tokens + durations
    return Weights(
        embedding=torch.randn(tokens, embedding),
        layers=tuple(lstm),
        linear=(normal(joint, inputs), torch.randn(joint)),
        head=(2 * normal(outputs, joint), torch.randn(outputs)),
        convolution=normal(embedding, group, context) if group else None,
        context=context,
        **{"activation": "relu"} | options,
    )


def drawn_problem():
    """Returns weights, encoded frames, lengths and rules, all drawn."""
    tokens, context = random.randint(1, 40), random.randint(1, 3)
    durations = tuple(random.choice([(), (), (0, 1, 2), (0, 1, 2, 3, 4), (1, 2), (4, 0, 1), (0,)]))
    sizes = {"layers": random.randint(1, 3)} if random.random() < 0.6 else {"layers": 0, "context": context}
    sizes |= {
        "embedding": 4 * random.randint(1, 6),
        "hidden": random.randint(1, 40),
        "joint": random.randint(1, 50),
    }
    if not sizes["layers"] and context > 1:
        sizes["group"] = random.choice([1, 2, 4])
    if random.random() < 0.3:
        joint = sizes["joint"]
        sizes["norm"] = (1 + 0.2 * torch.randn(joint), torch.randn(joint), 1e-3)
    if sizes.get("layers") and random.random() < 0.4:
        hidden = sizes["hidden"]
        sizes["gate_norms"] = tuple(
            tuple(offset + 0.3 * torch.randn(n * hidden) for offset, n in ((1, 4), (0, 4), (1, 1), (0, 1)))
            for _ in range(sizes["layers"])
        )
        sizes["gate_eps"] = 1e-3
    w = drawn_weights(tokens, len(durations), activation=random.choice(["relu", "tanh"]), **sizes)
    batch, frames = random.randint(1, 9), random.randint(1, 12)
    rules = Rules(
        blank=random.randrange(tokens),
        durations=durations,
        skipped=random.choice([-1, -1, random.randrange(tokens)]),
        most_symbols=random.choice([0, 1, 2, 10]),
        together=random.random() < 0.5,
        blank_penalty=random.choice([0.0, 0.0, 0.7, -1.5]),
        scored=random.random() < 0.7,
    )
    encoded = 1.5 * torch.randn(batch, frames, sizes["joint"])
    lengths = torch.tensor([random.randint(0, frames) for _ in range(batch)])
    return w, encoded, lengths, rules


def by_hand(w, encoded, length, rules, first, least_steps, most_steps):
    """Returns the steps (token, frames moved, score) of one sequence, at least ``least_steps``."""
    context, hidden, steps = list(first), [None] * len(w.layers), []

    def predicted():
        x = torch.stack([w.embedding[t] if t >= 0 else torch.zeros_like(w.embedding[0]) for t in context])
        if w.convolution is not None:
            channels, group, _ = w.convolution.shape
            x = torch.stack(
                [
                    (w.convolution[d] * x[:, d // group * group : d // group * group + group].T).sum()
                    for d in range(channels)
                ]
            ).relu()[None]
        x = x[-1:]
        for i, (w_ih, w_hh, b_ih, b_hh) in enumerate(w.layers):
            if w.gate_norms:
                h, c = hidden[i] or (torch.zeros(1, w.hidden), torch.zeros(1, w.hidden))
                gate_weight, gate_bias, cell_weight, cell_bias = w.gate_norms[i]
                gates = x @ w_ih.T + b_ih + h @ w_hh.T + b_hh
                gates = F.layer_norm(gates, gates.shape[1:], gate_weight, gate_bias, w.gate_eps)[0]
                write, keep, new, read = gates.split(w.hidden)
                c = torch.sigmoid(keep) * c + torch.sigmoid(write) * torch.tanh(new)
                c = F.layer_norm(c, c.shape[1:], cell_weight, cell_bias, w.gate_eps)
                x = torch.sigmoid(read) * torch.tanh(c)
                hidden[i] = x, c
                continue
            layer = torch.nn.LSTM(w_ih.shape[1], w_hh.shape[1])
            with torch.no_grad():
                for parameter, value in zip(layer.parameters(), (w_ih, w_hh, b_ih, b_hh), strict=True):
                    parameter.copy_(value)
            x, hidden[i] = layer(x, hidden[i])
        g = w.linear[0] @ x[0] + w.linear[1]
        return g if w.norm is None else F.layer_norm(g, g.shape, w.norm[0], w.norm[1], w.norm[2])

    t, symbols, g = 0, 0, predicted()
    while len(steps) < most_steps and (t < length or len(steps) < least_steps):
        f = encoded[min(t, len(encoded) - 1)]
        logits = w.head[0] @ getattr(torch, w.activation)(f + g) + w.head[1]
        logits[rules.blank] -= rules.blank_penalty
        scores = logits[: len(w.embedding)].log_softmax(0)
        token = int(scores.argmax())
        blank = token in (rules.blank, rules.skipped)
        duration = rules.durations[int(logits[len(w.embedding) :].argmax())] if rules.durations else 0
        if blank:
            duration = max(duration, 1)
        symbols = 0 if blank or duration else symbols + 1
        if rules.most_symbols and symbols == rules.most_symbols:
            duration, symbols = 1, 0
        steps.append((token, duration, float(scores[token])))
        t += duration
        if not blank:
            context = [*context[1:], token]
            g = predicted()
    return steps


def checked(found, n, expected, rules):
    count = int(found.counts[n])
    assert found.tokens[n, :count].tolist() == [token for token, _, _ in expected]
    assert found.moves[n, :count].tolist() == [moved for _, moved, _ in expected]
    if rules.scored:
        assert found.scores[n, :count].tolist() == pytest.approx([s for *_, s in expected], abs=1e-4)
    else:
        assert found.scores is None


@pytest.mark.parametrize("seed", range(200))
def test_steps_are_those_of_a_loop(seed):
    seeded(seed)
    compare_with_a_loop()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_steps_of_ten_thousand_models_are_those_of_a_loop(seed):
    seeded(1000 + seed)
    for _ in range(500):
        compare_with_a_loop()


@pytest.mark.parametrize("seed", range(40))
def test_a_step_that_is_recorded_and_replayed(seed, monkeypatch):
    """Steps that are replayed without a look between them do nothing behind the end."""

    def recorded(step):
        for _ in range(2):
            step()
        return step

    monkeypatch.setattr(label_looping, "_pace", lambda *_: (recorded, 7))
    seeded(5000 + seed)
    compare_with_a_loop()


def test_scores_have_tangents():
    seeded(0)
    w, rules = drawn_weights(9), Rules(blank=0, most_symbols=2, scored=True)
    encoded, tangent = torch.randn(2, 3, 5, 6)

    def found(encoded):
        looping = LabelLooping(w)
        state = looping.start(3, [0] * w.context)
        return looping.search(encoded, torch.tensor([5, 4, 2]), rules, *state, 12)

    with forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(found(forward_ad.make_dual(encoded, tangent)).scores)
    close(y, found(encoded).scores)
    ahead, behind = found(encoded + 1e-3 * tangent), found(encoded - 1e-3 * tangent)
    # Scores jump where another token wins.
    same = [torch.equal(*tokens) for tokens in zip(ahead.tokens, behind.tokens, strict=True)]
    close(dy[same], (ahead.scores - behind.scores)[same] / 2e-3, 2e-2)


class Waits(TorchDispatchMode):
    """Refuses what the host would have to wait for: values, and shapes that follow from them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not {"_local_scalar_dense", "nonzero"} & set(function.name().replace("::", ".").split("."))
        if function.name().startswith("aten::index"):
            given = pytree.tree_leaves(args[1:])
            assert not [t for t in given if isinstance(t, torch.Tensor) and t.dtype is torch.bool]
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_a_recorded_step_waits_for_nothing(seed):
    seeded(seed)
    w, encoded, lengths, rules = drawn_problem()
    state, counters = LabelLooping(w).start(len(encoded), [rules.blank] * w.context)
    tokens = torch.zeros(len(encoded), 9, dtype=torch.int64)
    steps = label_looping.Steps(tokens, tokens.clone(), tokens.float(), tokens[:, 0].clone())
    call = w, encoded, lengths, rules, state, counters, steps
    _, step = label_looping._step(*call, False)
    with Waits():
        step()
    _, step = label_looping._step(*call, True)
    with Waits(), pytest.raises(AssertionError):
        step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(10))
@torch.no_grad()
def test_steps_on_a_gpu(seed):
    seeded(seed)
    w, encoded, lengths, rules = drawn_problem()
    found = []
    for device in ("cpu", "cuda"):
        moved = pytree.tree_map(lambda t, d=device: t.to(d) if isinstance(t, torch.Tensor) else t, vars(w))
        looping = LabelLooping(Weights(**moved))
        state, counters = looping.start(len(encoded), [rules.blank] * w.context)
        found.append(looping.search(encoded.to(device), lengths, rules, state, counters, 80))
    for name in ("tokens", "moves", "counts"):
        assert torch.equal(*(getattr(each, name).cpu() for each in found))


@torch.no_grad()
def compare_with_a_loop():
    w, encoded, lengths, rules = drawn_problem()
    first = [random.choice([-1, rules.blank]) for _ in range(w.context - 1)] + [rules.blank]
    most = random.choice([3, 40])
    expected = [
        by_hand(w, rows, int(length), rules, first, int(rules.together), most)
        for rows, length in zip(encoded, lengths, strict=True)
    ]
    if rules.together:
        least = max(map(len, expected))
        expected = [
            by_hand(w, rows, int(length), rules, first, least, most)
            for rows, length in zip(encoded, lengths, strict=True)
        ]
    results = []
    for backend in ("auto", "eager"):
        looping = LabelLooping(w)
        state, counters = looping.start(len(encoded), first)
        with fastasr.backend(backend):
            assert (looping.why_not == "") == (backend == "auto"), looping.why_not
            found = looping.search(encoded, lengths, rules, state, counters, most)
        assert found.counts.tolist() == [len(steps) for steps in expected]
        for n, steps in enumerate(expected):
            checked(found, n, steps, rules)
        # a row that waits for the predictor has no g yet, which is all that may differ
        results.append((counters, state[counters[:, label_looping.PENDING] == 0]))
    assert torch.equal(results[0][0], results[1][0])
    close(results[0][1], results[1][1], 1e-4, "state", least=1.0)


@pytest.mark.parametrize("seed", range(8))
def test_a_stream_in_chunks(seed):
    """A jump behind the end of a chunk is carried over in the counters."""
    seeded(seed)
    w, encoded, lengths, rules = drawn_problem()
    rules = dataclasses.replace(rules, together=False, scored=True, most_symbols=3)
    looping, first = LabelLooping(w), [rules.blank] * w.context
    state, counters = looping.start(len(encoded), first)
    whole = looping.search(encoded, lengths, rules, state, counters, 60)
    again, places = looping.start(len(encoded), first)
    pieces = [[] for _ in lengths]
    for begin in range(0, encoded.shape[1], 4):
        chunk = encoded[:, begin : begin + 4]
        there = (lengths - begin).clamp(0, chunk.shape[1])
        found = looping.search(chunk, there, rules, again, places, 60)
        places[:, label_looping.FRAME] -= there
        places[:, label_looping.END] = 0
        for n, count in enumerate(found.counts.tolist()):
            pieces[n] += zip(found.tokens[n, :count].tolist(), found.moves[n, :count].tolist(), strict=True)
    for n, count in enumerate(whole.counts.tolist()):
        expected = zip(whole.tokens[n, :count].tolist(), whole.moves[n, :count].tolist(), strict=True)
        assert pieces[n] == list(expected)


@pytest.mark.parametrize("format", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_storage_in_fewer_bits(seed, format):
    """A copy in fewer bits decodes as fp32 does with the rounded weights."""
    seeded(seed)
    w = drawn_weights(40, 3, layers=2, embedding=24, hidden=33, joint=50)

    def rounded(t):
        if format != "int8":
            return t.to({"bf16": torch.bfloat16, "fp16": torch.float16}[format]).float()
        scale = t.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        return (t / scale).round() * scale

    def both(w_ih, w_hh, *biases):  # an LSTM layer's matrices are one
        joined = rounded(torch.cat((w_ih, w_hh), 1))
        return *joined.split((w_ih.shape[1], w_hh.shape[1]), 1), *biases

    as_kept = dataclasses.replace(
        w,
        layers=tuple(both(*layer) for layer in w.layers),
        linear=(rounded(w.linear[0]), w.linear[1]),
        head=(rounded(w.head[0]), w.head[1]),
    )
    rules = Rules(blank=0, durations=(0, 1, 2), most_symbols=5, scored=True)
    encoded, lengths = torch.randn(5, 30, 50), torch.tensor([30, 0, 7, 30, 22])
    found = []
    for weights, kind in ((w, format), (as_kept, "fp32")):
        looping = LabelLooping(weights, kind)
        found.append(looping.search(encoded, lengths, rules, *looping.start(5, [0]), 100))
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.equal(found[0].moves, found[1].moves)
    close(found[0].scores, found[1].scores, 1e-4)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_ties_and_nan(backend):
    """The first of several largest wins; a NaN counts as the largest, as for torch.argmax."""
    w = drawn_weights(70, 3)
    for weight, bias in (w.head, w.linear):
        weight.zero_()
        bias.zero_()
    with fastasr.backend(backend):
        rules = Rules(blank=69, durations=(2, 1, 0))
        encoded = torch.zeros(1, 4, 6)

        def first_step():
            looping = LabelLooping(w)
            found = looping.search(encoded, torch.tensor([4]), rules, *looping.start(1, [69]), 1)
            return found.tokens.item(), found.moves.item()

        assert first_step() == (0, 2)
        w.head[1][[7, 40, 71, 72]] = 3.0
        assert first_step() == (7, 1)
        w.head[1][[33, 50]] = float("nan")
        assert first_step() == (33, 1)
        w.head[1].fill_(-float("inf"))
        assert first_step() == (0, 2)


def test_threads_and_companions_change_no_bit():
    seeded(1)
    w = drawn_weights(700, 4, layers=2, embedding=90, hidden=130, joint=150)
    looping, rules = LabelLooping(w), Rules(blank=0, durations=(0, 1, 2, 3), most_symbols=4, scored=True)
    encoded = torch.randn(40, 9, 150, generator=numbers(2))
    lengths = torch.randint(0, 10, (40,), generator=numbers(3))
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(looping.search(encoded, lengths, rules, *looping.start(40, [0]), 40))
    for n in (0, 17, 39):
        one = looping.search(encoded[n : n + 1], lengths[n : n + 1], rules, *looping.start(1, [0]), 40)
        count = int(one.counts)
        for batch in found:
            assert int(batch.counts[n]) == count
            assert torch.equal(batch.tokens[n, :count], one.tokens[0])
            assert torch.equal(batch.scores[n, :count], one.scores[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoded": torch.zeros(2, 4, 5)}, r"encoded: expected \(batch, frames, 6\), got \(2, 4, 5\)"),
        (
            {"encoded": torch.zeros(2, 4, 6).double()},
            "encoded: expected torch.float32 on cpu, got torch.float64",
        ),
        ({"lengths": torch.tensor([4, 5])}, r"lengths: expected 0 to 4 frames, got \[4, 5\]"),
        ({"lengths": torch.tensor([4, -1])}, "lengths: expected 0 to 4 frames"),
        ({"lengths": torch.tensor([4])}, "lengths: expected 2 ints"),
        ({"lengths": torch.tensor([4.0, 2.0])}, "lengths: expected 2 ints, got torch.float32"),
        ({"rules": Rules(blank=9)}, "blank: expected a token below 9, got 9"),
        (
            {"rules": Rules(blank=0, durations=(0, 1))},
            r"durations: expected 3 ints of at least 0, got \(0, 1\)",
        ),
        ({"rules": Rules(blank=0, durations=(0, 1, -1))}, "durations: expected 3 ints of at least 0"),
        ({"rules": Rules(0, (0, 1, 2), most_symbols=-1)}, "must be at least 0, got -1"),
        ({"state": torch.zeros(2, 3)}, r"state: expected contiguous torch.float32 \(2, 20\)"),
        ({"counters": torch.zeros(2, 5)}, "counters: expected contiguous torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    looping = LabelLooping(drawn_weights(9, 3))
    state, counters = looping.start(2, [0])
    call = {"encoded": torch.zeros(2, 4, 6), "lengths": torch.tensor([4, 2]), "rules": Rules(0, (0, 1, 2))}
    call |= {"state": state, "counters": counters, "most_steps": 9}
    looping.search(**call)
    with pytest.raises(ValueError, match=message):
        looping.search(**call | change)


def test_weights_that_do_not_fit_are_refused():
    w = drawn_weights(9, 3)
    for change, message in (
        ({"head": (torch.zeros(12, 7), w.head[1])}, r"expected shape \(12, 6\), got \(12, 7\)"),
        ({"activation": "gelu"}, "activation: expected relu or tanh, got 'gelu'"),
        ({"context": 2}, "do not fit"),
        ({"gate_norms": ((torch.zeros(28),) * 4,)}, r"expected shape \(7,\), got \(28,\)"),
        ({"layers": (), "linear": (torch.zeros(6, 5), w.linear[1]), "context": 2}, "needs a convolution"),
    ):
        with pytest.raises(ValueError, match=message):
            LabelLooping(dataclasses.replace(w, **change))
    with pytest.raises(ValueError, match="format: expected one of fp32, bf16, fp16, int8, got 'fp8'"):
        LabelLooping(w, "fp8")
    huge = dataclasses.replace(w, head=(w.head[0] * 1e6, w.head[1]))
    with pytest.raises(ValueError, match=r"the head holds .*, and the numbers of fp16 end at 65504"):
        LabelLooping(huge, "fp16")
    with pytest.raises(ValueError, match="first: expected 1 tokens"):
        LabelLooping(w).start(1, [0, 0])
    double = dataclasses.replace(
        w, head=tuple(t.double() for t in w.head), linear=tuple(t.double() for t in w.linear)
    )
    assert LabelLooping(double).why_not == "not all parameters are float32"
