# SPDX-License-Identifier: Apache-2.0
"""The packed weights of a MEGA decoder's steps are never stale; an unsuitable call is declined with a reason."""

import copy
import gc
import weakref

import pytest
import torch
from mega_decoders import CHANGES, bits, block_by_block, current, espnet, labels_of, ours, same

import fastasr
from fastasr.models.mega import decoding
from fastasr.ops import _dispatch

pytestmark = [
    pytest.mark.skipif(bool(_dispatch.why_not_native()), reason=_dispatch.why_not_native()),
    pytest.mark.usefixtures("no_gradients"),
]


# --------------------------------------------------------------------------- the packed weights
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_packed_weights_are_never_stale(change):
    decoder = ours()
    current(decoder)
    plan = decoding._PLANS.of(decoder)
    assert decoding._PLANS.of(decoder) is plan
    change(decoder)
    decoder.eval()
    assert decoding._PLANS.of(decoder) is not plan
    current(decoder)


def test_packed_weights_go_with_the_decoder():
    decoder = ours()
    current(decoder)
    clone = copy.deepcopy(decoder)
    assert not {name for name in vars(clone) if "pack" in name or "plan" in name}
    current(clone)
    plan = weakref.ref(decoding._PLANS.of(clone))
    assert plan() is not None
    del clone
    gc.collect()
    assert plan() is None


def test_packing_can_be_declined():
    decoder = ours()
    decoder.packed_decoding = False
    assert decoding.step(decoder, labels_of(), decoder.init_state()) is None
    assert decoding.why_not(decoder) == "packed_decoding is False"
    assert decoder not in decoding._PLANS._of


# --------------------------------------------------------------------------- where it does not serve
def _hook(decoder):
    decoder.mega_blocks[0][0].proj_v.register_forward_hook(lambda *_: None)


def _overridden(decoder):
    decoder.mega_blocks[1][0].forward = lambda *args, **kwargs: None


def _subclassed(decoder):
    class Low(torch.nn.Linear):
        pass

    decoder.mega_blocks[0][1].linear2.__class__ = Low


REASONS = {
    "training mode": lambda decoder: decoder.train(),
    "not all parameters are float32": lambda decoder: decoder.double(),
    "hooks": _hook,
    "block 1: a forward that is not fastasr's": _overridden,
    "block 0: linear2 is not a plain Linear": _subclassed,
    "embed is not a plain Embedding": lambda decoder: setattr(decoder.embed, "max_norm", 1.0),
}


@pytest.mark.parametrize(("reason", "change"), REASONS.items(), ids=REASONS)
def test_declined_with_a_reason(reason, change):
    decoder = ours()
    states = decoder.init_state()
    assert decoding.why_not(decoder) == ""
    change(decoder)
    fastasr.refresh(decoder)
    assert reason in decoding.why_not(decoder)
    assert decoding.step(decoder, labels_of(), states) is None


def test_a_layer_in_the_place_of_embed():
    """It has no weight, as a wrapper of a user's."""
    decoder, labels = ours(), labels_of()
    expected, _ = decoder.inference(labels, decoder.init_state())
    decoder.embed = torch.nn.Sequential(decoder.embed)
    found, _ = decoder.inference(labels, decoder.init_state())
    torch.testing.assert_close(found, expected)
    assert decoding.why_not(decoder) == "embed is not a plain Embedding"


def test_reasons_do_not_outlive_their_cause():
    decoder = ours()
    linear = decoder.mega_blocks[0][0].proj_v
    inner = linear.forward
    for begin, end in (
        (decoder.double, decoder.float),
        (lambda: setattr(linear, "forward", lambda x: inner(x)), lambda: delattr(linear, "forward")),
        (decoder.train, decoder.eval),
    ):
        assert decoding.why_not(decoder) == ""
        begin()
        assert decoding.why_not(decoder) != ""
        end()
        assert decoding.why_not(decoder) == ""
        current(decoder)


def test_a_decoder_without_memory_runs_block_by_block():
    decoder = ours().to("meta")
    assert decoding.why_not(decoder) == "no kernel for meta tensors"
    out, _ = decoder.inference(torch.zeros(1, 1, dtype=torch.int64, device="meta"), decoder.init_state())
    assert out.shape == (1, 1, 40)


