# SPDX-License-Identifier: Apache-2.0
"""``accelerate(graphs=True)``: what is bound, reported, replayed, left alone and undone, on tapes."""

import gc
import logging
import re
import weakref

import pytest
import torch
from recorded import graphed, reasons
from recorded_encoder import batch, encoder, kinds, recorded, same_gradients, step

import fastasr
from fastasr._recording import recording
from fastasr.graphs import module as graphs


# --------------------------------------------------------------------------- binding, report, undoing
def test_report_and_state():
    model = encoder().eval()
    report = recorded(model)
    assert report.graphs == {"": None}
    assert "recorded: 1 of 1 known encoders" in report.summary
    assert report.to_dict()["graphs"] == {"": None}
    with torch.no_grad():
        for _ in range(3):
            model(*batch())
    (kind,) = kinds(model)
    assert (kind.seen, kind.replayed, kind.recorded, kind.reason) == (3, 3, 1, None)
    assert kind.bytes > 0
    assert "inference (2, 40, 80)" in kind.call


def test_restore_frees_the_graphs():
    model = encoder().eval()
    recorded(model)
    with torch.no_grad():
        model(*batch())
        graph = weakref.ref(next(iter(graphs.of(model).graphs.values())))
        assert fastasr.restore(model) == 3
    gc.collect()
    assert graph() is None
    assert fastasr.graph_state(model) == {}
    assert not [path for path, m in model.named_modules() if "forward" in vars(m)]


def test_eager_mode_runs_no_graph():
    model = encoder().eval()
    recorded(model)
    with torch.no_grad():
        with fastasr.eager_mode(model):
            model(*batch())
        assert kinds(model) == []
        model(*batch())
    assert kinds(model)[0].replayed == 1


def test_a_second_call_changes_nothing_but_the_options():
    model = encoder().eval()
    recorded(model)
    report = recorded(model, after=5)
    assert report.graphs == {"": None}
    with torch.no_grad():
        model(*batch())
    assert kinds(model)[0].recorded == 0


def test_encoders_without_padding_are_declined():
    model = encoder()
    model.ragged = True
    assert "without padding" in recorded(model).graphs[""]


def test_refresh_records_again():
    model = encoder().eval()
    recorded(model)
    with torch.no_grad():
        model(*batch())
        model.layers[0].norm_out.eps = 1.0
        fastasr.refresh(model)
        y, _ = model(*batch())
        torch.testing.assert_close(y, type(model).forward(model, *batch())[0], rtol=0, atol=0)
    assert kinds(model)[0].seen == 1


