# SPDX-License-Identifier: Apache-2.0
"""The upstream packages that are measured beside fastasr, and the PyPI package ``zipformer``'s encoder as its recipes
build it, with random weights."""

import contextlib
import os
from collections.abc import Iterator

import torch

from fastasr.models.common.sequences import make_pad_mask
from fastasr.testing.peers import MissingUpstream, module

__all__ = ["MissingUpstream", "module"]

# Zipformer-M, the published medium configuration
MEDIUM = {
    "output_downsampling_factor": 2,
    "downsampling_factor": (1, 2, 4, 8, 4, 2),
    "num_encoder_layers": (2, 2, 3, 4, 3, 2),
    "encoder_dim": (192, 256, 384, 512, 384, 256),
    "encoder_unmasked_dim": (192, 192, 256, 256, 256, 192),
    "query_head_dim": (32,),
    "pos_head_dim": (4,),
    "value_head_dim": (12,),
    "pos_dim": 48,
    "num_heads": (4, 4, 4, 8, 4, 4),
    "feedforward_dim": (512, 768, 1024, 1536, 1024, 768),
    "cnn_module_kernel": (31, 31, 15, 15, 15, 31),
    "warmup_batches": 4000.0,
}
# The same structure in miniature, for smoke tests
TINY = {
    **MEDIUM,
    "downsampling_factor": (1, 2),
    "num_encoder_layers": (1, 1),
    "encoder_dim": (48, 64),
    "encoder_unmasked_dim": (32, 48),
    "query_head_dim": (8,),
    "num_heads": (2, 2),
    "feedforward_dim": (64, 96),
    "cnn_module_kernel": (15, 15),
    "pos_dim": 16,
}
SIZES = {"medium": MEDIUM, "tiny": TINY}
BINS = 80
# Steady state of the training schedules (dropout 0.1, low probabilities of the regularisers)
BATCH_COUNT = 20000.0


class Encoder(torch.nn.Module):
    """Upstream's front end and encoder, or the ones of ``package``: ``AsrModel.forward_encoder``.

    ``forward(x [B, T, 80], lengths [B])`` returns output ``[B, T', C]`` and its lengths.
    """

    def __init__(self, config: dict, package=None):
        super().__init__()
        scaling, subsampling, zipformer = (
            package or module(f"zipformer.modules.{name}") for name in ("scaling", "subsampling", "zipformer")
        )

        def dropout():
            return scaling.ScheduledFloat((0.0, 0.3), (20000.0, 0.1))

        self.encoder_embed = subsampling.Conv2dSubsampling(BINS, config["encoder_dim"][0], dropout=dropout())
        self.encoder = zipformer.Zipformer(**config, dropout=dropout())

    def forward(self, x: torch.Tensor, lengths: torch.Tensor):
        x, lengths = self.encoder_embed(x, lengths)
        padding = make_pad_mask(lengths, x.shape[1])
        x, lengths = self.encoder(x.permute(1, 0, 2), lengths, padding)
        return x.permute(1, 0, 2), lengths


@contextlib.contextmanager
def activations(compiled: bool) -> Iterator[None]:
    """Makes models inside with or without the ``torch.compile`` that upstream puts around its activations."""
    before = os.environ.get("K2_ONNX_EXPORT")
    if not compiled:
        os.environ["K2_ONNX_EXPORT"] = "1"  # upstream's own switch
    try:
        yield
    finally:
        if not compiled:
            os.environ.pop("K2_ONNX_EXPORT")
            if before is not None:
                os.environ["K2_ONNX_EXPORT"] = before


def zipformer(size: str = "medium", seed: int = 0, inner_compile: bool = True, **options) -> Encoder:
    """Returns upstream's encoder in evaluation mode, with random weights; ``options`` go to its constructor.

    ``inner_compile`` keeps the ``torch.compile`` that upstream puts around its activations. Raises ``MissingUpstream``.
    """
    torch.manual_seed(seed)
    with activations(compiled=inner_compile):
        model = Encoder({**SIZES[size], **options})
    return steady(model)


def recogniser(config: dict, seed: int = 0) -> torch.nn.Module:
    """Returns upstream's AsrModel in evaluation mode, with random weights. Raises ``MissingUpstream``."""
    model = module("zipformer.modules.model")
    torch.manual_seed(seed)
    return steady(model.AsrModel(**config))


def steady(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model in evaluation mode, with its schedules at their final values."""
    for part in model.modules():
        if hasattr(part, "batch_count"):
            part.batch_count = BATCH_COUNT
    return model.eval()


def drawing(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model, whose calls do not look at the memory in use to decide whether they draw random numbers."""
    for part in model.modules():
        if hasattr(part, "mem_cutoff"):
            part.mem_cutoff = _never
    return model


def _never(_: object) -> bool:
    return False


def distinct(model: torch.nn.Module, seed: int = 2) -> torch.nn.Module:
    """Returns the model with each parameter changed by a hundredth. Layers of a stack begin as copies of one: ONNX
    files would keep one of them, and onnxruntime's quantisation leaves weights that several products share in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))
    return model


SHORTEST = 16  # frames: upstream's front end refuses fewer than 15


def example(batch: int = 4, frames: int = 1600, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random features ``[batch, frames, 80]`` and lengths that differ by 8 frames, as a sampler batches
    them.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([max(SHORTEST, frames - 8 * i) for i in range(batch)])
    return torch.randn(batch, frames, BINS, generator=generator), lengths
