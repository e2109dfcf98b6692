# SPDX-License-Identifier: Apache-2.0
"""transformers' Nemotron streaming encoder, one stream chunk by chunk with full caches: shipped and swapped. A chunk
has one frame of the encoder (80 ms) more than its look-ahead.
"""

from collections.abc import Callable, Iterator

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.models.unit import FASTASR, FORWARD, UPSTREAM, Run, benchmark, inference, swapped
from fastasr.benchmarks.rows import Row

NAME = "nemotron_streaming"
CASE = "encoder, a chunk of one stream"
# width and feed-forward width of Nemotron's 0.6B model, with fewer layers, and of a miniature
SIZES = {"0.6B": (1024, 4096), "tiny": (32, 64)}
LEFT = 70  # frames that a chunk sees before it
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
        options.update(past_key_values=out.past_key_values, padding_cache=out.padding_cache)
        return out.last_hidden_state

    with torch.no_grad():
        call(x[:, : size - 7])
        for _ in range(LEFT // (look_ahead + 1) + 1):
            call(x)
    return inference(call, x)


@benchmark(NAME)
def measure(run: Run, *, shapes: tuple = SHAPES) -> Iterator[list[Row]]:
    """Yields the rows of a chunk of each look-ahead."""
    for size, layers, look_ahead in shapes:
        name = f"{size}, {layers} of its layers, look-ahead {look_ahead}"
        if run.skip(CASE, name, FORWARD):
            continue
        shipped = encoder(size, layers)
        models = {UPSTREAM: shipped, FASTASR: swapped(shipped)}
        yield run.unit(CASE, FORWARD, name, {key: chunk(model, look_ahead) for key, model in models.items()})
