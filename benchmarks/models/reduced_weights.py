# SPDX-License-Identifier: Apache-2.0
"""Whole encoders in inference on weights of fewer bits: upstream, torch's dynamic quantisation of upstream, and the
swapped model in float32, bfloat16 and int8. The limit is the time of the float32 products.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.markdown import by_machine
from fastasr.benchmarks.models import fast_conformer
from fastasr.benchmarks.models.unit import (
    BF16,
    FASTASR,
    FORWARD,
    INT8,
    UPSTREAM,
    Run,
    benchmark,
    inference,
    reduced,
    swapped,
)
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import Unit, duration, times

NAME = "reduced_weights"
TORCH_INT8 = "torch int8"
# model, sequences, seconds of audio (100 frames each)
SHAPES = (("Zipformer-M", 4, 16), ("Zipformer-M", 1, 16), ("Parakeet 110M", 4, 16), ("Parakeet 0.6B", 1, 30))
LAYERS = {"110M": 6, "0.6B": 4, "tiny": 1}
QUICK = {"shapes": (("Zipformer-tiny", 1, 2), ("Parakeet tiny", 1, 2))}


def _model(name: str, batch: int, seconds: int) -> tuple[torch.nn.Module, tuple]:
    family, size = name.replace("Zipformer-", "Zipformer ").split()
    if family == "Parakeet":
        return fast_conformer.encoder(size, LAYERS[size]), fast_conformer.batch_of(batch, seconds)
    frames = 100 * seconds
    x = torch.randn(batch, frames, 80, generator=torch.Generator().manual_seed(1))
    model = upstream.zipformer("medium" if size == "M" else size, inner_compile=False)
    return model, (x, torch.full((batch,), frames))


def _quantised(model: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, but users have it.
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear})


@benchmark(NAME)
def measure(run: Run, *, shapes: tuple = SHAPES) -> Iterator[list[Row]]:
    """Yields the rows of each model and shape."""
    for name, batch, seconds in shapes:
        shape = f"{batch} x {seconds} s"
        if run.skip(name, shape, FORWARD):
            continue
        shipped, inputs = _model(name, batch, seconds)
        models = {UPSTREAM: shipped, FASTASR: swapped(shipped)}
        models |= {BF16: reduced(shipped, "bf16"), INT8: reduced(shipped, "int8")}
        try:
            models[TORCH_INT8] = _quantised(shipped)
            inference(models[TORCH_INT8], *inputs)()
        except Exception as error:
            run.report(f"{NAME}: {name}: {TORCH_INT8} left out: {type(error).__name__}: {error}")
            models.pop(TORCH_INT8, None)
        runs = {key: inference(model, *inputs) for key, model in models.items() if model is not None}
        yield run.unit(name, FORWARD, shape, runs)


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table: a model per line, its milliseconds by format, and how much faster than float32."""
    return by_machine(rows, "", "upstream | torch int8 | float32 | bf16 | int8 | int8 × float32", _line)


def _line(unit: Unit) -> list[list[str]]:
    medians = [unit.median(name) for name in (UPSTREAM, TORCH_INT8, FASTASR, BF16, INT8)]
    cells = [duration(median) if median else "–" for median in medians]
    gain = times(medians[2] / medians[4] if medians[2] and medians[4] else None)
    return [[f"{unit.first.case} ({unit.first.shape})", *cells, gain]]
