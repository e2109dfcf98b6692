# SPDX-License-Identifier: Apache-2.0
"""transformers' Parakeet encoder (sdpa) and its front end: as shipped, under torch.compile, and swapped. They run
forward and, at the first shape, a training step with the encoder's own dropout (0.1 everywhere, no dropped layers).
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
    UPSTREAM,
    Run,
    benchmark,
    inference,
    swapped,
    weighted_step,
)
from fastasr.benchmarks.rows import Row
from fastasr.testing.speed import Case

NAME = "fast_conformer"
ENCODER, FRONT_END = "encoder", "front end"
# width and feed-forward width of Parakeet's 110M and 0.6B models, with fewer layers
SIZES = {"110M": (512, 2048), "0.6B": (1024, 4096), "tiny": (32, 64)}
# size, layers, sequences, seconds of audio (100 frames each, 8 to a frame of the encoder)
GROWTH = ("110M", 2, 1)  # benchmarks.studies.curves draws these over the length
SHAPES = (
    ("110M", 6, 4, 16),
    ("0.6B", 4, 1, 30),
    ("110M", 6, 1, 120),
    *((*GROWTH, seconds) for seconds in (15, 30, 60, 120, 300, 600)),
)
QUICK = {"shapes": (("tiny", 1, 2, 2),)}


def shape_name(size: str, layers: int, batch: int, seconds: int) -> str:
    return f"{size}, {layers} of its layers, {batch} x {seconds} s"


def encoder(size: str, layers: int) -> torch.nn.Module:
    """Returns upstream's encoder with random parameters, in eval mode. Raises ``upstream.MissingUpstream``."""
    transformers = upstream.module("transformers")
    torch.manual_seed(0)
    return transformers.ParakeetEncoder(
        transformers.ParakeetEncoderConfig(**encoder_config(size, layers))
    ).eval()


def encoder_config(size: str, layers: int) -> dict:
    """Returns the arguments of transformers' ``ParakeetEncoderConfig``."""
    width, hidden = SIZES[size]
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_mel_bins": 80,
        "subsampling_conv_channels": 16 if size == "tiny" else 256,
        "layerdrop": 0.0,
    }


def batch_of(batch: int, seconds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns features and mask of sequences of 100 % to 80 % of the length."""
    frames = 100 * seconds + 1
    generator = torch.Generator().manual_seed(1)
    lengths = torch.linspace(frames, 0.8 * frames, batch).long()
    mask = (torch.arange(frames) < lengths[:, None]).long()
    return torch.randn(batch, frames, 80, generator=generator), mask


def sized(frames: int, batch: int) -> Case:
    shape = f"110M, 2 of its layers, {batch}x{frames}x80"
    return unit.sized(NAME, shape, lambda: encoder("110M", 2), torch.randn(batch, frames, 80))


@benchmark(NAME)
def measure(run: Run, *, shapes: tuple = SHAPES) -> Iterator[list[Row]]:
    """Yields the rows of the encoder at each shape and of the front end at the first."""
    for size, layers, batch, seconds in shapes:
        name = shape_name(size, layers, batch, seconds)
        cases = [(ENCODER, FORWARD)]
        if (size, layers, batch, seconds) == shapes[0]:
            cases += [(FRONT_END, FORWARD), (ENCODER, BOTH)]
        for case, pass_ in cases:
            if run.skip(case, name, pass_):
                continue
            shipped = encoder(size, layers)
            shipped = shipped if case == ENCODER else shipped.subsampling
            models = {UPSTREAM: shipped, FASTASR: swapped(shipped)}
            if run.compile_model and (size, layers, batch) != GROWTH:  # each length compiles for a minute
                models[COMPILE] = torch.compile(copy.deepcopy(shipped))
            inputs = batch_of(batch, seconds)
            if pass_ == BOTH:
                with torch.no_grad():
                    weight = torch.randn_like(shipped(*inputs)[0])
                runs = {key: weighted_step(model.train(), weight, *inputs) for key, model in models.items()}
            else:
                runs = {key: inference(model, *inputs) for key, model in models.items()}
            # A call on a long recording takes seconds: three rounds tell as much as fifteen of a short one.
            yield run.unit(case, pass_, name, runs, reps=None if batch * seconds < 120 else 3)
