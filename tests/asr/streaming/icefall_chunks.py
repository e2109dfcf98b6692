# SPDX-License-Identifier: Apache-2.0
"""This runs in a process of its own, since icefall's recipe gives its file the name of the PyPI package:

python icefall_chunks.py egs/librispeech/ASR/zipformer    # prints the largest error of a chunk
"""

import sys
import types

import torch

CHUNK, LEFT, BINS = 16, 64, 80


def recipe(folder):
    """Returns (Zipformer2, Conv2dSubsampling) of the folder, without k2 and the rest of icefall."""
    from fastasr.compat import k2

    utils = types.ModuleType("icefall.utils")
    utils.torch_autocast = lambda device="cuda", **options: torch.amp.autocast(device, **options)
    sys.modules |= {"k2": k2, "icefall": types.ModuleType("icefall"), "icefall.utils": utils}
    sys.path.insert(0, folder)
    from subsampling import Conv2dSubsampling
    from zipformer import Zipformer2

    return Zipformer2, Conv2dSubsampling


@torch.inference_mode()
def largest_error(folder):
    """Returns the largest difference of the engine's chunks from those of the recipe's own code."""
    from fastasr.asr.streaming import StreamingEncoder

    encoder_class, embed_class = recipe(folder)
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.encoder_embed = embed_class(BINS, 48)
    model.encoder = encoder_class(
        downsampling_factor=(1, 2),
        encoder_dim=(48, 64),
        num_encoder_layers=(1, 2),
        encoder_unmasked_dim=(32, 48),
        query_head_dim=(8,),
        value_head_dim=(6,),
        num_heads=(2, 2),
        feedforward_dim=(64, 96),
        cnn_module_kernel=(15, 15),
        pos_dim=16,
        causal=True,
        chunk_size=(CHUNK,),
        left_context_frames=(LEFT,),
    )
    engine = StreamingEncoder.from_model(model.eval(), CHUNK, LEFT, backend="native")
    stream = engine.open()
    layers = model.encoder.get_init_states(1)
    pad = model.encoder_embed.get_init_states(1)
    worst = 0.0
    for number in range(9):
        x = torch.randn(1, 2 * CHUNK + 13, BINS)
        y, lengths, pad = model.encoder_embed.streaming_forward(x, torch.tensor([x.shape[1]]), pad)
        unseen = torch.arange(LEFT + CHUNK)[None] < LEFT - CHUNK * number
        y, _, layers = model.encoder.streaming_forward(y.transpose(0, 1), lengths, layers, unseen)
        got = engine.step(x, [stream])[0]
        worst = max(worst, float((got - y.transpose(0, 1)).norm() / y.norm()))
    return worst


if __name__ == "__main__":
    print(largest_error(sys.argv[1]))