def test_dropout_that_is_active_by_itself():
    decoder = ours(dropout_rate=0.5)
    assert decoding.why_not(decoder) == ""
    decoder.mega_blocks[1][0].dropout.train()
    assert "training" in decoding.why_not(decoder)


def test_a_hook_that_comes_and_goes():
    decoder, seen = ours(), []
    states = decoder.init_state()
    decoder.inference(labels_of(), states)
    handle = decoder.mega_blocks[0][0].proj_v.register_forward_hook(lambda *_: seen.append(1))
    decoder.inference(labels_of(), states)
    assert seen == [1]
    handle.remove()
    assert decoding.why_not(decoder) == ""
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert "hooks" in decoding.why_not(decoder)
    handle.remove()
    assert decoding.why_not(decoder) == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation_type": "relu"}, "the activation is not swish"),
        ({"activation_type": "swish", "activation_args": {"swish_beta": 2.0}}, "the activation is not swish"),
        ({"normalization_type": "rms_norm"}, "final_norm is not a LayerNorm"),
    ],
)
def test_other_types_run_block_by_block(options, reason):
    decoder = ours(**options)
    assert reason in decoding.why_not(decoder)
    labels, states = labels_of(2), decoder.init_state(2)
    assert decoding.step(decoder, labels, states) is None
    bits(decoder.inference(labels, states), block_by_block(decoder, labels, states))


def test_gradients_autocast_and_backends_run_block_by_block():
    decoder = ours()
    labels, states = labels_of(), decoder.init_state()
    with torch.enable_grad():
        assert decoding.why_not(decoder, labels) == "gradients are on"
        assert decoder.inference(labels, states)[0].requires_grad
        decoder.requires_grad_(False)
        assert decoding.why_not(decoder, labels) == ""
    with torch.autocast("cpu", torch.bfloat16):
        assert decoding.why_not(decoder, labels) == "autocast is on"
    with fastasr.backend("eager"):
        assert decoding.why_not(decoder, labels) == "backend 'eager' is forced"
        assert decoding.step(decoder, labels, states) is None
    assert decoding.why_not(decoder, labels.expand(1, 2)) == "it is more than one step"
    with torch.inference_mode():
        assert decoding.step(decoder, labels, states) is not None


@pytest.mark.parametrize("label", [-1, 50])
def test_unknown_labels_are_refused_as_before(label):
    decoder = ours()
    labels, states = torch.tensor([[label]]), decoder.init_state()
    assert decoding.step(decoder, labels, states) is None
    with pytest.raises((ValueError, IndexError)):
        decoder.inference(labels, states)


def test_states_of_other_shapes_are_refused_as_before():
    decoder = ours(max_positions=6)
    labels, states = labels_of(), decoder.init_state()
    for _ in range(6):
        _, states = decoding.step(decoder, labels, states)
    assert decoding.step(decoder, labels, states) is None
    with pytest.raises(ValueError, match="at most 6"):
        decoder.inference(labels, states)
    states = decoder.init_state()
    assert decoding.step(decoder, labels, states[:2]) is None
    assert decoding.step(decoder, labels, [{"prev_key": s["prev_key"]} for s in states]) is None
    assert decoding.step(decoder, labels_of(3), decoder.init_state(2)) is None
    assert (
        decoding.step(decoder, labels, [{**s, "ema_state": s["ema_state"].double()} for s in states]) is None
    )
    assert decoding.step(decoder, labels, [{**s, "prev_key": torch.zeros(1, 2, 24)} for s in states]) is None


def test_an_espnet_decoder_that_was_not_swapped_keeps_its_blocks():
    assert decoding.why_not(espnet()) == "block 0: a forward that is not fastasr's"


def test_an_accelerated_espnet_decoder_takes_the_step():
    decoder = espnet()
    fastasr.accelerate(decoder)
    assert decoding.why_not(decoder) == ""
    labels, states = labels_of(), decoder.init_state()
    same(decoding.step(decoder, labels, states), block_by_block(decoder, labels, states))
    fastasr.restore(decoder)
    assert decoding.why_not(decoder) != ""
