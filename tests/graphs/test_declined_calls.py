# SPDX-License-Identifier: Apache-2.0
"""Calls that no replay can serve run as they are, and what surrounds a call does not change a recording."""

import copy
import gc

import pytest
import torch
from recorded import graphed, reasons
from steps import numbers, seeded
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from fastasr import _left
from fastasr.models.zipformer.balancer import Balancer


class Twice(torch.nn.Module):
    """Uses its weights twice, with dropout in between."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, other=None):
        return self.linear(self.dropped(x))

    def dropped(self, x):
        return torch.nn.functional.dropout(self.linear(x).tanh(), 0.5, self.training)


def features(*more, seed=1):
    return torch.randn(*more, 5, 4, generator=numbers(seed))


def pair(model=Twice, train=False):
    """Returns a module with a recorded kind of call, its graphs, and the same module without."""
    seeded(0)
    ours = model().train(train)
    theirs = copy.deepcopy(ours)
    return ours, graphed(ours, after=0), theirs


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_casts_that_autocast_keeps_are_not_recorded():
    ours, graphs, theirs = pair()
    with torch.autocast("cpu", torch.bfloat16):
        Twice.forward(ours, features())  # Until the block ends, autocast keeps the cast of the weight.
        ours(features())
    for model in (ours, theirs):
        with torch.no_grad():
            model.linear.weight.mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            model.found = model(features())
    same(ours.found, theirs.found)
    assert [kind.replayed for kind in graphs.kinds.values()] == [2]


HOOKS = (
    modules.register_module_forward_hook,
    modules.register_module_forward_pre_hook,
    modules.register_module_full_backward_hook,
    modules.register_module_full_backward_pre_hook,
)


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_of_all_modules_run(register):
    ours, graphs, theirs = pair()
    counts = {}
    for model in (ours, theirs):
        model(features()).sum().backward()
        called = []
        handle = register(lambda module, *_, called=called: called.append(type(module)))
        try:
            model(features()).sum().backward()
        finally:
            handle.remove()
        model(features()).sum().backward()
        counts[model] = called
    assert counts[ours] == counts[theirs] != []
    assert [kind.replayed for kind in graphs.kinds.values()] == [2]


def dual(model, x):
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos())))
        return y.primal.clone(), y.tangent.clone()


AROUND = {
    "vmap": lambda model, x: torch.func.vmap(model)(torch.stack([x, -x])),
    "vmap of nothing": lambda model, x: torch.func.vmap(lambda w: model(x) * w)(torch.arange(3.0)),
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).square().sum())(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x.cos(),)),
    "dual numbers": dual,
    "compile": lambda model, x: torch.compile(model, backend="eager")(x),
}


def test_compiled_models_do_not_look_at_other_recorded_ones():
    """A guard on what is recorded fails when other models come and go; one that went while it was made raised."""
    kept = [pair()]
    ours, _, _ = pair()
    counter = CompileCounter()
    compiled = torch.compile(ours, backend=counter)
    compiled(features())
    before = counter.frame_count
    kept.clear()
    gc.collect()
    compiled(features())
    kept.append(pair())
    compiled(features())
    assert counter.frame_count == before > 0


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_a_call(around, train):
    ours, graphs, theirs = pair()
    with torch.set_grad_enabled(train):
        ours(features())
        for x in (features(), features(seed=2)):
            same(AROUND[around](ours, x), AROUND[around](theirs, x))
        same(ours(features()), theirs(features()))
    assert not reasons(graphs)
    (kind,) = graphs.kinds.values()
    assert (kind.seen, kind.replayed) == (2, 2)


def test_arguments_on_several_devices():
    ours, graphs, theirs = pair()
    other = torch.ones(2, device="meta")
    for _ in range(2):
        same(ours(features(), other), theirs(features(), other))
    assert _left.of(ours)["forward"].reason == "not replayed: arguments are on several devices"
    assert not graphs.kinds


class Checkpointed(Twice):
    reentrant = False

    def forward(self, x):
        return self.linear(checkpoint(self.dropped, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model", [Twice, Checkpointed])
def test_checkpoints(model, reentrant):
    """Around a call and inside, where what is computed again would draw other random numbers."""
    ours, graphs, theirs = pair(model, train=True)
    for step in range(3):
        found = []
        for one in (ours, theirs):
            one.reentrant = reentrant
            one.zero_grad()
            torch.manual_seed(step)
            x = features(seed=step).requires_grad_()
            y = one(x) if model is Checkpointed else checkpoint(one, x, use_reentrant=reentrant)
            y.square().sum().backward()
            found.append((y, x.grad, *(p.grad for p in one.parameters()), torch.rand(())))
        same(*found)
    inside = model is Checkpointed
    assert bool(reasons(graphs)) == inside


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.balancer = Balancer(4, -1, min_abs=2.0, prob=1.0)

    def forward(self, x):
        return x.sin() + self.balancer(x.cos())


def test_a_gradient_that_others_have_is_not_changed_in_place():
    ours, graphs, theirs = pair(Residual, train=True)
    found = []
    for model in (ours, theirs):
        x = features().requires_grad_()
        model(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)
    assert [kind.replayed for kind in graphs.kinds.values()] == [1]


def test_parameters_without_memory_of_their_own():
    ours, graphs, theirs = pair()
    for model in (ours, theirs):
        weight = model.linear.weight.detach()
        model.linear.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()))
    for _ in range(2):
        same(ours(features()).a, theirs(features()).a)
    assert reasons(graphs) == [
        "it has a parameter or buffer that is a TwoTensor, which has no memory of its own"
    ]


def scripted(layer):
    return torch.jit.script(layer)


def compiled(layer):
    return torch.compile(layer, backend="eager")


@pytest.mark.parametrize("made", [scripted, compiled])
def test_a_part_without_tables_of_its_own(made):
    """Modules of TorchScript and torch.compile keep their parameters or their mode elsewhere."""
    seeded(0)
    theirs = Twice().eval()
    ours = copy.deepcopy(theirs)
    ours.linear = made(ours.linear)
    graphed(ours, after=0)
    with torch.no_grad():
        for _ in range(2):
            same(ours(features()), theirs(features()))
