# SPDX-License-Identifier: Apache-2.0
"""Every product of a Zipformer that fastasr computes is reduced, whatever class its layer has."""

import pytest
import torch
from steps import moved, numbers, relative, seeded

from fastasr.models import zipformer
from fastasr.ops import _dispatch
from fastasr.swap import weights
from fastasr.swap.state import ModelState

pytestmark = pytest.mark.skipif(bool(_dispatch.why_not_native()), reason="the native library is not built")


def test_every_product_of_a_zipformer():
    """Linear layers that are no torch.nn.Linear, and the front end's pointwise convolutions, are reduced as well."""
    seeded(6)
    front = zipformer.Conv2dSubsampling(80, 64)
    encoder = zipformer.Zipformer(
        encoder_dim=(64,),
        encoder_unmasked_dim=(64,),
        num_encoder_layers=(1,),
        feedforward_dim=(96,),
        downsampling_factor=(1,),
        num_heads=(2,),
        cnn_module_kernel=(7,),
    )
    model = moved(torch.nn.ModuleDict({"front": front, "encoder": encoder}), 0.05).eval()
    lengths = torch.tensor([93, 70])

    features = torch.randn(2, 93, 80, generator=numbers(7))

    def run(model):
        x, frames = model["front"](features, lengths)
        return model["encoder"](x.transpose(0, 1), frames)[0]

    with torch.no_grad():
        exact = run(model)
        kept = weights.keep(model, "int8", lambda *_: True, run, 0.05, ModelState(model))
        error = relative(run(model), exact)
    rows = {row.path: row for row in kept.rows}
    layer = "encoder.encoders.0.layers.0"
    for path in ("feed_forward1.out_proj", "feed_forward3.out_proj", "conv_module2.out_proj"):
        assert rows[f"{layer}.{path}"].format == "int8"
        assert 0 < rows[f"{layer}.{path}"].error < 0.03
    for path in ("front.convnext.pointwise_conv1", "front.convnext.pointwise_conv2"):
        assert rows[path].format == "int8"
    assert 0 < error < 0.05
    weights.release(model)
    with torch.no_grad():
        assert torch.equal(run(model), exact)
