# SPDX-License-Identifier: Apache-2.0
"""The models of the recipe: causal Zipformers with a transducer and CTC, ours or the PyPI package's."""

import torch

from fastasr.models import zipformer

CHUNK, LEFT_CONTEXT = 16, 64  # frames of 20 ms when streaming: 0.32 s, and 1.28 s before it
_COMMON = {
    "query_head_dim": "16",
    "pos_head_dim": "4",
    "value_head_dim": "12",
    "pos_dim": 32,
    "causal": True,
    "use_ctc": True,
    "context_size": 2,
}
SIZES = {
    "tiny": {  # for tests: seconds
        **_COMMON,
        "downsampling_factor": "1,2",
        "encoder_dim": "24,32",
        "num_encoder_layers": "1,1",
        "encoder_unmasked_dim": "24,24",
        "num_heads": "2,2",
        "feedforward_dim": "32,48",
        "cnn_module_kernel": "9,9",
        "decoder_dim": 32,
        "joiner_dim": 48,
    },
    "small": {  # 2 million parameters: learns 25 minutes of speech on two cores
        **_COMMON,
        "downsampling_factor": "1,2,4,2",
        "encoder_dim": "96,128,160,128",
        "num_encoder_layers": "1,1,2,1",
        "encoder_unmasked_dim": "96,96,128,96",
        "num_heads": "4,4,4,4",
        "feedforward_dim": "192,256,384,256",
        "cnn_module_kernel": "15,15,9,15",
        "decoder_dim": 128,
        "joiner_dim": 192,
    },
}


def config(size, vocabulary, bins, chunk_size="16,32,-1", left_context_frames="64,128,-1"):
    """Arguments of AsrModel."""
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    return {
        **SIZES[size],
        "vocab_size": vocabulary,
        "feature_dim": bins,
        "chunk_size": chunk_size,
        "left_context_frames": left_context_frames,
    }


def streaming(arguments):
    """The arguments of the same model with the one chunk size that it streams with."""
    return {**arguments, "chunk_size": str(CHUNK), "left_context_frames": str(LEFT_CONTEXT)}


def build(arguments, upstream=False):
    """A model of ours, or of the PyPI package with the same parameters."""
    if not upstream:
        return zipformer.AsrModel(**arguments)
    try:
        from zipformer.modules.model import AsrModel
    except ImportError as error:
        raise ValueError(f"--upstream needs the package zipformer: {error}") from None
    return AsrModel(**arguments)


def without_regularisers(model):
    """Nothing random is left of a training step: no dropout, no skipping, no balancers, no whitening."""
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Balancer":
            vars(module)["_modules"].pop("prob", None)  # a schedule
            module.prob = 0.0
        elif type(module).__name__ == "Whiten":
            module.grad_scale = 0.0
    encoder = model.encoder
    encoder.chunk_size, encoder.left_context_frames = (-1,), (-1,)
    return model


def parameters_of(model):
    return sum(p.numel() for p in model.parameters())


def on(device):
    """A torch device; ValueError when there is none of the kind."""
    made = torch.device(device)
    if made.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"there is no CUDA device for --device {device}")
    return made
