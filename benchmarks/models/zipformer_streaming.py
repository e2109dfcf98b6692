# SPDX-License-Identifier: Apache-2.0
"""One chunk of a streaming Zipformer-M, one stream, chunks of 16 and 32 frames (320 and 640 ms) with 128 frames of left
context: upstream as shipped, swapped. As upstream's own streaming wrapper does, the front end takes 13 frames more.
"""

from collections.abc import Callable, Iterator

import torch

from fastasr.asr.decoding.chunks import RIGHT_CONTEXT
from fastasr.benchmarks import upstream
from fastasr.benchmarks.models.unit import FASTASR, FORWARD, UPSTREAM, Run, benchmark, swapped
from fastasr.benchmarks.rows import Row

NAME = "zipformer_streaming"
CASE = "one chunk of {}"
CHUNKS = (16, 32)
LEFT_CONTEXT = 128
QUICK = {"size": "tiny", "chunks": (16,), "inner_compile": False}


def middle_of_a_stream(model: torch.nn.Module, chunk: int, streams: int = 1) -> Callable[[], torch.Tensor]:
    """Returns a call of a chunk of ``streams`` by the model's own code. It keeps no new state, so every call does the
    same.
    """
    encoder = model.encoder
    encoder.chunk_size = (chunk,)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(streams, 2 * chunk + RIGHT_CONTEXT, upstream.BINS, generator=generator)
    lengths = torch.full((streams,), x.shape[1])
    device = torch.device("cpu")
    states = [torch.randn(s.shape, generator=generator) for s in encoder.get_init_states(streams, device)]
    left_pad = model.encoder_embed.get_init_states(streams, device)
    mask = torch.zeros(streams, LEFT_CONTEXT + chunk, dtype=torch.bool)

    def run():
        with torch.no_grad():
            y, y_lengths, _ = model.encoder_embed.streaming_forward(
                x=x, x_lens=lengths, cached_left_pad=left_pad
            )
            return encoder.streaming_forward(
                x=y.permute(1, 0, 2), x_lens=y_lengths, states=states, src_key_padding_mask=mask
            )[0]

    return run


@benchmark(NAME)
def measure(
    run: Run, *, size: str = "medium", chunks: tuple[int, ...] = CHUNKS, inner_compile: bool = True
) -> Iterator[list[Row]]:
    """Yields the rows of a chunk of each size.

    ``inner_compile`` keeps upstream's activations compiled, as shipped. Raises ``upstream.MissingUpstream``.
    """
    shape = f"{size} 1 stream, left context {LEFT_CONTEXT}"
    options = {"causal": True, "chunk_size": chunks, "left_context_frames": (LEFT_CONTEXT,)}
    shipped = upstream.zipformer(size, inner_compile=inner_compile, **options)
    fast = swapped(shipped)
    for chunk in chunks:
        case = CASE.format(chunk)
        if not run.skip(case, shape, FORWARD):
            runs = {UPSTREAM: middle_of_a_stream(shipped, chunk), FASTASR: middle_of_a_stream(fast, chunk)}
            yield run.unit(case, FORWARD, shape, runs)
