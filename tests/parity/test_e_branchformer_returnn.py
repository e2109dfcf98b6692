# SPDX-License-Identifier: Apache-2.0
"""E-Branchformer converted from RETURNN's: values, gradients, exact round trip, and the models that are refused."""

import ambient
import pytest
import torch
from steps import seeded

pytest.importorskip("returnn.frontend.encoder.e_branchformer")

import returnn.frontend as rf
from returnn.config import Config, global_config_ctx
from returnn.frontend.encoder.conformer import ConformerEncoder
from returnn.frontend.encoder.e_branchformer import EBranchformerLayer as UpstreamLayer
from returnn.frontend.encoder.e_branchformer import FeedForwardConvGated as UpstreamGated
from returnn.tensor import Dim, Tensor
from returnn.torch.frontend.bridge import rf_module_to_pt_module

import fastasr
from fastasr.models import e_branchformer as ours
from fastasr.models.e_branchformer import returnn as conversion

INPUT, WIDTH, FRAMES = 12, 16, 9
LENGTHS = (9, 6)


@pytest.fixture(autouse=True)
def _config():
    rf.select_backend_torch()
    config = Config({"behavior_version": 21, "rf_use_mask": False})
    with global_config_ctx(config), rf.set_default_float_dtype_ctx("float64"):
        yield


def fill(module):
    seeded(0)
    for parameter in module.parameters():
        parameter.raw_tensor.data = 0.2 * torch.randn(parameter.raw_tensor.shape, dtype=torch.float64) + 0.1
    return module


def layer(**options):
    sizes = {"ff_dim": 24, "num_heads": 2, "cgmlp_ff_dim": 20, "cgmlp_conv_kernel": 5, "dropout": 0.0}
    return fill(UpstreamLayer(Dim(WIDTH, name="model"), **{**sizes, "att_dropout": 0.0, **options}))


def encoder(inputs=INPUT, **options):
    sizes = {"ff_dim": 24, "num_heads": 2, "cgmlp_ff_dim": 20, "cgmlp_conv_kernel": 5}
    made = ConformerEncoder(
        Dim(inputs, name="features"),
        Dim(WIDTH, name="model"),
        num_layers=2,
        input_layer=None,
        dropout=0.0,
        att_dropout=0.0,
        input_dropout=0.0,
        encoder_layer=rf.build_dict(UpstreamLayer, **sizes),
        **options,
    )
    return fill(made)


def sequences(dim):
    """Returns (x, its RETURNN tensor, batch and time axes); gradients reach x."""
    seeded(1)
    x = torch.randn(len(LENGTHS), FRAMES, dim.dimension, dtype=torch.float64, requires_grad=True)
    batch = Dim(len(LENGTHS), name="batch")
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    time = Dim(Tensor("time", dims=[batch], dtype="int32", raw_tensor=lengths))
    tensor = Tensor("x", dims=[batch, time, dim], dtype="float64", raw_tensor=x, feature_dim=dim)
    return x, tensor, batch, time


def raw(module):
    return {name: parameter.raw_tensor for name, parameter in module.named_parameters()}


def masked():
    return torch.arange(FRAMES) < torch.tensor(LENGTHS)[:, None]


# fastasr's sinusoids are rounded to float32, as ESPnet's are.
TOLERANCE = 5e-6


