# SPDX-License-Identifier: Apache-2.0
"""ESPnet's attention without positions in a decoder and with every kind of mask. ``test_other_conformers.py`` has the
encoders."""

import copy

import families
import pytest
import torch
from steps import close, moved, outcome, same, seeded

import fastasr

attention = pytest.importorskip("espnet.nets.pytorch_backend.transformer.attention")
B, T, WIDTH = 3, 11, families.WIDTH


def pair(theirs):
    theirs = moved(theirs, 0.1).double().eval()
    ours = copy.deepcopy(theirs)
    assert "MultiHeadedAttention" in {row.class_name for row in fastasr.accelerate(ours).replaced}
    return ours, theirs


def masks():
    lengths = torch.arange(T) < torch.tensor([T, 6, 0])[:, None]
    pairs = lengths[:, None] & torch.ones(T, T, dtype=torch.bool).tril()
    return {
        "none": None,
        "keys": lengths[:, None],
        "keys of all": lengths[1:2, None],
        "pairs": pairs,
        "pairs of all": pairs[1:2],
        "numbers": lengths[:, None].double(),
    }


@pytest.mark.parametrize("options", [{}, {"use_sdpa": True}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("kind", masks())
def test_masks(kind, options):
    """``use_sdpa`` adds a mask of numbers to the scores."""
    seeded("masks")
    models = pair(attention.MultiHeadedAttention(families.HEADS, WIDTH, 0.0, **options))
    x, mask = torch.randn(B, T, WIDTH, dtype=torch.float64), masks()[kind]
    same(*(outcome(m, lambda m: [m(x, x, x, mask)], False) for m in models), 1e-10, share=1.0)
    left = fastasr.why(models[0]).to_dict()
    assert bool(left) == (kind == "numbers" and "use_sdpa" in options), left


def test_a_decoder():
    """Training, and steps with a cache, whose queries are the last frame alone."""
    module = pytest.importorskip("espnet2.asr.decoder.transformer_decoder")
    seeded("decoder")
    sizes = {"attention_heads": families.HEADS, "linear_units": families.HIDDEN, "num_blocks": 2}
    ours, theirs = pair(module.TransformerDecoder(7, WIDTH, **sizes))
    memory = torch.randn(B, T, WIDTH, dtype=torch.float64)
    labels = torch.randint(1, 7, (B, 5))
    lengths = torch.tensor([T, 6, 2]), torch.tensor([5, 4, 1])

    def run(model):
        return [model(memory, lengths[0], labels, lengths[1])[0]]

    with fastasr.upstream_draws():
        same(*(outcome(m, run, True) for m in (ours, theirs)), 1e-10, share=1.0)
    found = []
    for model in (ours.eval(), theirs.eval()):
        cache, scores = None, []
        with torch.no_grad():
            for length in range(1, 5):
                mask = torch.ones(1, length, length, dtype=torch.bool).tril()
                y, cache = model.forward_one_step(labels[:, :length], mask, memory, cache=cache)
                scores.append(y)
        found.append(torch.cat(scores))
    close(*found, 1e-10)
    assert theirs.decoders[0].src_attn.attn is not None
    close(ours.decoders[0].src_attn.attn, theirs.decoders[0].src_attn.attn, 1e-10)
