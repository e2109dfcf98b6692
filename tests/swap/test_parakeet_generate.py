# SPDX-License-Identifier: Apache-2.0
"""``generate`` of transformers' Parakeet, swapped: the same sequences and durations as upstream's, random tiny models
by the hundred, and what goes upstream's way.
"""

import copy
import random

import pytest
import torch
from steps import seeded
from tiny_parakeet import SIZES

pytest.importorskip("transformers")

import transformers

import fastasr
from fastasr.models.transducer.label_looping import LabelLooping

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
SMALL = SIZES | {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def parakeet(tokens=12, durations=(0, 1, 2, 3, 4), layers=2, hidden=9, **options):
    """Returns a ParakeetForTDT, without durations a ParakeetForRNNT, as the converter of checkpoints leaves it."""
    kind = "RNNT" if durations is None else "TDT"
    more = {} if durations is None else {"durations": list(durations)}
    config = getattr(transformers, f"Parakeet{kind}Config")(
        vocab_size=tokens,
        decoder_hidden_size=hidden,
        num_decoder_layers=layers,
        blank_token_id=tokens - 1,
        pad_token_id=0,
        encoder_config={**SMALL, "scale_input": False},
        **more,
        **options,
    )
    model = getattr(transformers, f"ParakeetFor{kind}")(config).eval()
    model.generation_config.decoder_start_token_id = tokens - 1
    if durations is not None:
        model.generation_config.suppress_tokens = list(range(tokens, tokens + len(durations)))
    with torch.no_grad():
        for parameter in [*model.decoder.parameters(), *model.joint.parameters()]:
            parameter.normal_(std=0.8)
        model.encoder_projector.weight.normal_(std=2.0)
        model.joint.head.bias[tokens - 1] += random.uniform(0, 3)
    return model


def batch(batch_size=3, frames=70, masked=True):
    lengths = torch.randint(1, frames + 1, (batch_size,))
    lengths[random.randrange(batch_size)] = frames
    mask = (torch.arange(frames) < lengths[:, None]).long()
    features = 2 * torch.randn(batch_size, frames, SMALL["num_mel_bins"])
    return {"input_features": features} | ({"attention_mask": mask} if masked else {})


def only_generate(model):
    """Swaps ``generate`` alone: the encoder's kernels round differently."""
    report = fastasr.accelerate(model, only=[type(model)])
    assert [row.path for row in report.replaced] == [""], str(report)
    return report


@pytest.fixture
def native(monkeypatch):
    """Returns a list with an entry for each call of the native search."""
    calls, search = [], LabelLooping.search

    def counted(self, *arguments):
        assert not self.why_not
        calls.append(arguments)
        return search(self, *arguments)

    monkeypatch.setattr(LabelLooping, "search", counted)
    return calls


def same(model, inputs, **options):
    """Asserts that both ways give the same, and returns the output."""
    expected = type(model).generate(model, **inputs, **options)
    found = model.generate(**inputs, **options)
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.durations, expected.durations)
    assert found.sequences.dtype == expected.sequences.dtype
    assert found.durations.dtype == expected.durations.dtype
    assert not {"_encoder_finished", "_symbols_at_frame", "_step_durations"} & set(vars(model))
    return found


