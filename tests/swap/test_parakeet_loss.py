# SPDX-License-Identifier: Apache-2.0
"""The loss of transformers' Parakeet, swapped: without logits, with upstream's values and gradients."""

import pytest
import torch
from tiny_parakeet import SIZES, transducer

import fastasr
import fastasr.compat.torchaudio

SMALL = SIZES | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def parakeet(kind: str, **options):
    return transducer(kind, SMALL, **options).eval()


def batch(pad: int):
    lengths, symbols = torch.tensor([90, 61, 75]), torch.tensor([4, 2, 3])
    labels = torch.randint(1, 11, (3, 4)).masked_fill(torch.arange(4) >= symbols[:, None], pad)
    mask = (torch.arange(90) < lengths[:, None]).long()
    contexts = torch.nn.functional.pad(labels, (1, 0), value=11)
    features = torch.randn(3, 90, SMALL["num_mel_bins"])
    return {
        "input_features": features,
        "attention_mask": mask,
        "decoder_input_ids": contexts,
        "labels": labels,
    }


@pytest.fixture
def model(request):
    fastasr.compat.torchaudio.install()  # upstream's RNN-T loss needs a torchaudio
    yield parakeet(request.param)
    fastasr.compat.torchaudio.uninstall()


@pytest.mark.parametrize("model", ["RNNT", "TDT"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "mean_batch"}], ids=str)
def test_loss_and_gradients_are_upstreams(model, options):
    inputs = batch(model.config.pad_token_id) | options
    if hasattr(model.config, "durations"):
        inputs["sigma"] = 0.03

    def both():
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
        return output, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, gradients = both()
    report = fastasr.accelerate(model, only=[type(model)])
    assert [row.path for row in report.replaced] == [""], str(report)
    found, ours = both()
    assert expected.logits.dim() == 4
    assert found.logits is None
    assert type(found) is type(expected)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-6)
    fastasr.restore(model)
    assert model(**inputs).logits is not None


@pytest.mark.parametrize("model", ["RNNT", "TDT"], indirect=True)
def test_what_goes_upstreams_way(model):
    inputs = batch(model.config.pad_token_id)
    expected = model(**inputs)
    fastasr.accelerate(model, only=[type(model)])
    without = {name: value for name, value in inputs.items() if name != "labels"}
    torch.testing.assert_close(model(**without).logits, expected.logits)
    assert len(model(**inputs, return_dict=False)) == len(expected.to_tuple())
    handle = model.joint.register_forward_hook(lambda *_: None)
    assert model(**inputs).logits is not None
    handle.remove()
    assert model(**inputs).logits is None
    with pytest.raises(AttributeError):  # the lengths come from the mask
        model(**{name: value for name, value in inputs.items() if name != "attention_mask"})
    fastasr.restore(model)


@pytest.mark.parametrize("model", ["RNNT", "TDT"], indirect=True)
def test_verify(model):
    fastasr.accelerate(model, only=[type(model)])
    report = fastasr.verify(model, batch(model.config.pad_token_id))
    assert not report.rolled_back, str(report)
