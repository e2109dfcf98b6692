# SPDX-License-Identifier: Apache-2.0
"""A recorded FastConformer is the unrecorded one: values, gradients, statistics, random numbers; nothing is read but
the buffers."""

import random

import pytest
import torch
from recorded import graphed, reasons
from recorded_encoder import encoder

from fastasr.models.fast_conformer import attention, positions


def batch(frames, lengths, seed=1):
    x = torch.randn(len(lengths), frames, 80, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
    return x, mask


def step(model, x, mask, seed):
    torch.manual_seed(seed)
    random.seed(seed)
    for p in model.parameters():
        p.grad = None
    y, seen = model(x, mask)
    if torch.is_grad_enabled():
        (y * torch.arange(y.numel()).sin().view_as(y)).sum().backward()
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in model.named_buffers()}
    return y.detach().clone(), seen, found, state


def poison(graphs):
    """Makes everything useless that a replay must not read: the buffers, and what Python keeps for other calls."""
    for graph in graphs.graphs.values():
        for t in graph.tensors:
            t.detach().fill_(float("nan") if t.is_floating_point() else True)
    kept = [positions._TABLES.pop(m, (None,))[0] for m in graphs._module().modules() if graphs.graphs]
    kept += [
        k[3] for m in graphs._module().modules() if graphs.graphs and (k := attention._PROJECTED.pop(m, None))
    ]
    for t in kept:
        if t is not None:
            t.fill_(float("nan"))


def same(a, b, exact=True):
    torch.testing.assert_close(a, b, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6, equal_nan=False)


CALLS = [(40, [40, 24]), (64, [64, 64]), (40, [33, 40]), (40, [40, 8]), (64, [10, 60]), (40, [40, 40])]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("cast", [False, True])
def test_replays_equal_calls(train, cast):
    ours, theirs = encoder().train(train), encoder().train(train)
    graphs = graphed(ours, after=1)
    with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=cast):
        for seed, (frames, lengths) in enumerate(CALLS):
            x, mask = batch(frames, lengths, seed)
            expected = step(theirs, x, mask, seed)
            found = step(ours, x, mask, seed)
            # where no row is empty, the recorded call adds a mean of nothing
            empty = any(n < frames for n in lengths)
            for a, b in zip(found, expected, strict=True):
                same(a, b, exact=empty)
            poison(graphs)
    assert len(graphs.graphs) == 2
    assert not reasons(graphs)


def test_two_forwards_before_a_backward():
    ours, theirs = encoder().train(), encoder().train()
    graphed(ours, after=0)
    for model in (ours, theirs):
        torch.manual_seed(0)
        losses = [model(*batch(40, [40, 20], seed))[0].square().mean() for seed in range(3)]
        sum(losses).backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        same(p.grad, q.grad, exact=False)


def test_hooks_of_parameters_see_gradients_alone():
    model, called = encoder().train(), {}
    model.layers[0].unused = torch.nn.Parameter(torch.ones(2))
    graphs = graphed(model, after=0)
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: called.update({name: g.shape}))
    x, mask = batch(40, [40, 24])
    _, _, found, _ = step(model, x, mask, 0)
    assert not reasons(graphs)
    assert called == {name: g.shape for name, g in found.items() if g is not None}
    assert "layers.0.unused" not in called


def test_a_parameter_that_changes_before_the_backward_pass_is_an_error():
    model = encoder().train()
    graphs = graphed(model, after=0)
    x, mask = batch(40, [40, 24])
    step(model, x, mask, 0)
    y, _ = model(x, mask)
    with torch.no_grad():
        model.layers[0].norm_out.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="a parameter has changed"):
        y.sum().backward()
    assert not reasons(graphs)
