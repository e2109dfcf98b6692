# SPDX-License-Identifier: Apache-2.0
"""The models of the recipe: causal Zipformers, Emformers and E-Branchformers with a transducer and CTC. The encoder is
ours or an upstream package's."""

from typing import Any

import torch

from fastasr.asr import recogniser
from fastasr.asr.recipe.transducers import TRANSDUCERS

ZIPFORMER = "zipformer"
ENCODERS = (ZIPFORMER, *TRANSDUCERS)
CHUNK, LEFT_CONTEXT = 16, 64  # frames of 20 ms when streaming: 0.32 s, and the 1.28 s before it
_COMMON = {
    "query_head_dim": "16",
    "pos_head_dim": "4",
    "value_head_dim": "12",
    "pos_dim": 32,
    "causal": True,
    "use_ctc": True,
}
_ZIPFORMERS = {
    "tiny": {  # for tests; it trains in seconds
        **_COMMON,
        "downsampling_factor": "1,2",
        "encoder_dim": "24,32",
        "num_encoder_layers": "1,1",
        "encoder_unmasked_dim": "24,24",
        "num_heads": "2,2",
        "feedforward_dim": "32,48",
        "cnn_module_kernel": "9,9",
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
    },
}

_EMFORMERS = {
    "tiny": {
        "front_dim": 16,
        "num_heads": 2,
        "ffn_dim": 48,
        "num_layers": 2,
        "segment_length": 4,
        "left_context_length": 8,
        "right_context_length": 1,
    },
    "small": {
        "front_dim": 80,
        "num_heads": 4,
        "ffn_dim": 480,
        "num_layers": 6,
        "segment_length": 8,  # 0.32 s after 1.28 s, as the Zipformer streams, and 0.08 s ahead
        "left_context_length": 32,
        "right_context_length": 2,
    },
}
_E_BRANCHFORMERS = {
    "tiny": {
        "output_size": 24,
        "attention_heads": 2,
        "cgmlp_linear_units": 64,
        "cgmlp_conv_kernel": 7,
        "linear_units": 48,
        "num_blocks": 2,
    },
    "small": {
        "output_size": 128,
        "attention_heads": 4,
        "cgmlp_linear_units": 512,
        "cgmlp_conv_kernel": 15,
        "linear_units": 384,
        "num_blocks": 5,
    },
}
_TRANSDUCERS = {
    "tiny": {"decoder_dim": 32, "joiner_dim": 48, "context_size": 2},
    "small": {"decoder_dim": 128, "joiner_dim": 192, "context_size": 2},
}
SIZES = {
    encoder: {size: arguments | _TRANSDUCERS[size] for size, arguments in sizes.items()}
    for encoder, sizes in (
        (ZIPFORMER, _ZIPFORMERS),
        ("emformer", _EMFORMERS),
        ("e_branchformer", _E_BRANCHFORMERS),
    )
}


def config(
    size: str,
    vocabulary: int,
    bins: int,
    chunk_size: str = "16,32,-1",
    left_context_frames: str = "64,128,-1",
    encoder: str = ZIPFORMER,
) -> dict[str, Any]:
    """Returns the arguments of ``build``. chunk_size and left_context_frames apply to the Zipformer only."""
    if encoder not in SIZES:
        raise ValueError(f"encoder must be one of {', '.join(SIZES)}, got {encoder!r}")
    if size not in SIZES[encoder]:
        raise ValueError(f"size must be one of {', '.join(SIZES[encoder])}, got {size!r}")
    arguments = {**SIZES[encoder][size], "vocab_size": vocabulary, "feature_dim": bins}
    if encoder != ZIPFORMER:
        return {"encoder": encoder, **arguments}
    return {**arguments, "chunk_size": chunk_size, "left_context_frames": left_context_frames}


def encoder_of(arguments: dict[str, Any]) -> str:
    """Returns the name of the encoder that ``arguments`` describe."""
    return arguments.get("encoder", ZIPFORMER)


def streaming(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the same model with the single chunk size that it streams with."""
    if encoder_of(arguments) != ZIPFORMER:
        return arguments
    return {**arguments, "chunk_size": str(CHUNK), "left_context_frames": str(LEFT_CONTEXT)}


def build(arguments: dict[str, Any], upstream: bool = False) -> Any:
    """Returns our model, or one from an upstream package with the same parameters. The Zipformer is then entirely
    upstream's; of the other models only the encoder is.
    """
    if encoder_of(arguments) != ZIPFORMER:
        return _other(upstream, **arguments)
    if not upstream:
        return recogniser.AsrModel(**arguments)
    try:
        from zipformer.modules.model import AsrModel
    except ImportError as error:
        raise ValueError(f"--upstream needs the package zipformer: {error}") from None
    return AsrModel(**arguments)


def _other(upstream: bool, encoder: str, **arguments: Any) -> Any:
    model = TRANSDUCERS[encoder](**arguments)
    if upstream:
        try:
            model.encoder = model.upstream_encoder()
        except ImportError as error:
            raise ValueError(f"--upstream needs the package {model.PACKAGE}: {error}") from None
    return model


def without_regularisers(model: Any) -> torch.nn.Module:
    """Turns off dropout, skipping, balancers and whitening, so that a training step draws no random numbers."""
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Balancer":
            vars(module)["_modules"].pop("prob", None)  # a schedule
            module.prob = 0.0
        elif type(module).__name__ == "Whiten":
            module.grad_scale = 0.0
    encoder = model.encoder
    if hasattr(encoder, "left_context_frames"):  # only the Zipformer draws a chunk size
        encoder.chunk_size, encoder.left_context_frames = (-1,), (-1,)
    return model


def parameters_of(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on(device: torch.device | str) -> torch.device:
    """Returns a torch device. Raises ValueError if this machine has no such device."""
    made = torch.device(device)
    if made.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"there is no CUDA device for --device {device}")
    return made
