# SPDX-License-Identifier: Apache-2.0
"""transformers' Conformers whose modules have the code of others: values, gradients and draws are upstream's in
float64, with masks and under checkpointing."""

import copy

import families
import pytest
import torch
from steps import moved, seeded

import fastasr

# Family -> the classes that a rule of the framework replaces
REPLACED = {
    "lasr": {"LasrEncoderFeedForward", "LasrEncoderConvolutionModule"},
    "granite speech 5": {"GraniteSpeech5EncoderFeedForward"},
    "seamless m4t": {
        "SeamlessM4TConformerFeedForward",
        "SeamlessM4TConformerSelfAttention",
        "SeamlessM4TConformerConvolutionModule",
    },
    "seamless m4t v2": {"SeamlessM4Tv2ConformerFeedForward"},
    "w2v-bert": {"Wav2Vec2BertFeedForward"},
}
TOLERANCE = 1e-10


def pair(name):
    """Returns upstream's model, the swapped one and a call of them, in float64."""
    model, call = families.make(name)
    theirs = moved(model, 0.1)
    ours = copy.deepcopy(theirs)
    report = fastasr.accelerate(ours)
    assert {row.class_name for row in report.replaced} - {"Linear"} == REPLACED[name]
    return theirs, ours, call


def outcome(model, call, training):
    model.train(training)
    model.zero_grad()
    seeded("call")
    with torch.set_grad_enabled(training), fastasr.upstream_draws():
        y = call(model)[0]
    if training:
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return y.detach(), gradients, torch.rand((), dtype=torch.float64)


def same(found, expected, largest):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * max(1.0, largest))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", REPLACED)
def test_a_step(name, training):
    theirs, ours, call = pair(name)
    theirs.double(), ours.double()
    (y, gradients, draw), (expected, gradients_there, draw_there) = (
        outcome(model, inputs_in(torch.float64, call), training) for model in (ours, theirs)
    )
    same(y, expected, expected.abs().max().item())
    assert draw == draw_there
    if training:
        largest = max(g.abs().max().item() for g in gradients_there.values() if g is not None)
        for key, g in gradients_there.items():
            assert (g is None) == (gradients[key] is None), key
            if g is not None:
                same(gradients[key], g, largest)


def inputs_in(dtype, call):
    """Returns the call with its floating inputs in this dtype."""

    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def inputs(_, args, kwargs):
        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}

    def casting(model):
        hook = model.register_forward_pre_hook(inputs, with_kwargs=True)
        try:
            return call(model)
        finally:
            hook.remove()

    return casting


@pytest.mark.parametrize("name", REPLACED)
def test_restored(name):
    theirs, ours, call = pair(name)
    fastasr.restore(ours)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        assert torch.equal(call(ours)[0], call(theirs)[0])


@pytest.mark.parametrize("name", ["lasr", "granite speech 5"])
def test_under_checkpointing(name):
    theirs, ours, call = pair(name)
    ours.gradient_checkpointing_enable()
    found, expected = (outcome(model, call, True) for model in (ours, theirs))
    largest = max(g.abs().max().item() for g in expected[1].values() if g is not None)
    for key, g in expected[1].items():
        if g is not None:
            torch.testing.assert_close(found[1][key], g, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["lasr", "seamless m4t"])
def test_in_short_dtypes(name, dtype):
    """The swapped model is as near to float64 as upstream."""
    theirs, ours, call = pair(name)
    exact = copy.deepcopy(theirs).double().eval()
    with torch.no_grad():
        truth = inputs_in(torch.float64, call)(exact)[0]
        found, expected = (
            inputs_in(dtype, call)(model.to(dtype).eval())[0].double() for model in (ours, theirs)
        )
    assert (found - truth).abs().mean() <= 1.5 * (expected - truth).abs().mean()
