# SPDX-License-Identifier: Apache-2.0
"""This runs in a process of its own, since icefall's recipe gives its file the name of the PyPI package:

python ragged_icefall.py egs/librispeech/ASR/zipformer    # prints what runs on padding, and two largest differences
"""

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "asr" / "streaming"))
from icefall_chunks import recipe

LENGTHS = [60, 33, 1, 0, 17]


def differences(encoder_class, causal):
    """Returns the report's reasons for padding, and how far outputs and gradients of the swapped encoder without
    padding are from those of the recipe's code on each recording alone, relative to the largest."""
    import fastasr
    from fastasr.swap.replay import StayInFp64

    torch.manual_seed(0)
    chunks = {"causal": True, "chunk_size": (8,), "left_context_frames": (32,)} if causal else {}
    upstream = encoder_class(
        downsampling_factor=(1, 2),
        encoder_dim=(32, 48),
        num_encoder_layers=(1, 1),
        encoder_unmasked_dim=(24, 32),
        query_head_dim=(8,),
        value_head_dim=(6,),
        num_heads=(2, 2),
        feedforward_dim=(48, 64),
        cnn_module_kernel=(7, 7),
        pos_dim=16,
        **chunks,
    )
    upstream = upstream.double().eval()
    for module in upstream.modules():  # regularisers change gradients by what a whole batch holds
        if type(module).__name__ == "Balancer":
            del module.prob  # a schedule, which is a module
            module.prob = 0.0
        elif type(module).__name__ == "Whiten":
            module.grad_scale = 0.0
    ours = copy.deepcopy(upstream)
    report = fastasr.accelerate(ours, ragged=True)
    x = torch.randn(max(LENGTHS) + 3, len(LENGTHS), 32).double()
    lengths = torch.tensor(LENGTHS)
    found, counts = ours(x, lengths, torch.arange(len(x)) >= lengths[:, None])
    weight = torch.randn_like(found)
    expected = torch.zeros_like(found)
    for i, n in enumerate(LENGTHS):
        if n:
            expected[: counts[i], i] = upstream(x[:n, i : i + 1], lengths[i : i + 1])[0][:, 0]
    with StayInFp64():  # the recipe's softmax computes its gradient in float32
        gradients = [
            torch.autograd.grad((y * weight).sum(), list(model.parameters()), materialize_grads=True)
            for model, y in ((ours, found), (upstream, expected))
        ]
    largest = max(g.abs().max() for g in gradients[1])
    off = max((a - b).abs().max() for a, b in zip(*gradients, strict=True)) / largest
    return report.ragged, ((found - expected).abs().max() / expected.abs().max()).item(), off.item()


if __name__ == "__main__":
    encoder_class, _ = recipe(sys.argv[1])
    results = [differences(encoder_class, causal) for causal in (False, True)]
    print([reasons for reasons, _, _ in results])
    print(max(value for _, value, _ in results), max(gradient for _, _, gradient in results))