def rounding_decides(model, inputs, **options):
    """Says whether upstream's own sequences change from float32 to float64: two logits are nearly equal."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    narrow = type(model).generate(model, **inputs, **options)
    found = type(model).generate(copy.deepcopy(model).double(), **wide, **options)
    return not torch.equal(narrow.sequences, found.sequences)


def drawn(count, suppressed=True):
    """Compares ``count`` drawn models. Returns the lengths of the sequences. A model whose durations are not
    ``suppressed`` has small logits of them."""
    found, undecided = [], 0
    for _ in range(count):
        durations = random.choice(
            [None, None, (0, 1, 2, 3, 4), (0, 1, 2), (0,), (0, 1), (4, 0, 1), (0, 1, 2, 4, 8), (1, 2)]
        )
        sizes = {
            "tokens": random.randint(2, 40),
            "layers": random.randint(1, 3),
            "hidden": random.randint(1, 20),
        }
        model = parakeet(
            durations=durations,
            **sizes,
            max_symbols_per_step=random.choice([2, 3, 10]),
            hidden_act=random.choice(["relu", "tanh"]),
        )
        if durations is not None and not suppressed:
            model.generation_config.suppress_tokens = None
            with torch.no_grad():
                model.joint.head.bias[sizes["tokens"] :] -= 200
        inputs = batch(random.randint(1, 5), random.randint(9, 90), random.random() < 0.8)
        options = {} if random.random() < 0.7 else {"max_new_tokens": random.randint(1, 12)}
        only_generate(model)
        try:
            found.append(same(model, inputs, **options).sequences.shape[1])
        except AssertionError:
            if not rounding_decides(model, inputs, **options):
                raise
            undecided += 1
    assert undecided <= 1 + count // 250
    return found


@pytest.mark.parametrize("seed", range(6))
def test_drawn_models(seed, native):
    seeded(seed)
    lengths = drawn(20)
    assert len(native) == 20
    assert max(lengths) > 5


@pytest.mark.parametrize("seed", range(3))
def test_drawn_models_that_suppress_no_durations(seed, native):
    seeded(50 + seed)
    assert max(drawn(15, suppressed=False)) > 5
    assert len(native) == 15


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_ten_thousand_drawn_models(seed):
    seeded(100 + seed)
    drawn(500)


@pytest.mark.parametrize("durations", [None, (0, 1, 2, 3, 4)], ids=["RNN-T", "TDT"])
def test_swap_verify_and_restore(durations, native):
    seeded(3)
    model, inputs = parakeet(durations=durations), batch()
    before = copy.deepcopy(model)
    report = fastasr.accelerate(model, verify=lambda m: m.generate(**inputs))
    assert report.ok, str(report)
    (row,) = [row for row in report.rows if row.path == ""]
    assert row.status == "replaced", str(report)
    assert "generate runs natively" in row.reason
    native.clear()
    model.generate(**inputs)
    assert len(native) == 1
    labels = torch.tensor([[1, 2], [3, 1], [2, 2]])
    if durations is not None:
        ids = torch.cat((torch.full((3, 1), 11), labels), 1)
        losses = [m(**inputs, decoder_input_ids=ids, labels=labels).loss.item() for m in (before, model)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    fastasr.restore(model)
    assert "generate" not in vars(model)
    native.clear()
    same(model, inputs)
    assert not native


def test_the_weights_of_now_are_used(native):
    """A change of a parameter is seen at the next call."""
    seeded(4)
    model, inputs = parakeet(), batch()
    only_generate(model)
    for change in (model.joint.head.bias, model.decoder.lstm.weight_hh_l1, model.decoder.embedding.weight):
        with torch.no_grad():
            change.add_(torch.randn(change.shape))
        same(model, inputs)
    model.load_state_dict(parakeet().state_dict())
    same(model, inputs)
    assert len(native) == 4


def test_what_ends_with_a_length_of_zero(native):
    seeded(5)
    model, inputs = parakeet(), batch(2, 30)
    only_generate(model)
    inputs["attention_mask"][0] = 0
    same(model, inputs)
    assert len(native) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"max_time": 100.0},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_goes_upstreams_way(options, native):
    """``test_ways_back.py`` has the options for which ``fastasr.why`` names a reason."""
    seeded(6)
    model, inputs = parakeet(), batch()
    only_generate(model)
    try:
        same(model, inputs, **options)
    except Exception as failure:  # upstream's own, which the swapped model must raise too
        with pytest.raises(type(failure)):
            model.generate(**inputs, **options)
    assert not native


def test_autocast_is_not_served(native):
    try:
        with torch.autocast("cpu"), torch.no_grad():
            torch.nn.LSTM(8, 8)(torch.zeros(1, 1, 8))
    except RuntimeError as reason:  # oneDNN has no such LSTM without AVX-512
        pytest.skip(f"torch has no LSTM in bfloat16 here: {reason}")
    seeded(8)
    model = parakeet()
    only_generate(model)
    with torch.autocast("cpu"):
        same(model, batch())
    assert not native


def test_errors_are_upstreams():
    seeded(9)
    model, inputs = parakeet(), batch()
    only_generate(model)
    for options, message in (({"do_sample": True}, "only supports"), ({"num_beams": 2}, "only supports")):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, **options)
    model.generation_config.suppress_tokens = None
    expected = None
    try:
        type(model).generate(model, **inputs)
    except IndexError as failure:  # a duration's index read as a token
        expected = failure
    if expected is not None:
        with pytest.raises(IndexError):
            model.generate(**inputs)
