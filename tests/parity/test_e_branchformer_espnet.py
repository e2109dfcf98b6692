# SPDX-License-Identifier: Apache-2.0
"""E-Branchformer against ESPnet's: values, gradients, random draws, lengths, options, state dicts."""

import pytest
import torch
from steps import moved, same_step, seeded

pytest.importorskip("espnet2.asr.encoder.e_branchformer_encoder")

from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder as Upstream
from espnet2.asr.layers.cgmlp import ConvolutionalSpatialGatingUnit as UpstreamGate

import fastasr
from fastasr.models import e_branchformer as ours

SIZES = {
    "input_size": 20,
    "output_size": 24,
    "attention_heads": 3,
    "cgmlp_linear_units": 36,
    "cgmlp_conv_kernel": 7,
    "num_blocks": 2,
    "linear_units": 28,
    "max_pos_emb_len": 30,
    "dropout_rate": 0.0,
    "positional_dropout_rate": 0.0,
}
VARIANTS = {
    "macaron": {"use_ffn": True, "macaron_ffn": True},
    "one feed-forward block": {"use_ffn": True, "ffn_activation_type": "relu"},
    "no feed-forward block": {},
    "gate swish": {"gate_activation": "swish", "merge_conv_kernel": 5},
    "gate hardtanh": {"gate_activation": "hardtanh"},
    "linear after the convolution": {"use_linear_after_conv": True},
    "causal positions": {"zero_triu": True},
    "conv2d6": {"input_layer": "conv2d6"},
    "conv2d2": {"input_layer": "conv2d2"},
    "linear input": {"input_layer": "linear"},
    "no input layer": {"input_layer": None, "input_size": 24},
    "intermediate": {"interctc_layer_idx": [1]},
}
DROPOUT = {"dropout_rate": 0.2, "positional_dropout_rate": 0.1, "attention_dropout_rate": 0.15}


def pair(**arguments):
    """Returns ESPnet's encoder with parameters away from their initial values, and fastasr's with the same."""
    seeded(0)
    theirs = moved(Upstream(**{**SIZES, **arguments}), 0.1)
    model = ours.EBranchformerEncoder(**{**SIZES, **arguments})
    model.load_state_dict(theirs.state_dict())
    return theirs, model


def inputs(arguments, dtype=torch.float64):
    seeded(1)
    return torch.randn(3, 47, {**SIZES, **arguments}["input_size"], dtype=dtype), torch.tensor([47, 40, 21])


def flat(output):
    """Returns (values, lengths) of an encoder's output, with its intermediate ones."""
    y, lengths, states = output
    assert states is None
    if isinstance(y, tuple):
        y = torch.cat([y[0], *(each[1] if isinstance(each, tuple) else each for each in y[1])])
    return y, lengths


