# SPDX-License-Identifier: Apache-2.0
"""``accelerate(graphs=True)``: what is bound, reported, replayed, left alone and undone, on tapes."""

import copy
import gc
import logging
import random
import re
import threading
import time
import weakref

import pytest
import torch
from recorded import graphed, reasons

import fastasr
from fastasr._recording import recording
from fastasr.asr.recipe import batches
from fastasr.benchmarks.models import ragged
from fastasr.graphs import module as graphs
from fastasr.models.fast_conformer import FastConformerEncoder
from fastasr.testing.tape import TapeRecorder


def recorded(model, **options):
    """Swaps a model with its calls recorded on tapes."""
    return fastasr.accelerate(
        model, graphs=fastasr.Graphs(**{"after": 0, "recorder": TapeRecorder, **options})
    )


def encoder(layers=2, **rates):
    torch.manual_seed(0)
    rates = {"layer_drop": 0.0, **rates}
    return FastConformerEncoder(mel_bins=80, width=32, layers=layers, heads=2, hidden=64, channels=8, **rates)


def batch(frames=40, seed=0):
    x = torch.randn(2, frames, 80, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(frames) < torch.tensor([frames, frames // 2])[:, None]


def step(model, *inputs, seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    y = model(*inputs)[0]
    (y * torch.arange(y.numel()).sin().view_as(y)).sum().backward()
    return y


def kinds(model, path=""):
    return fastasr.graph_state(model)[path]


def same_gradients(ours, theirs, exact=True):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            scale = q.grad.abs().max().item()
            options = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5 * scale}
            torch.testing.assert_close(p.grad, q.grad, **options)


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


# --------------------------------------------------------------------------- gradients
def test_gradients_of_steps_in_a_row_are_kept_if_wished():
    model = encoder().train()
    recorded(model, clone_gradients=True)
    step(model, *batch(seed=1))
    first = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in first]
    model.zero_grad()
    step(model, *batch(seed=2))
    for g, c in zip(first, copies, strict=True):
        torch.testing.assert_close(g, c, rtol=0, atol=0)


def test_gradients_that_are_not_set_to_none():
    ours, theirs = encoder().train(), encoder().train()
    recorded(ours)
    for model in (ours, theirs):
        for seed in range(3):
            model.zero_grad(set_to_none=False)
            step(model, *batch(seed=seed), seed=seed)
    same_gradients(ours, theirs)


def test_accumulation_over_two_kinds():
    ours, theirs = encoder().train(), encoder().train()
    recorded(ours)
    for seed in range(4):
        for model in (ours, theirs):
            step(model, *batch(40 + 24 * (seed % 2), seed), seed=seed)
    same_gradients(ours, theirs)
    assert len(graphs.of(ours).graphs) == 2


def test_a_loss_that_is_dropped():
    """The next call is replayed again once the forward pass that had no backward pass is gone."""
    model = encoder().train()
    recorded(model)
    y = model(*batch())[0]
    model(*batch())
    assert kinds(model)[0].replayed == 1
    del y
    gc.collect()
    model(*batch())
    assert kinds(model)[0].replayed == 2


def test_a_second_backward_pass_is_refused():
    """It would read memory that the first one has used again."""
    model = encoder().train()
    recorded(model)
    loss = model(*batch())[0].square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has one backward pass"):
        loss.backward()
    with fastasr.eager_mode(model):
        loss = model(*batch())[0].square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def test_second_derivatives_are_refused():
    model = encoder().train()
    recorded(model)
    x, mask = batch()
    y = model(x.requires_grad_(), mask)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_parameters_that_are_swapped_on_conversion():
    """No recording holds what torch.utils.swap_tensors would refuse, and all are made anew."""
    ours, theirs = encoder().train(), encoder().train()
    recorded(ours)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in (ours, theirs):
            step(model, *batch())
            model.load_state_dict({key: 2 * t for key, t in model.state_dict().items()})
            model.double().zero_grad()
            x, mask = batch()
            model.found = step(model, x.double(), mask)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.testing.assert_close(ours.found, theirs.found, rtol=0, atol=0)
    same_gradients(ours, theirs)
    assert [kind.replayed for kind in kinds(ours)] == [1, 1]


def _vmapped(y, x, weights):
    return torch.func.vmap(lambda w: torch.autograd.grad(y, x, w))(weights)


def _batched(y, x, weights):
    return torch.autograd.grad(y, x, weights, is_grads_batched=True)


@pytest.mark.parametrize("several", [_vmapped, _batched])
def test_several_gradients_at_once_are_refused(several):
    model = encoder().train()
    recorded(model)
    x, mask = batch()
    y = model(x.requires_grad_(), mask)[0]
    with pytest.raises(
        RuntimeError, match=r"fastasr.graphs: a replayed call has one backward pass, .*eager_mode"
    ):
        several(y, x, torch.ones(3, *y.shape))


def test_loss_scaling():
    ours, theirs = encoder().train(), encoder().train()
    recorded(ours)
    for model in (ours, theirs):
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", 2.0**10)
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(*batch(seed=seed))[0].float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


# --------------------------------------------------------------------------- parts
def test_dropped_layers_are_recorded_one_by_one():
    ours, theirs = (encoder(4, layer_drop=0.5).train() for _ in range(2))
    recorded(ours)
    for seed in range(4):
        for model in (ours, theirs):
            model.zero_grad()
            step(model, *batch(seed=seed), seed=seed)
        same_gradients(ours, theirs)
    assert kinds(ours)[0].replayed == 0
    assert sum(kind.replayed for i in range(4) for kind in kinds(ours, f"layers.{i}")) >= 4


def test_parts_alone():
    ours, theirs = encoder(4).train(), encoder(4).train()
    recorded(ours, parts=True)
    for seed in range(3):
        for model in (ours, theirs):
            step(model, *batch(seed=seed), seed=seed)
    same_gradients(ours, theirs)
    assert "" not in fastasr.graph_state(ours)
    assert all(kinds(ours, f"layers.{i}")[0].replayed == 3 for i in range(4))


# --------------------------------------------------------------------------- memory, copies, threads
def test_the_graph_used_longest_ago_goes_first():
    model = encoder().eval()
    recorded(model, most=(1, 2))
    with torch.no_grad():
        for frames in (40, 48, 40, 56, 40, 48):  # 56 comes in place of 48, which was recorded after 40
            model(*batch(frames))
    assert len(graphs.of(model).graphs) == 2
    assert [kind.recorded for kind in kinds(model)] == [1, 2, 1]


def test_a_kind_that_was_dropped_twice_is_not_recorded_again():
    model = encoder().eval()
    recorded(model, most=(1, 1))
    with torch.no_grad():
        for frames in (40, 48, 40, 48, 40, 48):
            model(*batch(frames))
    first, second = kinds(model)
    assert "it was dropped for other kinds" in first.reason
    assert (first.recorded, first.dropped, first.replayed) == (2, 2, 2)
    assert (second.recorded, second.dropped, second.replayed, second.reason) == (2, 1, 3, None)
    assert "it was dropped for other kinds" in str(fastasr.why(model))


def test_memory_is_limited():
    model = encoder().eval()
    recorded(model, memory=1)
    with torch.no_grad():
        for frames in (40, 48, 40):
            model(*batch(frames))
    assert len(graphs.of(model).graphs) == 1


def test_kinds_share_gradients():
    """The bytes of eight kinds are those of their buffers and outputs: no kind holds gradients of its own."""
    model = encoder().train()
    recorded(model)
    for i in range(8):
        step(model, *batch(40 + 8 * i))
        model.zero_grad()
    found = graphs.of(model)
    assert len(found.graphs) == 8
    assert len({id(graph.gradients) for graph in found.graphs.values()}) == 1
    sizes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert sizes <= found.gradients.bytes <= 1.5 * sizes + 64 * 4 * len(list(model.parameters()))


def cast_steps(model, optimizer):
    """Yields outputs and gradients of steps of three kinds in turn under autocast, the first in inference mode."""
    for seed in range(9):
        x, mask = batch(40 + 8 * (seed % 3), seed)
        model.train(seed % 3 > 0)
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(not model.training):
            y = model(x, mask)[0]
        yield y
        if not model.training:
            continue
        y.float().square().mean().backward()
        yield from [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()


def test_kinds_share_casts():
    """All kinds cast a weight to the same place, anew in each call, and its bytes count once."""
    models = encoder(), encoder()
    recorded(models[0])
    ours, theirs = (cast_steps(model, torch.optim.SGD(model.parameters(), lr=0.1)) for model in models)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [kind.replayed for kind in kinds(models[0])] == [3, 3, 3]
    found = graphs.of(models[0])
    casts = [graph.casts for graph in found.graphs.values()]
    places = [{p: leaf.data_ptr() for p, leaf in zip(c.parameters, c.leaves, strict=True)} for c in casts]
    assert len(places) == 3
    assert len(places[0]) > 20
    assert places[0].items() <= places[1].items()  # in training those of a convolution too
    assert places[1] == places[2]
    size = kinds(models[0])[1].casts
    weights = sum(2 * p.numel() for p in places[1])
    assert weights <= size <= weights + 2 * 64 * len(places[1])
    assert found._held() == size + sum(kind.bytes for kind in kinds(models[0]))


def test_casts_count_for_the_limit_of_memory():
    model, again = encoder().eval(), encoder().eval()

    def run(model, **options):
        recorded(model, **options)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for frames in (40, 48):
                model(*batch(frames))
        return len(graphs.of(model).graphs)

    assert run(model) == 2
    needed = sum(kind.bytes for kind in kinds(model)) + kinds(model)[0].casts
    assert run(again, memory=needed) == 2
    assert run(again, memory=needed - 1) == 1


def test_kinds_with_other_casts_share_what_they_can():
    """A weight that one kind also reads as it is has no cast there, and a frozen one has a cast without gradient."""

    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x, penalty=False):
            y = self.last(self.first(x))
            return y + self.last.weight.square().sum() if penalty else y

    torch.manual_seed(0)
    ours = Reads()
    theirs = copy.deepcopy(ours)
    found = graphed(ours, after=0)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    for i in range(8):
        results = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.first.requires_grad_(i < 4)
            x = batch(8, i)[0][..., :8].clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                y = model(x, penalty=i % 2 == 0)
            y.float().square().mean().backward()
            results.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
            results[-1] = [t.clone() for t in results[-1]]
            optimizer.step()
            optimizer.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not reasons(found)
    assert [kind.replayed for kind in found.kinds.values()] == [2, 2, 2, 2]
    casts = [graph.casts for graph in found.graphs.values()]
    assert [len(c.leaves) for c in casts] == [3, 4, 3, 4]
    places = [{id(p): leaf.data_ptr() for p, leaf in zip(c.parameters, c.leaves, strict=True)} for c in casts]
    assert len({place for known in places for place in known.values()}) == 4
    assert [len(c.bytes) for c in casts] == [1, 2, 1, 2]


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_of_inputs_of_a_frozen_encoder(trained):
    """The parameters need no gradient, in the first training step or from a later one on."""
    ours, theirs = encoder().train(), encoder().train()
    recorded(ours)
    if trained:
        step(ours, *batch())
    for model in (ours, theirs):
        model.requires_grad_(False)
    for seed in (1, 2):
        x, mask = batch(seed=seed)
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        for model, leaf in zip((ours, theirs), leaves, strict=True):
            step(model, leaf, mask, seed=seed)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert sum(kind.replayed for kind in kinds(ours)) == 2 + trained


def test_copies_run_as_they_are():
    model = encoder().eval()
    recorded(model)
    with torch.no_grad():
        model(*batch())
        other = copy.deepcopy(model)
        for p in other.parameters():
            p.mul_(2)
        torch.testing.assert_close(
            other(*batch())[0], type(other).forward(other, *batch())[0], rtol=0, atol=0
        )
    assert kinds(model)[0].seen == 1
    assert fastasr.graph_state(other) == {}


class LateRecorder(TapeRecorder):
    """Its replays give other threads a turn behind the copies of their inputs."""

    def record(self, function, recording):
        replay, found = super().record(function, recording)

        def late():
            time.sleep(0.005)
            replay()

        return late, found


def test_threads_take_turns():
    model, theirs = encoder().eval(), encoder().eval()
    recorded(model, recorder=LateRecorder)
    found, expected = {}, {}

    def call(seed):
        with torch.no_grad():
            for _ in range(5):
                found[seed] = model(*batch(seed=seed))[0]

    call(0)  # calls of other threads run as they are while one is recorded
    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for seed in range(3):
            expected[seed] = theirs(*batch(seed=seed))[0]
            torch.testing.assert_close(found[seed], expected[seed], rtol=0, atol=0)
    (kind,) = fastasr.graph_state(model)[""]
    assert (kind.recorded, kind.replayed) == (1, 20)


def test_batches_of_buckets_are_recorded_once_for_each_shape():
    seconds = ragged.seconds(ragged.LIBRISPEECH, 600, ordered=False)
    frames = [round(5 * s) for s in seconds]  # a twentieth of the frames, for the time of this test
    epochs = [batches.epoch_batches(frames, 480, 1, epoch, shapes="buckets") for epoch in range(2)]
    model = encoder(layers=1).train()
    recorded(model, most=batches.BUCKETS + 1)
    for indices, longest in epochs[0]:
        x, lengths = batches.collate([torch.randn(frames[i], 80) for i in indices], longest)
        step(model, x, torch.arange(longest) < lengths[:, None])
    found = kinds(model)
    assert 20 <= len(found) <= batches.BUCKETS + 1
    assert all((kind.recorded, kind.replayed, kind.dropped) == (1, kind.seen, 0) for kind in found)
    shapes = [{(len(indices), longest) for indices, longest in epoch} for epoch in epochs]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == len(found)
    padded = sum(len(indices) * longest for indices, longest in epochs[0])
    assert 1 - sum(frames) / padded < 0.05
