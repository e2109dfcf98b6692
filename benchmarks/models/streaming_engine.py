# SPDX-License-Identifier: Apache-2.0
"""One chunk of a streaming Zipformer-M through the streaming engine, and by upstream's code as shipped: one stream and
several at a time, in the middle of the streams. The engine works on torch's number of threads.
"""

from collections.abc import Callable, Iterator

import torch

from fastasr.benchmarks import upstream
from fastasr.benchmarks.case import Report, Settings
from fastasr.benchmarks.models.unit import FASTASR, FORWARD, UPSTREAM, measure_unit
from fastasr.benchmarks.models.zipformer_streaming import CHUNKS, LEFT_CONTEXT, PADDING, middle_of_a_stream
from fastasr.benchmarks.rows import Row

NAME = "streaming_engine"
CASE = "one chunk of {}"
STREAMS = (1, 8)


def _engine(model: torch.nn.Module, chunk: int, streams: int) -> Callable[[], torch.Tensor]:
    """A call behind as many chunks as fill the left context; its states move on, its work does not change."""
    from fastasr.streaming import StreamingEncoder

    threads = torch.get_num_threads()
    encoder = StreamingEncoder.from_model(model, chunk, LEFT_CONTEXT, max_streams=streams, threads=threads)
    opened = [encoder.open() for _ in range(streams)]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(streams, 2 * chunk + PADDING, upstream.BINS, generator=generator)
    for _ in range(LEFT_CONTEXT // chunk + 1):
        encoder.step(x, opened)
    return lambda: encoder.step(x, opened)[0]


def measure(
    *,
    size: str = "medium",
    chunks: tuple[int, ...] = CHUNKS,
    streams: tuple[int, ...] = STREAMS,
    inner_compile: bool = True,
    settings: Settings | None = None,
    reps: int | None = None,
    compile_model: bool = False,
    skip: Callable[[str, str, str], bool] = lambda case, shape, pass_: False,
    report: Report = lambda _: None,
) -> Iterator[list[Row]]:
    """Yields the rows of a chunk of each size for each number of streams; ``skip(case, shape, pass)`` leaves one out,
    ``compile_model`` changes nothing. ``inner_compile``: as upstream ships its activations, compiled. Raises
    ``upstream.MissingUpstream``."""
    settings = settings or Settings()
    options = {"causal": True, "chunk_size": chunks, "left_context_frames": (LEFT_CONTEXT,)}
    model = upstream.zipformer(size, inner_compile=inner_compile, **options)
    for count in streams:
        shape = f"{size} {count} stream{'s' * (count > 1)}, left context {LEFT_CONTEXT}"
        for chunk in chunks:
            case = CASE.format(chunk)
            if skip(case, shape, FORWARD):
                continue
            model.encoder.chunk_size = chunks
            engine = _engine(model, chunk, count)
            runs = {UPSTREAM: middle_of_a_stream(model, chunk, count), FASTASR: engine}
            yield measure_unit(NAME, case, FORWARD, shape, runs, settings, reps or settings.reps, report)
