# SPDX-License-Identifier: Apache-2.0
"""transformers' Parakeet swapped: equal results, training steps, what transformers itself does with a model."""

import copy

import pytest
import torch
from steps import close, moved, numbers, same_step, seeded, swapped
from tiny_parakeet import SIZES, STILL

pytest.importorskip("transformers")

from transformers import ParakeetCTCConfig, ParakeetEncoder, ParakeetEncoderConfig, ParakeetForCTC

import fastasr
from fastasr.graphs import module as recording
from fastasr.models import fast_conformer
from fastasr.testing.tape import TapeRecorder

SWAPPED = {
    "ParakeetEncoder",
    "ParakeetEncoderAttention",
    "ParakeetEncoderBlock",
    "ParakeetEncoderConvolutionModule",
    "ParakeetEncoderFeedForward",
    "ParakeetEncoderRelPositionalEncoding",
    "ParakeetEncoderSubsamplingConv2D",
}


def encoder(**options):
    seeded(0)
    return moved(ParakeetEncoder(ParakeetEncoderConfig(**{**SIZES, **options})), 0.03).eval()


def batch():
    generator = numbers(1)
    x = torch.randn(3, 75, SIZES["num_mel_bins"], generator=generator)
    return {
        "input_features": x,
        "attention_mask": (torch.arange(75) < torch.tensor([75, 50, 9])[:, None]).long(),
    }


