# SPDX-License-Identifier: Apache-2.0
"""One chunk of a streaming Zipformer-M, through the streaming engine with weights in fp32, bf16 and int8, and through
upstream's code: as shipped, scripted and frozen as its exporter writes it, and in onnxruntime. One stream and several
at a time are measured in the middle of the streams; all implementations use torch's number of threads.
"""

from collections.abc import Iterator

import torch

from fastasr.asr.decoding.chunks import RIGHT_CONTEXT
from fastasr.benchmarks import upstream
from fastasr.benchmarks.models import streaming_peers
from fastasr.benchmarks.models.unit import FASTASR, FORWARD, UPSTREAM, Run, benchmark
from fastasr.benchmarks.models.zipformer_streaming import CHUNKS, LEFT_CONTEXT, middle_of_a_stream
from fastasr.benchmarks.rows import Row

NAME = "streaming_engine"
CASE = "one chunk of {}"
STREAMS = (1, 8)
# the implementations are those of streaming_peers
PEERS = {
    "scripted": streaming_peers.SCRIPTED,
    "onnxruntime": streaming_peers.ONNX,
    FASTASR: "engine fp32",
    "fastasr bf16": "engine bf16",
    "fastasr int8": "engine int8",
}
QUICK = {"size": "tiny", "chunks": (16,), "streams": (1, 2), "inner_compile": False}


@benchmark(NAME)
def measure(
    run: Run,
    *,
    size: str = "medium",
    chunks: tuple[int, ...] = CHUNKS,
    streams: tuple[int, ...] = STREAMS,
    inner_compile: bool = True,
) -> Iterator[list[Row]]:
    """Yields the rows of a chunk of each size for each number of streams.

    ``inner_compile`` keeps upstream's activations compiled, as shipped. Raises ``upstream.MissingUpstream``.
    """
    options = {"causal": True, "chunk_size": chunks, "left_context_frames": (LEFT_CONTEXT,)}
    model = upstream.zipformer(size, inner_compile=inner_compile, **options)
    shapes = {
        count: f"{size} {count} stream{'s' * (count > 1)}, left context {LEFT_CONTEXT}" for count in streams
    }
    for chunk in chunks:
        case = CASE.format(chunk)
        wanted = {count: shape for count, shape in shapes.items() if not run.skip(case, shape, FORWARD)}
        if not wanted:
            continue
        run.report(f"{NAME}: {case}: scripting, exporting and packing")
        threads = torch.get_num_threads()
        peers = streaming_peers.make(tuple(PEERS.values()), size, chunk, threads, max(wanted))
        for count, shape in wanted.items():
            generator = torch.Generator().manual_seed(1)
            x = torch.randn(count, 2 * chunk + RIGHT_CONTEXT, upstream.BINS, generator=generator)
            full = LEFT_CONTEXT // chunk + 1
            runs = {UPSTREAM: middle_of_a_stream(model, chunk, count)}
            runs |= {name: peers[peer].middle(x, full) for name, peer in PEERS.items()}
            yield run.unit(case, FORWARD, shape, runs)
