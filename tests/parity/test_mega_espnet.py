# SPDX-License-Identifier: Apache-2.0
"""MEGA against ESPnet's: values, gradients, random draws, streaming, batches, state dicts."""

import copy
import inspect

import mega_models
import pytest
import torch
from mega_models import DROPOUT, in_fp64, labels
from steps import close, numbers, same_state, same_step, seeded

from fastasr.models import mega
from fastasr.models.mega.attention import causal

pytest.importorskip("espnet2.asr_transducer.decoder.mega_decoder")

# ESPnet's rotary tables, and the threshold of ftswish, are rounded to float32 in a float64 model too.
VARIANTS = {
    "simple": ({}, 1e-12),
    "rotary": ({"rel_pos_bias_type": "rotary"}, 3e-6),
    "chunks": ({"chunk_size": 5}, 1e-12),
    "one chunk": ({"chunk_size": 20}, 1e-12),
    "truncated": ({"truncation_length": 4}, 1e-12),
    "relu rms": ({"activation_type": "relu", "normalization_type": "rms_norm"}, 1e-12),
    "partial": ({"normalization_type": "rms_norm", "normalization_args": {"partial": 0.4}}, 1e-12),
    "tanh basic": ({"activation_type": "tanh", "normalization_type": "basic_norm"}, 1e-12),
    "identity scale": ({"activation_type": "identity", "normalization_type": "scale_norm"}, 1e-12),
    "mish": ({"activation_type": "mish", "normalization_args": {"eps": 1e-3}}, 1e-12),
    "e-swish": ({"activation_type": "swish", "activation_args": {"swish_beta": 1.25}}, 1e-12),
    "smish": ({"activation_type": "smish", "activation_args": {"smish_alpha": 0.9}}, 1e-12),
    "ftswish": ({"activation_type": "ftswish"}, 3e-6),
    "selu": ({"activation_type": "selu"}, 1e-12),
    "hardtanh": ({"activation_type": "hardtanh", "activation_args": {"hardtanh_max_val": 2}}, 1e-12),
    "leaky_relu": ({"activation_type": "leaky_relu", "activation_args": {"leakyrelu_neg_slope": 0.2}}, 1e-12),
}


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def variant(request):
    return VARIANTS[request.param]


def test_values_and_gradients(variant):
    arguments, tolerance = variant
    with in_fp64():
        ours, theirs = mega_models.pair(**arguments)
        same_step(ours, theirs, labels(), tolerance=tolerance, share=1.0)


@pytest.mark.parametrize("arguments", [{}, {"rel_pos_bias_type": "rotary"}, {"chunk_size": 5}])
def test_float32_to_rounding(arguments):
    ours, theirs = mega_models.pair(**arguments)
    with in_fp64():
        exact = copy.deepcopy(theirs).double()(labels())
    expected, actual = theirs(labels()), ours(labels())
    assert actual.dtype == torch.float32
    assert (actual - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-6 * exact.abs().max()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 1), (1, 40), (2, 5), (2, 10), (2, 11)])
@pytest.mark.parametrize("chunk", [-1, 5])
def test_lengths(batch, length, chunk):
    with in_fp64():
        ours, theirs = mega_models.pair(chunk_size=chunk)
        close(ours(labels(batch, length)), theirs(labels(batch, length)), 1e-12)


def test_padding_inside_and_a_chunk_of_padding_alone():
    batch = labels(2, 15)
    batch[0, 6:8] = 0
    batch[1, 5:] = 0
    for chunk in (-1, 5):
        with in_fp64():
            ours, theirs = mega_models.pair(chunk_size=chunk)
            close(ours(batch), theirs(batch), 1e-12)


@pytest.mark.parametrize("name", ["simple", "rotary", "chunks", "mish"])
@pytest.mark.parametrize("rate", ["all", *DROPOUT])
def test_a_training_step_with_dropout(name, rate):
    arguments, tolerance = VARIANTS[name]
    rates = DROPOUT if rate == "all" else {rate: 0.5}
    with in_fp64():
        theirs = mega_models.upstream(**arguments, **rates).train()
        ours = mega_models.ours(theirs, **arguments, **rates)
        same_step(ours, theirs, labels(), tolerance=tolerance, seed=3, share=1.0)


