# SPDX-License-Identifier: Apache-2.0
"""Modules of every framework that differ from upstream's are declined, with the reason."""

import families
import pytest
import torch
from test_matching import setting

import fastasr


class Swish(torch.nn.Module):
    """Has the name of a class that frameworks have."""

    def __init__(self):
        super().__init__()
        self.swish = torch.nn.SiLU()

    def forward(self, x):
        return 2 * self.swish(x)


EXTRA = setting("extra", torch.nn.Identity()), "has submodules this class does not have upstream: extra"
FOREIGN = setting("activation", Swish()), "submodule activation runs code that is not upstream's"
PARAMETER = torch.nn.Parameter(torch.zeros(3))
# family, the module, what alters it, the reason
ALTERED = (
    ("e-branchformer", "encoders.0.feed_forward", *FOREIGN),
    ("e-branchformer", "encoders.0.cgmlp.csgu", *EXTRA),
    ("e-branchformer", "encoders.1", setting("ff_scale", None), "ff_scale is None, expected a float"),
    ("parakeet", "layers.0.self_attn", setting("num_key_value_groups", 2), "num_key_value_groups is 2, expected 1"),
    ("parakeet", "layers.0.conv", *EXTRA),
    (
        "parakeet", "layers.0.feed_forward1", lambda m: m.register_forward_hook(lambda *_: None),
        "has a forward hook",
    ),
    (
        "parakeet", "layers.1.self_attn", setting("sink", PARAMETER),
        "has parameters this class does not have upstream: sink",
    ),
    (
        "nemotron", "layers.0.conv", setting("depthwise_conv", torch.nn.Conv1d(24, 24, 5)),
        "submodule depthwise_conv is a Conv1d",
    ),
    (
        "nemotron", "subsampling", setting("layers.0", torch.nn.Identity()),
        "submodule 0 is a Identity, expected NemotronAsrStreamingEncoderSubsamplingLayer",
    ),
    ("parakeet", "subsampling", setting("layers", torch.nn.Identity()), "does not fit upstream's ParakeetEncoderSubs"),
    (
        "nemo joint", "", setting("joint_net", torch.nn.Identity()),
        "submodule joint_net is a Identity of 0, expected a Sequential",
    ),
    ("emformer", "emformer_layers.0", setting("attention.negative_inf", -5.0), "negative_inf"),
    ("emformer", "emformer_layers.0", setting("attention.scaling", 1.0), "scaling"),
    ("emformer rnn-t", "predictor.lstm_layers.0", setting("extra", PARAMETER), "extra"),
    ("emformer rnn-t", "predictor.lstm_layers.0", setting("c_norm", torch.nn.Identity()), "c_norm"),
    ("emformer rnn-t", "predictor.lstm_layers.0", setting("p2g", torch.nn.Linear(8, 32, bias=False)), "p2g.weight"),
    ("mega", "mega_blocks.0.0", *FOREIGN),
    ("mega", "mega_blocks.0.0", *EXTRA),
    ("mega", "mega_blocks.0.0", setting("scaling", 1.0), "scaling is 1.0"),
    ("mega", "mega_blocks.0.0", setting("rel_pos_bias.forward", lambda length: length), "submodule rel_pos_bias"),
    ("mega", "mega_blocks.0.0.multihead_damped_ema", setting("truncation_length", -1), "truncation_length is -1"),
    ("mega", "", setting("num_blocks", 3), "mega_blocks does not hold 3 pairs"),
)  # fmt: skip


class Wrapped(torch.nn.Module):
    """Stands around a layer, as a library's adapter does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("family", "path", "child"),
    [
        ("mega", "mega_blocks.0.0", "proj_h"),
        ("e-branchformer", "encoders.0.feed_forward", "w_1"),
        ("parakeet", "layers.0.feed_forward1", "linear1"),
        ("emformer", "emformer_layers.0", "layer_norm_output"),
        ("zipformer", "encoder.encoders.0.layers.0", "norm"),
    ],
)
def test_a_module_around_a_wrapped_layer_is_served(family, path, child):
    model, _ = families.make(family)
    module = model.get_submodule(path)
    setattr(module, child, Wrapped(getattr(module, child)))
    assert fastasr.explain(model)[path].status == "replaced"


@pytest.mark.parametrize(("family", "path", "alter", "reason"), ALTERED)
def test_an_altered_module(family, path, alter, reason):
    model, _ = families.make(family)
    assert fastasr.explain(model)[path].status == "replaced"
    alter(model.get_submodule(path))
    row = fastasr.explain(model)[path]
    assert row.status == "skipped"
    assert reason in row.reason


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("parakeet tdt", "joint"),
        ("parakeet, ragged", "layers.1"),
        ("parakeet, ragged", "layers.1.conv"),
        ("zipformer, ragged", "encoder.encoders.0.layers.0.feed_forward1"),
        ("zipformer, causal", "encoders.0.layers.0"),
        ("mega", "embed"),
    ],
)
def test_a_swapped_model_that_lost_a_part(family, path):
    """It can be explained, though nothing of it may run."""
    model, _ = families.make(family)
    fastasr.accelerate(model, **families.SWAP.get(family, {}))
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, None)
    told = str(fastasr.explain(model)) + str(fastasr.why(model))
    assert any(reason in told for reason in ("upstream's", f"{name} is not a plain"))
    assert fastasr.restore(model)