class Flat(torch.nn.Module):
    """Returns the values alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, lengths):
        y, self.lengths = flat(self.model(x, lengths))
        return y


def compare(model, theirs, batch, seed=0):
    nets = Flat(model), Flat(theirs)
    same_step(*nets, *batch, tolerance=1e-12, seed=seed, share=1.0)
    assert torch.equal(*(net.lengths for net in nets))


@pytest.mark.parametrize("name", VARIANTS, ids=lambda name: name.replace(" ", "-"))
def test_values_and_gradients(name):
    theirs, model = (m.double() for m in pair(**VARIANTS[name]))
    batch = inputs(VARIANTS[name])
    for training in (False, True):
        theirs.train(training), model.train(training)
        compare(model, theirs, batch, seed=2)
    with torch.no_grad():
        y, expected = flat(model.eval()(*batch))[0], flat(theirs.eval()(*batch))[0]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)


def test_a_training_step_with_dropout_draws_the_same():
    arguments = {"use_ffn": True, "macaron_ffn": True, "layer_drop_rate": 0.4, **DROPOUT}
    theirs, model = (m.double().train() for m in pair(**arguments))
    batch = inputs(arguments)
    for seed in (3, 4, 5):  # with and without a dropped layer
        with fastasr.upstream_draws():
            compare(model, theirs, batch, seed)


def test_float32_to_rounding():
    arguments = VARIANTS["macaron"]
    theirs, model = pair(**arguments)
    x, lengths = inputs(arguments, torch.float32)
    with torch.no_grad():
        y, expected = model.eval()(x, lengths)[0], theirs.eval()(x, lengths)[0]
        exact = theirs.double()(x.double(), lengths)[0]
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-6 * exact.abs().max()


# one frame after the input layer; more than the table has
@pytest.mark.parametrize("frames", [7, 8, 11, 140])
def test_lengths(frames):
    theirs, model = (m.double().eval() for m in pair(**VARIANTS["macaron"]))
    x = torch.randn(2, frames, 20, dtype=torch.float64)
    lengths = torch.tensor([frames, max(7, frames - 3)])
    compare(model, theirs, (x, lengths))


def test_masks_layers_and_checkpoints():
    theirs, model = (m.double().eval() for m in pair(**VARIANTS["macaron"]))
    x, lengths = inputs({})
    padding = torch.arange(47) >= lengths[:, None]
    for options in ({"masks": padding}, {"max_layer": 1}, {"return_all_hs": True}):
        y, n = flat(model(x, lengths, **options))
        expected, m = flat(theirs(x, lengths, **options))
        assert n.tolist() == m.tolist()
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    model.gradient_checkpoint_layers = [0, 2]
    compare(model, theirs, (x, lengths))


def test_state_dicts_both_ways():
    for name in VARIANTS:
        theirs, model = pair(**VARIANTS[name])
        state = model.state_dict()
        assert list(state) == list(theirs.state_dict())
        theirs.load_state_dict(state)


def test_a_query_without_keys_gives_the_projection_of_nothing():
    theirs, model = (m.double().eval() for m in pair(**VARIANTS["macaron"]))
    x, mask = torch.randn(2, 5, 24, dtype=torch.float64), torch.ones(2, 1, 5, dtype=torch.bool)
    mask[1] = False
    positions = torch.randn(1, 9, 24, dtype=torch.float64)
    arguments = x, x, x, positions, mask
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, expected = model.encoders[0].attn(*arguments), theirs.encoders[0].attn(*arguments)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_the_gating_unit_alone():
    seeded(0)
    theirs = UpstreamGate(12, 5, 0.0, False, "identity").double()
    unit = ours.ConvolutionalSpatialGatingUnit(12, 5, 0.0).double()
    unit.load_state_dict(theirs.state_dict())
    x, more = torch.randn(2, 9, 12, dtype=torch.float64), torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(unit(x), theirs(x))
    torch.testing.assert_close(unit(x, more), theirs(x, more))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"attention_layer_type": "fast_selfattn"}, "attention_layer_type"),
        ({"pos_enc_layer_type": "abs_pos"}, "pos_enc_layer_type"),
        ({"rel_pos_type": "legacy"}, "rel_pos_type"),
        ({"input_layer": "conv3d"}, "input_layer"),
        ({"attention_heads": 5}, "n_head"),
        ({"cgmlp_conv_kernel": 4}, "kernel_size"),
        ({"gate_activation": "elu"}, "gate_activation"),
        ({"interctc_layer_idx": [2]}, "interctc_layer_idx"),
    ],
)
def test_options_that_are_not_there(arguments, match):
    with pytest.raises(ValueError, match=match):
        ours.EBranchformerEncoder(**{**SIZES, **arguments})


def test_too_short_for_the_input_layer():
    with pytest.raises(ValueError, match="at least 7 frames, got 6"):
        pair()[1](torch.randn(1, 6, 20), torch.tensor([6]))


def test_a_gate_without_bias_is_initialised():
    gate = ours.ConvolutionalSpatialGatingUnit(8, 3, 0.0, bias=False)
    gate.espnet_initialization_fn()
    assert gate.conv.bias is None
    assert 0.0 < gate.conv.weight.abs().max() < 1e-5