@pytest.mark.parametrize("training", [False, True])
def test_an_encoder(training):
    theirs = encoder()
    model = ours.from_returnn(theirs).train(training)
    x, tensor, batch, time = sequences(theirs.in_dim)
    y, _ = theirs(tensor, in_spatial_dim=time)
    expected = y.copy_compatible_to_dims_raw([batch, time, theirs.out_dim])
    actual = model(x, masked())
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=TOLERANCE * float(expected.detach().abs().max())
    )
    weight = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    names, tensors = zip(*raw(theirs).items(), strict=True)
    expected = torch.autograd.grad((expected * weight).sum(), [x, *tensors])
    found = torch.autograd.grad((actual * weight).sum(), [x, *model.parameters()])
    largest = max(float(g.abs().max()) for g in expected)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=10 * TOLERANCE * largest)
    # gradients are linear in the parameters' layout, so the conversion serves them too
    by_name = dict(zip((n for n, _ in model.named_parameters()), found[1:], strict=True))
    for i in range(2):
        prefix = f"layers.{i}."
        mine = {n.removeprefix(prefix): g for n, g in by_name.items() if n.startswith(prefix)}
        mine = conversion.layer_state_to_returnn(mine)
        for name, gradient in zip(names, expected[1:], strict=True):
            if name.startswith(prefix):
                a = mine[name.removeprefix(prefix)]
                torch.testing.assert_close(a, gradient, rtol=0, atol=10 * TOLERANCE * largest)


@pytest.mark.parametrize(
    "options", [{}, {"gate_activation": rf.tanh, "activation": rf.relu, "with_bias": False}]
)
def test_a_layer(options):
    gated = rf.build_dict(UpstreamGated, **options)
    theirs = layer(cgmlp=gated, ff_activation=rf.relu, merge_conv_kernel=5)
    model = ours.from_returnn(theirs).eval()
    x, tensor, batch, time = sequences(theirs.out_dim)
    y = theirs(tensor, spatial_dim=time).copy_compatible_to_dims_raw([batch, time, theirs.out_dim])
    positions = conversion.relative_sinusoids(FRAMES, WIDTH).double()
    (actual, _), _ = model((x, positions), masked().unsqueeze(1))
    torch.testing.assert_close(actual, y, rtol=0, atol=TOLERANCE * float(y.detach().abs().max()))


def test_the_round_trip_is_exact():
    theirs = encoder()
    model = ours.from_returnn(theirs)
    back = ours.to_returnn(model)
    assert set(back) == set(raw(theirs))
    assert all(torch.equal(back[name], tensor) for name, tensor in raw(theirs).items())
    for layer in model.layers:
        again = conversion.layer_state_from_returnn(ours.to_returnn(layer))
        assert set(again) == set(layer.state_dict())
        assert all(torch.equal(again[name], t) for name, t in layer.state_dict().items())


def test_in_every_ambient_setting():
    theirs = encoder()
    ambient.same_everywhere(lambda: lambda: list(ours.from_returnn(theirs).state_dict().values()))


def test_why_it_is_not_swapped():
    wrapped = rf_module_to_pt_module(encoder())
    report = fastasr.explain(wrapped)
    assert not report.replaced
    for path, name in (("", "ConformerEncoder"), ("layers.0", "EBranchformerLayer")):
        assert report[path].reason.startswith(f"RETURNN's {name} computes on RETURNN's own tensors")
        assert report[path].reason.endswith("from_returnn(module) converts it")
    assert "would never be called" in report["layers.0.cgmlp.linear_ff"].reason
    assert isinstance(ours.from_returnn(wrapped), conversion.EBranchformerStack)
    with pytest.raises(TypeError, match="EBranchformerLayer of RETURNN's, whose E-Branchformer"):
        fastasr.explain(layer())


def test_what_is_refused():
    with pytest.raises(TypeError, match="EBranchformerLayer or ConformerEncoder, got Linear"):
        ours.from_returnn(rf.Linear(Dim(3, name="a"), Dim(4, name="b")))
    learned = rf.build_dict(rf.RelPosSelfAttention, learnable_pos_emb=True)
    with pytest.raises(ValueError, match="self_att"):
        ours.from_returnn(layer(self_att=learned))
    with pytest.raises(ValueError, match="an E-Branchformer layer's names"):
        conversion.layer_state_from_returnn(
            {"self_att.pos_bias_u": torch.zeros(2, 8), "other": torch.zeros(1)}
        )
