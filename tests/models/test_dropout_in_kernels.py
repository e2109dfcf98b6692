# SPDX-License-Identifier: Apache-2.0
"""Where kernels for GPUs serve, linear_activation drops elements between the layers of feed-forward blocks."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastasr
from fastasr.models.common import activations
from fastasr.models.e_branchformer.feed_forward import PositionwiseFeedForward
from fastasr.models.emformer import parts
from fastasr.models.fast_conformer import FastConformerFeedForward
from fastasr.models.mega.feed_forward import NormalizedPositionwiseFeedForward
from fastasr.ops import _dispatch, _dropout, _weights_dropout
from fastasr.swap.forwards import common, funasr, nemo, phi4, speechbrain, transformers_conformer
from fastasr.testing import seeded

WIDTH, HIDDEN, P = 6, 40, 0.3


def layers(hidden=HIDDEN):
    return nn.Linear(WIDTH, hidden), nn.SiLU(), nn.Dropout(P), nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.0)


def by_names(forward, *names, **more):
    made = SimpleNamespace(**dict(zip(names, layers(), strict=True)), **more)
    return lambda x: forward(made, x)


def gated():
    first, activation, dropout, last, _ = layers(2 * HIDDEN)
    names = {"layer_norm": nn.Identity(), "gate_up_proj": first, "act_fn": activation}
    made = SimpleNamespace(**names, dropout=dropout, down_proj=last)
    return lambda x: phi4.phi4_feed_forward(made, x)


def in_speechbrain():
    made = SimpleNamespace(ffn=nn.Sequential(*layers()[:4]))
    return lambda x: speechbrain.speechbrain_feed_forward(made, x)


def in_funasr():
    first, activation, _, last, _ = layers()
    made = SimpleNamespace(hidden_dropout=P, training=True, fc1=first, fc2=last, activation_fn=activation)
    return lambda x: funasr.fun_asr_feed_forward(made, x)


def in_emformer():
    made = nn.Sequential(nn.Identity(), *layers())
    return lambda x: parts._fed_forward(made, x)


WAV2VEC2 = (
    "intermediate_dense",
    "intermediate_act_fn",
    "intermediate_dropout",
    "output_dense",
    "output_dropout",
)
NEMO = "linear1", "activation", "dropout", "linear2", "unused"
BLOCKS = {
    "fast_conformer": lambda: FastConformerFeedForward(WIDTH, HIDDEN, activation_dropout=P),
    "e_branchformer": lambda: PositionwiseFeedForward(WIDTH, HIDDEN, P),
    "mega": lambda: NormalizedPositionwiseFeedForward(WIDTH, HIDDEN, activation=nn.SiLU, dropout_rate=P),
    "emformer": in_emformer,
    "nemo": lambda: by_names(nemo.nemo_feed_forward, *NEMO),
    "wav2vec2": lambda: by_names(transformers_conformer.wav2vec2_feed_forward, *WAV2VEC2),
    "five layers": lambda: partial(common.in_sequence, layers()),
    "speechbrain": in_speechbrain,
    "funasr": in_funasr,
    "phi4": gated,
}


@pytest.fixture
def drawn(monkeypatch):
    """The shares that the op was asked to drop, with a kernel for GPUs in the place of the CPU's."""
    found, op = [], fastasr.ops.linear_activation

    def noted(*arguments, dropout_p=0.0, dropout_seed=None):
        found.append(dropout_p)
        return op(*arguments, dropout_p=dropout_p, dropout_seed=dropout_seed)

    monkeypatch.setattr(fastasr.ops, "linear_activation", noted)
    monkeypatch.setattr(_dispatch, "serving", lambda family, x: "triton")
    monkeypatch.setattr(_dropout, "serves", lambda *arguments: False)
    return found


@pytest.mark.parametrize("block", BLOCKS)
def test_the_kernel_drops_between_the_layers(block, drawn):
    made = BLOCKS[block]()
    x = torch.randn(2, 5, WIDTH)
    made(x)
    assert drawn == [P]
    with fastasr.upstream_draws():
        made(x)
    assert sum(drawn) == P


def test_values_are_those_of_the_seed_that_torch_draws(drawn):
    first, activation, dropout, *_ = layers()
    x = torch.randn(2, 5, WIDTH)
    torch.manual_seed(seeded(1))
    y = activations.dropped(first, activation, dropout, x)
    torch.manual_seed(seeded(1))
    kept = _weights_dropout.kept(_weights_dropout.draw_seed(x.device), P, *y.shape)
    torch.testing.assert_close(y, activation(first(x)) * kept / (1 - P))


def hooked(module):
    module.register_forward_hook(lambda *arguments: None)
    return module


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": nn.Dropout(P).eval()},
        {"dropout": nn.Dropout(0.0)},
        {"dropout": nn.Dropout(1.0)},
        {"dropout": hooked(nn.Dropout(P))},
        {"dropout": nn.AlphaDropout(P)},
        {"dropout": 0.0},
        {"first": hooked(nn.Linear(WIDTH, HIDDEN))},
        {"activation": nn.ELU()},
    ],
)
def test_other_modules_are_called(changes, drawn):
    first, activation, dropout, *_ = layers()
    given = {"first": first, "activation": activation, "dropout": dropout} | changes
    x = torch.randn(2, 5, WIDTH)
    torch.manual_seed(seeded(1))
    y = activations.dropped(*given.values(), x)
    torch.manual_seed(seeded(1))
    expected = given["activation"](given["first"](x))
    if isinstance(given["dropout"], nn.Module):
        expected = given["dropout"](expected)
    torch.testing.assert_close(y, expected)
    assert not any(drawn)


def test_the_formula_of_a_backend_without_kernels_is_torchs():
    """A GPU's float64, or the backend "eager", has no kernel: there a hash would take more passes than torch's."""
    first, activation, dropout, *_ = layers()
    with fastasr.backend("eager"):
        assert activations.dropped_in_kernel(first, activation, dropout, torch.randn(3, WIDTH)) is None
    assert activations.dropped_in_kernel(first, activation, dropout, torch.randn(3, WIDTH)) is None