def hidden(model, **options):
    with torch.no_grad():
        return model(**batch(), **options).last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_swap_and_verify(implementation):
    model = encoder(attn_implementation=implementation)
    expected = hidden(encoder())
    inputs = batch()
    report = fastasr.accelerate(model, verify=None if implementation == "flex_attention" else inputs)
    assert report.ok, str(report)
    assert {row.class_name for row in report.replaced} == SWAPPED | {"Linear"}
    if report.verified:
        assert all(row.errors for row in report.replaced if row.class_name in SWAPPED)
    close(hidden(model), expected)
    assert fastasr.restore(model) == len(report.replaced)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Every layer runs twice."""
    theirs = encoder(**STILL).train()
    theirs.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours = swapped(theirs)
    calls = []
    for layer in ours.layers:
        layer.norm_feed_forward1.register_forward_hook(lambda *_: calls.append(1))
    same_step(ours, theirs, *batch().values(), tolerance=1e-4, share=1.0)
    assert len(calls) == 2 * len(ours.layers)


def test_gradient_checkpointing_drops_the_same_weights_again():
    model = encoder(**{**STILL, "attention_dropout": 0.3}).train()
    fastasr.accelerate(model)
    found = []
    for _ in range(2):
        seeded(5)
        loss = model(**batch()).last_hidden_state.sin().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
        model.gradient_checkpointing_enable()
    for a, b in zip(*found, strict=True):
        close(a, b)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hidden_states_and_attentions(when):
    model = encoder(attn_implementation="eager")
    twin = copy.deepcopy(model)
    options = {"output_hidden_states": True, "output_attentions": True}
    if when == "before":
        # transformers puts its hooks on the modules at the first such call, for good
        model(**batch(), **options)
    report = fastasr.accelerate(model, verify=batch())
    assert report.ok, str(report)
    assert {row.class_name for row in report.replaced} >= SWAPPED
    with torch.no_grad():
        found, expected = model(**batch(), **options), twin(**batch(), **options)
    for kind in ("hidden_states", "attentions"):
        assert len(found[kind]) == len(expected[kind]) > 0
        close(found[kind], expected[kind])
    close(hidden(model), expected.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    exact = encoder().double()
    inputs = {**batch(), "input_features": batch()["input_features"].to(dtype)}
    with torch.no_grad():
        expected = exact(**{**inputs, "input_features": inputs["input_features"].double()})
        expected = expected.last_hidden_state[
            inputs["attention_mask"][:, ::8].bool()[:, : expected[0].shape[1]]
        ]
        model = encoder().to(dtype)
        valid = inputs["attention_mask"][:, ::8].bool()
        theirs = model(**inputs).last_hidden_state[valid].double()
        fastasr.accelerate(model)
        ours = model(**inputs).last_hidden_state[valid].double()
    assert (ours - expected).abs().mean() <= 1.2 * (theirs - expected).abs().mean()


def test_compiled():
    model = encoder()
    expected = hidden(model)
    fastasr.accelerate(model)
    close(hidden(torch.compile(model, backend="eager")), expected)


def test_the_implementation_changes_after_the_swap():
    model = encoder()
    expected = hidden(model)
    fastasr.accelerate(model)
    model.set_attn_implementation("eager")
    close(hidden(model), expected)
    assert len(model(**batch(), output_attentions=True).attentions) == SIZES["num_hidden_layers"]


def test_ctc_generates_the_same():
    seeded(0)
    config = ParakeetCTCConfig(vocab_size=11, pad_token_id=10, encoder_config=ParakeetEncoderConfig(**SIZES))
    model = ParakeetForCTC(config).eval()
    inputs = {**batch(), "labels": torch.tensor([[1, 2, 3], [4, 5, -100], [6, -100, -100]])}
    with torch.no_grad():
        expected, loss = model.generate(**batch()), model(**inputs).loss
        report = fastasr.accelerate(model, verify=inputs)
        assert report.ok, str(report)
        found, swapped_loss = model.generate(**batch()), model(**inputs).loss
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))
    close(swapped_loss, loss)


def test_any_mask_of_pairs():
    model = encoder()
    attention = model.layers[0].self_attn
    seeded(2)
    x, table = torch.randn(2, 7, 24), model.encode_positions(torch.empty(2, 7, 24))
    mask = torch.rand(2, 1, 7, 7) < 0.6
    mask[0, :, 3] = False  # a query that sees nothing
    mask[1, :, :, 2] = False  # a key that nothing sees
    expected = attention(x, table, mask)[0], model.layers[0].conv(x, mask)
    fastasr.accelerate(model)
    close(attention(x, table, mask)[0], expected[0])
    close(model.layers[0].conv(x, mask), expected[1])


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}, {"return_dict": False}], ids=str)
def test_a_mask_that_hides_nothing_makes_no_pairs(options):
    model = encoder()
    inputs = {**batch(), "attention_mask": torch.ones(3, 75).long()}
    with torch.no_grad():
        expected = model(**inputs, **options)
        fastasr.accelerate(model)
        masks = []
        model.layers[0].register_forward_pre_hook(
            lambda module, arguments, named: masks.append(named["attention_mask"]), with_kwargs=True
        )
        found = model(**inputs, **options)
    assert all(mask is None for mask in masks) == ("return_dict" not in options)
    if not options.get("return_dict", True):
        found, expected = ({str(i): t for i, t in enumerate(result)} for result in (found, expected))
    assert list(found) == list(expected)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            close(found[key], value)


def test_new_weights_are_noticed():
    """Projected positions are kept between calls while the weight stays the same."""
    model, twin = encoder(), encoder()
    fastasr.accelerate(model)
    hidden(model)
    with torch.no_grad():
        for each in (model, twin):
            each.layers[0].self_attn.relative_k_proj.weight.mul_(-2)
    close(hidden(model), hidden(twin))
    shorter = {key: value[:, :40] for key, value in batch().items()}
    with torch.no_grad():
        close(model(**shorter).last_hidden_state, twin(**shorter).last_hidden_state)


def test_a_table_of_inference_mode_serves_training():
    model = encoder(**STILL)
    fastasr.accelerate(model)
    with torch.inference_mode():
        model(**batch())
    model.train()(**batch()).last_hidden_state.sin().sum().backward()
    assert model.layers[0].self_attn.relative_k_proj.weight.grad is not None


def test_recorded_parts_run_the_forward_that_was_bound():
    model = encoder(**STILL)
    for _ in range(2):
        fastasr.accelerate(model, graphs=fastasr.Graphs(recorder=TapeRecorder))
        forwards = {recording.of(layer).forward for layer in model.layers}
        assert forwards == {fast_conformer.FastConformerBlock.forward}
    hidden(model)
    fastasr.restore(model)
    assert all("forward" not in vars(m) for m in model.modules())