def test_initialisation_draws_the_same(variant):
    from espnet2.asr_transducer.decoder.mega_decoder import MEGADecoder

    arguments, _ = variant
    seeded(5)
    theirs = MEGADecoder(**{**mega_models.ARGUMENTS, **arguments})
    state = torch.get_rng_state()
    seeded(5)
    ours = mega.MEGADecoder(**{**mega_models.ARGUMENTS, **arguments})
    assert torch.equal(torch.get_rng_state(), state)
    same_state(ours, theirs, but=["._pe"])  # nobody initialises it


def test_defaults_of_the_constructors():
    from espnet2.asr_transducer.decoder import mega_decoder
    from espnet2.asr_transducer.decoder.blocks import mega as block
    from espnet2.asr_transducer.decoder.modules.mega import (
        feed_forward,
        multi_head_damped_ema,
        positional_bias,
    )

    modules = (mega_decoder, block, feed_forward, multi_head_damped_ema, positional_bias)
    for name in mega.__all__:
        theirs = next(vars(m)[name] for m in modules if name in vars(m))
        expected = inspect.signature(theirs.__init__).parameters.values()
        actual = inspect.signature(getattr(mega, name).__init__).parameters
        assert list(actual)[: len(expected)] == [p.name for p in expected]
        for p in expected:
            if not isinstance(p.default, (dict, torch.nn.Module)):
                assert actual[p.name].default == p.default, (name, p.name)


# --------------------------------------------------------------------------- streaming
STREAMED = {name: VARIANTS[name] for name in ("simple", "rotary", "chunks", "mish", "identity scale")}


@pytest.fixture(params=STREAMED, ids=lambda name: name.replace(" ", "-"))
def streamed(request):
    """Yields upstream's decoder, its arguments and the tolerance, in float64 without gradients."""
    arguments, tolerance = STREAMED[request.param]
    with in_fp64(), torch.no_grad():
        yield mega_models.upstream(**arguments).eval(), arguments, tolerance


def hypothesis(model, sequence):
    """Returns the sequence with the state before its last label, as a search holds them."""
    from espnet2.asr_transducer.beam_search_transducer import Hypothesis

    states = model.init_state(1) if not hasattr(model, "phantom_first_step") else model.init_state()
    for t in range(1, len(sequence)):
        _, states = model.score(sequence[:t], states)
        states_of_one = model.select_state(states, 0)
    return Hypothesis(score=0.0, yseq=sequence, dec_state=states_of_one if len(sequence) > 1 else states)


def search(model, sequences, steps=7):
    """Scores hypotheses of different lengths in batches as each goes on. Returns (steps, B, D) and the hypotheses."""
    from espnet2.asr_transducer.beam_search_transducer import Hypothesis

    hyps, outs = [hypothesis(model, list(s)) for s in sequences], []
    for step in range(steps):
        out, states = model.batch_score(hyps)
        outs.append(out)
        hyps = [
            Hypothesis(score=0.0, yseq=[*h.yseq, 1 + step + i], dec_state=model.select_state(states, i))
            for i, h in enumerate(hyps)
        ]
    return torch.stack(outs), hyps


SEQUENCES = ([0, 4, 5, 6], [0], [0, 7, 8], [0, 9, 2, 1])


def test_phantom_steps_equal_upstream(streamed):
    theirs, arguments, tolerance = streamed
    ours = mega_models.ours(theirs, **arguments, phantom_first_step=True)
    expected, actual = theirs.init_state(), ours.init_state()
    sequence = labels()[0].tolist()
    for t in range(1, len(sequence) + 1):
        out, expected = theirs.score(sequence[:t], expected)
        mine, actual = ours.score(sequence[:t], actual)
        close(mine, out, tolerance)
        for a, b in zip(actual, expected, strict=True):
            assert a.keys() == b.keys()
            for key in b:
                close(a[key], b[key], tolerance)


def test_phantom_batches_equal_upstream(streamed):
    theirs, arguments, tolerance = streamed
    ours = mega_models.ours(theirs, **arguments, phantom_first_step=True)
    close(search(ours, SEQUENCES)[0], search(theirs, SEQUENCES)[0], tolerance)