def test_verify_neither_replays_nor_records():
    model = encoder().eval()
    recorded(model)
    fastasr.verify(model, batch())
    assert kinds(model) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"after": -1}, "after"),
        ({"most": 0}, "most"),
        ({"most": (1, 2, 3)}, "most"),
        ({"memory": "eight"}, "memory"),
        ({"memory": "8XB"}, "memory"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        fastasr.Graphs(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_nothing_is_bound_without_a_device():
    model = encoder().eval()
    report = fastasr.accelerate(model, graphs=True)
    assert report.graphs == {"": "there is no CUDA device"}
    assert "forward" not in vars(model)
    assert fastasr.graph_state(model) == {}


def test_graphs_takes_options_alone():
    with pytest.raises(TypeError, match="graphs"):
        fastasr.accelerate(encoder(), graphs=3)


def test_memory_in_words():
    assert fastasr.Graphs(memory="1.5GB").memory == 1_500_000_000
    assert fastasr.Graphs(memory=7, most=3).most == (3, 3)


# --------------------------------------------------------------------------- what changes under a recording
def lora(layer):
    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = layer

        def forward(self, x):
            return self.base(x) * 2

    return Adapted()


CHANGES = {
    "child": lambda m: setattr(m.layers[1].feed_forward1, "linear1", lora(m.layers[1].feed_forward1.linear1)),
    "parameter": lambda m: setattr(
        m.layers[0].feed_forward2.linear1,
        "weight",
        torch.nn.Parameter(m.layers[0].feed_forward2.linear1.weight.detach() * 3),
    ),
    "values": lambda m: m.layers[0].feed_forward2.linear1.weight.detach().mul_(3),
    "moved": lambda m: setattr(
        m.layers[0].feed_forward2.linear1.weight, "data", m.layers[0].feed_forward2.linear1.weight.data * 3
    ),
    "forward": lambda m: setattr(m.layers[0].norm_out, "forward", lambda x: x * 2),
    "hook": lambda m: m.layers[0].register_forward_hook(lambda module, _, y: y * 2),
    "backward hook": lambda m: m.layers[0].register_full_backward_hook(lambda module, g, _: (g[0] * 2,)),
    "frozen": lambda m: m.layers[0].norm_out.requires_grad_(False),
    "fewer layers": lambda m: m.layers.__delitem__(0),
    "mode of a part": lambda m: m.layers[0].train(not m.layers[0].training),
    "buffer": lambda m: m.layers[0].register_buffer("more", torch.ones(1)),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change, train):
    ours, theirs = encoder().train(train), encoder().train(train)
    recorded(ours)
    with torch.set_grad_enabled(train):
        for model in (ours, theirs):
            if train:
                step(model, *batch())
                model.zero_grad()
            else:
                model(*batch())
            CHANGES[change](model)
            torch.manual_seed(1)
            run = step if train else (lambda m, *a: m(*a)[0])
            model.found = run(model, *batch(seed=1))
    torch.testing.assert_close(ours.found, theirs.found, rtol=0, atol=0)
    same_gradients(ours, theirs)


def test_hooks_run_as_often_as_without_graphs():
    model, calls = encoder().eval(), []
    recorded(model)
    with torch.no_grad():
        model(*batch())
        handle = model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        model(*batch())
        handle.remove()
        model(*batch())
    assert calls == [1]


def test_arguments_by_name_are_a_kind_of_their_own():
    model = encoder().eval()
    recorded(model)
    x, mask = batch()
    with torch.no_grad():
        first = model(x, mask)[0]
        torch.testing.assert_close(model(x, attention_mask=mask)[0], first, rtol=0, atol=0)
        torch.testing.assert_close(model(x)[0], type(model).forward(model, x)[0], rtol=1e-5, atol=1e-6)
    assert len(kinds(model)) == 3


def test_what_is_no_tensor_or_constant_runs_as_it_is():
    model = encoder().eval()
    recorded(model)
    x, _ = batch()
    with torch.no_grad():
        model(x, attention_mask=None)
        with pytest.raises(AttributeError):
            model(x, object())
    assert len(kinds(model)) == 1


class Caching(torch.nn.Module):
    """Keeps a tensor of its last call, as tables of positions are kept, or counts its calls."""

    def __init__(self, layer, what):
        super().__init__()
        self.layer, self.what, self.kept, self.calls = layer, what, {}, 0

    def forward(self, x):
        y = self.layer(x)
        if self.what == "attribute":
            self.last = y.detach()
        elif self.what == "dict":
            self.kept[len(self.kept)] = y.detach()
        elif self.what == "buffer":
            self.register_buffer("table", y.detach(), persistent=False)
        else:
            self.calls += 1
        return y


@pytest.mark.parametrize("what", ["attribute", "dict", "buffer", "count"])
def test_code_that_changes_its_module_is_declined(what):
    model = encoder().eval()
    part = model.layers[0].feed_forward1
    part.linear1 = Caching(part.linear1, what)
    recorded(model)
    with torch.no_grad():
        for seed in range(2):
            y, _ = model(*batch(seed=seed))
            torch.testing.assert_close(y, type(model).forward(model, *batch(seed=seed))[0], rtol=0, atol=0)
    reason = kinds(model)[0].reason
    if what == "count":
        assert reason == "a call changes attributes of modules: Caching.calls"
        assert part.linear1.calls == 4
    else:
        assert re.fullmatch(r"a call keeps a tensor \(2, 5, 64\), in a (dict|Caching)", reason)


KEPT, OUTSIDE = {}, torch.ones(2)


def closure():
    kept = []
    return lambda y: kept.append(y)


def cycle(y):
    kept = [y]
    kept.append(kept)


class Keeping(torch.nn.Module):
    """Gives its output to a function as well."""

    def __init__(self, layer, keep):
        super().__init__()
        self.layer, self.keep = layer, (keep,)

    def forward(self, x):
        y = self.layer(x)
        self.keep[0](y)
        return y


KEEPS = {
    "closure": (closure, "closure.<locals>.<lambda>"),
    "global": (lambda: lambda y: KEPT.update(last=y), f"{__name__}.KEPT"),
    "nested": (lambda: lambda y: KEPT.update(last=[y.detach()]), f"{__name__}.KEPT"),
    "from outside": (lambda: lambda y: KEPT.update(last=OUTSIDE), None),
    "once": (lambda: lambda y: KEPT or KEPT.update(table=y.detach()), None),
    "cycle": (lambda: cycle, None),
    "nothing": (lambda: lambda y: None, None),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_code_that_keeps_tensors_is_declined(keep, train):
    model = encoder().train(train)
    part, (keep, where) = model.layers[0].feed_forward1, KEEPS[keep]
    part.linear1 = Keeping(part.linear1, keep())
    recorded(model)
    gc.disable()  # A cycle stays until somebody looks for it.
    with torch.set_grad_enabled(train):
        model(*batch())
    gc.enable()
    KEPT.clear()
    (kind,) = kinds(model)
    assert kind.reason == (where and f"a call keeps a tensor (2, 5, 64), in {where}")
    assert kind.replayed == (where is None)


def test_a_refused_kind_is_tried_again():
    """The cause may be gone."""
    model = encoder().eval()
    part, kept = model.layers[0].feed_forward1, []
    part.linear1 = Keeping(part.linear1, lambda y: kept.append(y) if len(kept) < 3 else None)
    recorded(model)
    with torch.no_grad():
        for _ in range(9):
            model(*batch())
    (kind,) = kinds(model)
    assert (kind.seen, kind.replayed, kind.reason) == (9, 2, None)


class Counting(torch.nn.Module):
    """Adds as many numbers of the host as it is told."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        return x if recording() is None else x + recording().numbers(self.drawn, self.count).values.sum()

    def drawn(self):
        return [1.0] * self.count


def test_any_number_of_numbers():
    model, x = Counting(1 << 17), torch.zeros(())
    recorded = graphed(model, after=0)
    assert model(x) == model.count
    assert not reasons(recorded)


class Waiting(torch.nn.Module):
    """Looks at a value of its input."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) * x.sum().item()


@pytest.mark.parametrize(
    ("model", "lengths", "noticed"), [("Linear", 600, 1), ("Linear", 1, 0), ("Waiting", 1, 0)]
)
def test_few_replays_are_noticed(model, lengths, noticed, caplog):
    """They are none where a whole is replayed part by part."""
    part = torch.nn.Linear(1, 1)
    model = {"Linear": part, "Waiting": Waiting(part)}[model]
    for module in model.modules():
        graphed(module).has_whole = module is not model
    caplog.set_level(logging.WARNING, "fastasr")
    with torch.no_grad():
        for i in range(1100):
            model(torch.zeros(1 + i % lengths, 1))
    words = (
        "Linear: only 0 of 1000 calls were replayed, of 0 of 600 kinds of calls. Use buckets of few shapes"
    )
    found = [text for record in caplog.records if "not recorded" not in (text := record.getMessage())]
    assert [text.startswith(words) for text in found] == [True] * noticed
    assert lengths > 1 or all(kind.replayed >= 1090 for kind in kinds(part))
