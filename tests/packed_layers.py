# SPDX-License-Identifier: Apache-2.0
"""What the tests of layers that stream by one native call share."""

import torch
from steps import moved, seeded

import fastasr
from fastasr.models.zipformer import ZipformerEncoderLayer

LIMIT = 5e-6  # relative to the rms of each result, against float64


def assert_near(got, expected):
    assert len(got) == len(expected) == 7
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        if theirs.numel():
            assert ((ours.double() - theirs).norm() <= LIMIT * theirs.double().norm()).item()


def zipformer_layer(dim=20, kernel=7, causal=False, **changes):
    """Makes a layer in eval mode whose parameters are all random."""
    seeded(3)
    sizes = {
        "num_heads": 2,
        "query_head_dim": 6,
        "pos_head_dim": 3,
        "value_head_dim": 5,
        "feedforward_dim": 24,
    }
    sizes |= {"pos_dim": 8, "cnn_module_kernel": kernel, "causal": causal, **changes}
    return moved(ZipformerEncoderLayer(dim, **sizes), 0.1).eval()


def chunk_of(layer, frames=4, streams=2, left=6, masked=None):
    """Returns the arguments of a Zipformer layer's ``streaming_forward``."""
    weights, dim = layer.self_attn_weights, layer.embed_dim
    values, taps = layer.self_attn1.in_proj.out_features, layer.conv_module1.depthwise_conv.kernel_size
    shapes = [(left, streams, weights.num_heads * weights.query_head_dim), (1, streams, left, 3 * dim // 4)]
    shapes += [(left, streams, values)] * 2 + [(streams, dim, taps // 2)] * 2
    positions = torch.randn(1, left + 2 * frames - 1, weights.linear_pos.in_features)
    return torch.randn(frames, streams, dim), positions, *map(torch.randn, shapes), left, masked


def check_declined(layer, call, declined, run, hooked, trained, others):
    """Asserts where the native call leaves ``call`` to the submodules: with gradients, with a hook on the module
    ``hooked``, with ``trained`` in training mode, forced to eager, switched off, under autocast, and for ``others``.
    """
    assert declined(layer, call)  # gradients
    with torch.no_grad():
        assert not declined(layer, call)
        seen = []
        hook = hooked.register_forward_hook(lambda *a: seen.append(1))
        assert declined(layer, call)
        run()
        assert seen == [1]
        hook.remove()
        assert not declined(layer, call)
        trained.train()
        assert declined(layer, call)
        layer.eval()
        assert not declined(layer, call)
        with fastasr.backend("eager"):
            assert declined(layer, call)
        layer.packed_streaming = False
        assert declined(layer, call)
        layer.packed_streaming = True
        with torch.autocast("cpu", torch.bfloat16):
            assert declined(layer, call)
        for other in others:
            assert declined(layer, other)