def test_our_steps_equal_training(streamed):
    theirs, arguments, tolerance = streamed
    ours = mega_models.ours(theirs, **arguments)
    sequence = labels()[0].tolist()
    expected, states = theirs(torch.tensor([sequence]))[0], ours.init_state()
    for t in range(len(sequence)):
        out, states = ours.score(sequence[: t + 1], states)
        close(out[0], expected[t], 10 * tolerance)
    outs, hyps = search(ours, SEQUENCES)
    for i, hyp in enumerate(hyps):
        expected = theirs(torch.tensor([hyp.yseq[:-1]]))[0]
        close(outs[:, i], expected[-len(outs) :], 10 * tolerance)


def test_our_pieces_equal_training(streamed):
    theirs, arguments, tolerance = streamed
    ours = mega_models.ours(theirs, **arguments)
    batch = labels(2, 12)
    batch[1] = batch[0].flip(0)
    expected = theirs(batch.clamp(min=1))
    states, outs = ours.init_state(2), []
    for piece in batch.clamp(min=1).split([3, 1, 0, 6, 2], dim=1):
        out, states = ours.inference(piece, states)
        outs.append(out)
    close(torch.cat(outs, 1), expected, 10 * tolerance)


# --------------------------------------------------------------------------- parts
def test_a_block_alone():
    """The masks are given as tensors: causal, another, none, and padding."""
    with in_fp64():
        ours, theirs = (model.mega_blocks[0][0] for model in mega_models.pair())
        x = torch.randn(9, 3, 24)
        other = torch.rand(1, 9, 9, generator=numbers(0)) > 0.7
        other[..., 0] = False
        padding = torch.arange(9).unsqueeze(0) >= torch.tensor([9, 5, 7]).unsqueeze(1)
        for attn_mask in (None, causal(9, 9, x.device), other):
            for mask in (None, padding.unsqueeze(1)):
                expected, none = theirs(x, mask=mask, attn_mask=attn_mask)
                actual, state = ours(x, mask=mask, attn_mask=attn_mask)
                assert state is none is None
                close(actual, expected, 1e-12)
        close(ours(x, attn_mask="causal")[0], theirs(x, attn_mask=causal(9, 9, x.device))[0], 1e-12)


def test_softmax_attention():
    with in_fp64():
        ours, theirs = (model.mega_blocks[0][0] for model in mega_models.pair())
        key = torch.randn(2, 1, 6, 16)
        for query in (torch.randn(2, 1, 6, 16), torch.randn(2, 1, 1, 16)):
            close(ours.softmax_attention(query, key), theirs.softmax_attention(query, key), 1e-12)


def test_the_average_alone():
    with in_fp64():
        ours, theirs = (model.mega_blocks[0][0].multihead_damped_ema for model in mega_models.pair())
        x = torch.randn(7, 2, 24)
        mask = torch.zeros(2, 1, 7, dtype=torch.bool)
        mask[1, :, 4:] = True
        close(ours(x, mask=mask)[0], theirs(x, mask=mask)[0], 1e-12)
        state = {"ema_state": torch.randn(2, 24, 3)}
        expected, actual = theirs(x[:1], state=state), ours(x[:1], state=state)
        close(actual[0], expected[0], 1e-12)
        close(actual[1], expected[1], 1e-12)
        close(ours.compute_ema_kernel(9), theirs.compute_ema_kernel(9), 1e-12)
        close(ours.get_ema_coefficients(), theirs.get_ema_coefficients(), 1e-12)
        one = torch.randn(2, 24, 1)
        states = one, state["ema_state"]
        close(ours.ema_one_step(*states), theirs.ema_one_step(*states), 1e-12)


@pytest.mark.parametrize("kind", ["simple", "rotary"])
@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_the_biases_alone(kind, length):
    models = mega_models.pair(rel_pos_bias_type=kind)
    ours, theirs = (model.mega_blocks[0][0].rel_pos_bias for model in models)
    same_step(ours, theirs, length, tolerance=2e-6, share=1.0)
    if kind == "rotary":
        x = torch.randn(length, 16)
        close(ours.rotary(x), theirs.rotary(x), 1e-6)
        tables = (model.get_sinusoid_embeddings(9, 16) for model in (ours, theirs))
        for a, b in zip(*tables, strict=True):
            close(a, b, 1e-6)
