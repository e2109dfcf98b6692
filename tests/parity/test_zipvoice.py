# SPDX-License-Identifier: Apache-2.0
"""ZipVoice's decoder and encoders: values, gradients and draws are upstream's. FASTASR_ZIPVOICE: a checkout of
k2-fsa/ZipVoice, which is no package. Without it our layer is compared with upstream's formula."""

import copy
import os

import families
import pytest
import torch
from steps import moved, outcome, same, seeded

import fastasr
from fastasr.models.zipformer.layer import ZipformerEncoderLayer, timed_forward

needed = pytest.mark.skipif(
    "FASTASR_ZIPVOICE" not in os.environ, reason="FASTASR_ZIPVOICE names no checkout of ZipVoice"
)
MODELS = {
    "a time for each sequence": families.zipvoice(1),
    "a time for each frame": families.zipvoice(2),
    "no time": families.zipvoice(None),
    "no padding": families.zipvoice(1, padded=False),
    "no convolutions": families.zipvoice(None, use_conv=False),
    "no convolutions, a time": families.zipvoice(1, use_conv=False),
    "a stream of two": families.zipvoice(1, stream=((10, 20), 0)),
    "two streams": families.zipvoice(1, stream=((10, 20), 1)),
}


@needed
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step(name, training):
    seeded(name)
    theirs, call = MODELS[name]()
    moved(theirs, 0.05)
    ours = copy.deepcopy(theirs)
    replaced = {row.class_name for row in fastasr.accelerate(ours).replaced}
    assert replaced >= {"Zipformer2EncoderLayer", "RelPositionMultiheadAttentionWeights", "SelfAttention"}
    same(*(outcome(model, call, training) for model in (ours, theirs)), 2e-5, share=1.0)
    fastasr.restore(ours)
    with torch.no_grad():
        assert torch.equal(call(ours.eval())[0], call(theirs.eval())[0])


def formula(layer, src, pos_emb, time_emb, padding):
    """Upstream's layer in eval mode."""
    added = 0.0 if time_emb is None else time_emb
    weights = layer.self_attn_weights(src, pos_emb=pos_emb, key_padding_mask=padding)
    x = src + added
    x = x + layer.feed_forward1(x)
    x = x + layer.nonlin_attention(x, weights[0:1])
    x = x + layer.self_attn1(x, weights)
    x = x + added
    x = x + layer.conv_module1(x, src_key_padding_mask=padding)
    x = x + layer.feed_forward2(x)
    x = layer.bypass_mid(src, x)
    x = x + layer.self_attn2(x, weights)
    x = x + added
    x = x + layer.conv_module2(x, src_key_padding_mask=padding)
    x = x + layer.feed_forward3(x)
    return layer.bypass(src, layer.norm(x))


@pytest.mark.parametrize("shape", [None, (2, 32), (13, 2, 32)], ids=["none", "by sequence", "by frame"])
def test_the_formula(shape):
    seeded("formula")
    layer = moved(ZipformerEncoderLayer(32, 16, 4, 8, 4, 6, 48, cnn_module_kernel=7), 0.1).double().eval()
    layer.use_conv = True
    src, pos_emb = torch.randn(13, 2, 32, dtype=torch.float64), torch.randn(1, 25, 16, dtype=torch.float64)
    time_emb = None if shape is None else torch.randn(shape, dtype=torch.float64)
    padding = torch.arange(13) >= torch.tensor([[13], [9]])
    with torch.no_grad():
        found = timed_forward(layer, src, pos_emb, time_emb, src_key_padding_mask=padding)
        torch.testing.assert_close(found, formula(layer, src, pos_emb, time_emb, padding), rtol=0, atol=1e-9)
