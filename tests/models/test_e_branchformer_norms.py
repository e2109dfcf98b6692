# SPDX-License-Identifier: Apache-2.0
"""The E-Branchformer layer as a GPU computes it, with ``ops.add_norm``, and layers on a row with ``ops.add_two_norms``,
against norms and residuals by torch."""

from functools import partial

import pytest
import torch
from steps import close, moved, numbers, relative, seeded

import fastasr
from fastasr import ops
from fastasr.models.e_branchformer import EBranchformerEncoder, layer

BINS, FRAMES, WIDTH = 10, 17, 24
KINDS = "ours", "espnet"


def encoder(kind="ours", on_a_row=False, **options):
    cls = EBranchformerEncoder
    if kind == "espnet":
        cls = pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder").EBranchformerEncoder
    seeded(0)
    sizes = {"output_size": WIDTH, "attention_heads": 3, "cgmlp_linear_units": 36, "cgmlp_conv_kernel": 7}
    sizes |= {"num_blocks": 3, "linear_units": 40, "use_ffn": True, "macaron_ffn": True}
    rates = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0, "input_layer": "linear"}
    made = moved(cls(BINS, **{**sizes, **rates, **options}), 0.1)
    if on_a_row and kind == "ours":
        made.ragged = True
    fastasr.accelerate(made, ragged=on_a_row)
    return made.train()


def step(model, autocast=False, lengths=(FRAMES, FRAMES - 2)):
    """Returns the model's output at frames that exist, and its parameters' gradients."""
    x = torch.randn(len(lengths), FRAMES, BINS, generator=numbers(1)).to(model.after_norm.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x, torch.tensor(lengths))[0]
    y = torch.cat([one[:n] for one, n in zip(y, lengths, strict=True)])
    leaves = list(model.parameters())
    return y, torch.autograd.grad(y.float().sin().sum(), leaves, materialize_grads=True)


@pytest.fixture
def as_on_gpu(monkeypatch):
    return lambda: monkeypatch.setattr(layer, "on_gpu", lambda device: True)


@pytest.fixture
def calls(monkeypatch):
    """Returns the names of the ops that add and normalise, as they are called."""
    found = []

    def noted(name, op, *args):
        found.append(name)
        return op(*args)

    for name in ("add_norm", "add_two_norms"):
        monkeypatch.setattr(ops, name, partial(noted, name, getattr(ops, name)))
    return found


@pytest.mark.parametrize("on_a_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"macaron_ffn": False}, {"use_ffn": False, "macaron_ffn": False}])
def test_it_adds_and_normalises_the_same(kind, on_a_row, options, as_on_gpu, calls):
    ours = encoder(kind, on_a_row, dropout_rate=0.2, **options).double()
    seeded(1)
    expected = step(ours)
    assert not calls
    as_on_gpu()
    seeded(1)  # dropout draws the same numbers
    found = step(ours)
    close(found[0], expected[0], 1e-12)
    close(found[1], expected[1], 1e-9, least=1e-2)  # some, as that of the keys' bias, are 0 but for rounding
    blocks = sum(
        getattr(ours.encoders[0], name) is not None for name in ("feed_forward", "feed_forward_macaron")
    )
    joints = 2 if on_a_row else 0
    assert calls.count("add_two_norms") == joints
    assert calls.count("add_norm") == 3 * (1 + blocks) - joints


@pytest.mark.parametrize("on_a_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_the_stream_in_float32_and_gives_branches_16_bits(kind, on_a_row, as_on_gpu):
    exact, by_torch = (step(encoder(kind, on_a_row), autocast=autocast) for autocast in (False, True))
    ours, seen = encoder(kind, on_a_row), []
    first = ours.encoders[1].feed_forward.w_1
    first.forward = lambda x: (seen.append(x.dtype), type(first).forward(first, x))[1]
    as_on_gpu()
    y, grads = step(ours, autocast=True)
    assert seen == [torch.bfloat16]
    assert y.dtype == torch.float32
    assert relative(y, exact[0]) <= 1.1 * relative(by_torch[0], exact[0])
    found, theirs, right = (torch.cat([g.flatten() for g in of]) for of in (grads, by_torch[1], exact[1]))
    assert relative(found, right) <= 1.1 * relative(theirs, right)


WATCHED = {
    "attention": lambda layer: layer.attn,
    "the last feed-forward block": lambda layer: layer.feed_forward,
    "a norm": lambda layer: layer.norm_ff,
}


@pytest.mark.parametrize("part", WATCHED)
def test_parts_with_hooks_get_what_upstream_gives_them(part, as_on_gpu):
    ours, seen = encoder(), []
    for block in ours.encoders:
        WATCHED[part](block).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    by_torch = step(ours, autocast=True)
    as_on_gpu()
    assert torch.equal(step(ours, autocast=True)[0], by_torch[0])
    assert len(seen) == 6
    assert all(map(torch.equal, seen[:3], seen[3:]))


class Halved(torch.nn.Module):
    def forward(self, x):
        return 0.5 * x


def test_unknown_branches_get_what_upstream_gives_them(as_on_gpu, calls):
    ours = encoder()
    for block in ours.encoders:
        block.feed_forward = Halved()
    as_on_gpu()
    step(ours, autocast=True)
    assert not calls
    step(ours)
    assert calls == 9 * ["add_norm"]


CHANGES = {
    "a hook": lambda layer: layer.register_forward_hook(lambda *args: None),
    "a hook of the first norm": lambda layer: layer.norm_ff_macaron.register_forward_hook(lambda *args: None),
    "an unknown first branch": lambda layer: setattr(layer, "feed_forward_macaron", Halved()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_called(change, as_on_gpu, calls):
    ours = encoder(on_a_row=True)
    CHANGES[change](ours.encoders[2])
    as_on_gpu()
    with torch.autocast("cpu", torch.bfloat16):
        lengths = torch.tensor([12, 4])
        ours(fastasr.PackedFrames(torch.randn(16, BINS), lengths), lengths)
    assert calls.count("add_two_norms") == 1


def test_layers_that_are_left_out_have_no_followers(as_on_gpu, calls):
    as_on_gpu()
    ours = encoder(on_a_row=True, layer_drop_rate=0.5)
    expected = 0
    for _ in range(8):
        state = torch.get_rng_state()
        ran = sum(torch.rand([]).item() >= 0.5 for _ in range(3))
        torch.set_rng_state(state)
        step(ours)
        expected += max(0, ran - 1)
        assert calls.count("add_two_norms") == expected


def test_a_layer_without_scale_is_torchs(as_on_gpu, calls):
    ours = encoder()
    for block in ours.encoders:
        block.ff_scale = 0.0
    as_on_gpu()
    step(ours, autocast=True)
    assert not calls
