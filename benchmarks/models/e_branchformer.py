# SPDX-License-Identifier: Apache-2.0
"""One layer of ESPnet's E-Branchformer (512 channels, 8 heads, cgMLP of 3072, 31 taps, two feed-forward blocks): four
padded sequences of 400 frames, forward and with gradients.

The implementations are upstream as shipped, upstream with only its linears replaced (how much of the gain is the
GEMM's), upstream under torch.compile, upstream swapped by ``accelerate``, and fastasr's own class. Dropout is off, as a
training step's random numbers are no part of the comparison.
"""

import copy
from collections.abc import Iterator

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.models import unit
from fastasr.benchmarks.models.unit import (
    BOTH,
    COMPILE,
    FASTASR,
    FORWARD,
    LINEAR,
    UPSTREAM,
    Run,
    benchmark,
    swapped,
)
from fastasr.benchmarks.rows import Row
from fastasr.models.e_branchformer.positional_encoding import relative_sinusoids

NAME = "e_branchformer"
LAYER, OWN = "layer", "fastasr own"
BATCH, FRAMES = 4, 400
SIZES = {
    "512": {"width": 512, "heads": 8, "linear_units": 1024, "cgmlp_linear_units": 3072, "kernel": 31},
    "tiny": {"width": 32, "heads": 2, "linear_units": 48, "cgmlp_linear_units": 64, "kernel": 7},
}
QUICK = {"size": "tiny", "batch": 2, "frames": 20}


def shape_name(size: str = "512", batch: int = BATCH, frames: int = FRAMES) -> str:
    return f"{size} {batch}x{frames}"


def layers(size: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Returns upstream's layer with random parameters, and fastasr's. Raises ``upstream.MissingUpstream``."""
    from fastasr.models.e_branchformer import EBranchformerLayer

    shipped = upstream.module("espnet2.asr.encoder.e_branchformer_encoder").EBranchformerEncoder
    torch.manual_seed(0)
    s = SIZES[size]
    sizes = {"linear_units": s["linear_units"], "cgmlp_linear_units": s["cgmlp_linear_units"]}
    sizes |= {
        "attention_heads": s["heads"],
        "cgmlp_conv_kernel": s["kernel"],
        "num_blocks": 1,
        "dropout_rate": 0.0,
    }
    kinds = {"input_layer": None, "use_ffn": True, "macaron_ffn": True}
    shipped = shipped(s["width"], s["width"], **sizes, **kinds).encoders[0]
    own = EBranchformerLayer(
        s["width"],
        ff_dim=s["linear_units"],
        dropout=0.0,
        num_heads=s["heads"],
        att_dropout=0.0,
        cgmlp_ff_dim=s["cgmlp_linear_units"] // 2,
        cgmlp_conv_kernel=s["kernel"],
    )
    own.load_state_dict(shipped.state_dict())
    return shipped, own


@benchmark(NAME)
def measure(run: Run, *, size: str = "512", batch: int = BATCH, frames: int = FRAMES) -> Iterator[list[Row]]:
    """Yields the rows of the layer in both passes. Raises ``upstream.MissingUpstream``."""
    name = shape_name(size, batch, frames)
    passes = [pass_ for pass_ in (FORWARD, BOTH) if not run.skip(LAYER, name, pass_)]
    if not passes:
        return
    shipped, own = layers(size)
    models = {UPSTREAM: shipped, LINEAR: copy.deepcopy(shipped), FASTASR: swapped(shipped), OWN: own}
    if run.compile_model:
        models[COMPILE] = copy.deepcopy(shipped)
    generator = torch.Generator().manual_seed(1)
    width = SIZES[size]["width"]
    x = torch.randn(batch, frames, width, generator=generator)
    lengths = torch.linspace(frames, 0.7 * frames, batch).long()
    mask = (torch.arange(frames) < lengths[:, None]).unsqueeze(1)
    positions = relative_sinusoids(frames, width)
    for pass_ in passes:
        given = (x.requires_grad_(pass_ == BOTH), positions), mask
        yield run.unit(LAYER, pass_, name, unit.runs_of(models, pass_, *given))
