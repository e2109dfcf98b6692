# SPDX-License-Identifier: Apache-2.0
"""Gradients of replayed calls, of whole encoders and of their parts, are those of unrecorded calls."""

import gc

import pytest
import torch
from recorded_encoder import batch, encoder, kinds, recorded, same_gradients, step

import fastasr
from fastasr.graphs import module as graphs


def test_gradients_of_steps_in_a_row_are_kept_if_wished():
    model = encoder().train()
    recorded(model, clone_gradients=True)
    step(model, *batch(seed=1))
    first = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in first]
    model.zero_grad()
    step(model, *batch(seed=2))
    torch.testing.assert_close(first, copies, rtol=0, atol=0)


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
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=0, atol=0)


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
