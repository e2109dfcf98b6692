# SPDX-License-Identifier: Apache-2.0
"""transformers' Nemotron streaming encoder, one stream chunk by chunk with full caches: shipped, swapped, and swapped
with weights of fewer bits. A chunk has one frame of the encoder (80 ms) more than its look-ahead.

A chunk of few frames cannot be faster than reading the float32 weights once, or than their products: the larger of the
two is the limit. It leaves out the projection of positions, which are the same in every chunk.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from fastasr.benchmarks import limits, upstream
from fastasr.benchmarks.harness import Variant
from fastasr.benchmarks.markdown import by_machine
from fastasr.benchmarks.models.unit import (
    BF16,
    FASTASR,
    FORWARD,
    INT8,
    UPSTREAM,
    Run,
    benchmark,
    inference,
    product_limit,
    reduced,
    swapped,
)
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import Unit, duration, percent, times

NAME = "nemotron_streaming"
CASE = "encoder, a chunk of one stream"
# width and feed-forward width of Nemotron's 0.6B model, with fewer layers, and of a miniature
SIZES = {"0.6B": (1024, 4096), "tiny": (32, 64)}
READING = "weights read once at"
LEFT = 70  # A chunk sees this many frames before it.
SHAPES = tuple(("0.6B", 4, look_ahead) for look_ahead in (13, 6, 1, 0))  # size, layers, look-ahead
QUICK = {"shapes": (("tiny", 1, 6),)}


def encoder(size: str, layers: int) -> torch.nn.Module:
    """Returns upstream's encoder with random parameters, in eval mode. Raises ``upstream.MissingUpstream``."""
    nemotron = upstream.module(
        "transformers.models.nemotron_asr_streaming.configuration_nemotron_asr_streaming"
    )
    width, hidden = SIZES[size]
    torch.manual_seed(0)
    config = nemotron.NemotronAsrStreamingEncoderConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        subsampling_conv_channels=16 if size == "tiny" else 256,
        sliding_window=LEFT + 1,
    )
    return upstream.module("transformers").NemotronAsrStreamingEncoder(config).eval()


def chunk(model: torch.nn.Module, look_ahead: int) -> Callable[[], object]:
    """Returns the call of the next chunk of a stream whose caches are full."""
    size = 8 * (look_ahead + 1)
    x = torch.randn(1, size, 80, generator=torch.Generator().manual_seed(1))
    options = {"num_lookahead_tokens": look_ahead, "use_cache": True}

    def call(x: torch.Tensor) -> torch.Tensor:
        out = model(x, **options)
        name = "cache" if "cache" in out else "past_key_values"  # before transformers 5.24
        options.update({name: out[name]}, padding_cache=out.padding_cache)
        return out.last_hidden_state

    with torch.no_grad():
        call(x[:, : size - 7])
        for _ in range(LEFT // (look_ahead + 1) + 1):
            call(x)
    return inference(call, x)


def cost(model: torch.nn.Module, frames: int) -> tuple[int, int]:
    """Returns the bytes of the weights that a chunk of ``frames`` reads, and the operations of their products."""
    weights = {n: p for n, p in model.named_parameters() if "relative_k_proj" not in n}
    products = sum(p.numel() for n, p in weights.items() if n.startswith("layers.") and p.dim() > 1)
    return sum(p.nbytes for p in weights.values()), 2 * frames * products


@benchmark(NAME)
def measure(run: Run, *, shapes: tuple = SHAPES) -> Iterator[list[Row]]:
    """Yields the rows of a chunk of each look-ahead."""
    for size, layers, look_ahead in shapes:
        name = f"{size}, {layers} of its layers, look-ahead {look_ahead}"
        if run.skip(CASE, name, FORWARD):
            continue
        shipped = encoder(size, layers)
        models = {UPSTREAM: shipped, FASTASR: swapped(shipped)}
        models |= {BF16: reduced(shipped, "bf16"), INT8: reduced(shipped, "int8")}
        run.report(f"{NAME}: {name}")
        variants = {key: Variant(chunk(model, look_ahead)) for key, model in models.items() if model}
        moved, flops = cost(shipped, look_ahead + 1)
        rate = limits.read_bytes_per_second()
        limit = max((moved / rate, f"{READING} {rate / 1e9:.1f} GB/s"), product_limit(flops))
        fields = {"case": CASE, "shape": name, "pass_": FORWARD, "bytes": moved}
        yield run.rows(variants, flops, limit, reps=run.reps or run.settings.reps, **fields)


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table: a look-ahead per line, its milliseconds by format of the weights, how many times faster
    float32 is than upstream, and the limit's share of its time and of upstream's."""
    figures = "upstream | float32 | bf16 | int8 | float32 × upstream | limit's share of float32 | of upstream"
    return by_machine(rows, "look-ahead", figures, _line)


def _line(unit: Unit) -> list[list[str]]:
    cells = [duration(unit.median(name)) for name in (UPSTREAM, FASTASR, BF16, INT8)]
    found = (unit.row(name) for name in (FASTASR, UPSTREAM))
    shares = [percent(row.fraction_of_limit if row.bytes else None) for row in found if row]
    return [[unit.first.shape, *cells, times(unit.ratio(UPSTREAM)), *shares]]
