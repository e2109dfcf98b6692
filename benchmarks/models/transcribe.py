# SPDX-License-Identifier: Apache-2.0
"""16 s of features to tokens with a recogniser of Zipformer-M's size: PyTorch (ours and the PyPI package's) beside
onnxruntime, on as many threads. Divided by 16 s, a row's time is the real-time factor.

Cases: the encoder of a whole utterance; encoder and greedy search of a whole utterance; as a stream in chunks of 16 and
32 frames (0.32 and 0.64 s) with 128 frames of left context, encoder and greedy search, where "engine" is
``fastasr.asr.streaming.StreamingEncoder`` with packed weights and "fastasr" the model's own code. Weights are random,
the joiner's bias made so that blank wins most frames, as speech has it. onnxruntime runs what ``fastasr.asr.export``
wrote.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fastasr.asr import decoding
from fastasr.asr.streaming import StreamingEncoder, utterance_chunks
from fastasr.benchmarks import upstream
from fastasr.benchmarks.markdown import by_machine
from fastasr.benchmarks.models.unit import FASTASR, FORWARD, UPSTREAM, Run, benchmark
from fastasr.benchmarks.rows import Row
from fastasr.benchmarks.table import Unit, duration, times

NAME = "transcribe"
ENCODER, WHOLE, STREAM = "encoder, whole", "whole", "stream, chunks of {}"
ONNX, ENGINE = "onnxruntime", "engine"
SECONDS, CHUNKS, LEFT_CONTEXT = 16, (16, 32), 128
VOCABULARY = 500
QUICK = {"size": "tiny", "seconds": 2, "chunks": (16,), "inner_compile": False}


def shape_name(size: str, seconds: float) -> str:
    return f"{size} 1x{round(100 * seconds)}x{upstream.BINS}"


def config(size: str, chunk: int | None) -> dict:
    """Returns the arguments of AsrModel; ``chunk`` selects streaming with this chunk size."""
    sizes = {k: v for k, v in upstream.SIZES[size].items() if k != "output_downsampling_factor"}
    made = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in sizes.items()}
    streams = {"causal": True, "chunk_size": str(chunk), "left_context_frames": str(LEFT_CONTEXT)}
    whole = {"chunk_size": "-1", "left_context_frames": "-1"}
    return {**made, **(streams if chunk else whole), "vocab_size": VOCABULARY}


def _models(size: str, chunk: int | None, folder: Path) -> dict[str, object]:
    """Returns every implementation with the same weights."""
    from fastasr.asr import export, recogniser
    from fastasr.asr.export import export_onnx

    theirs = upstream.recogniser(config(size, chunk))
    with torch.no_grad():
        theirs.joiner.output_linear.bias[0] += 4.0
    ours = recogniser.AsrModel(**config(size, chunk)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    files = export_onnx(ours, folder / f"{chunk}")
    made = export.OnnxStreamingTransducerModel if chunk else export.OnnxTransducerModel
    session = made(*(files[n] for n in ("encoder", "decoder", "joiner")), threads=torch.get_num_threads())
    return {UPSTREAM: theirs, FASTASR: ours, ONNX: session}


def _whole(model, features: torch.Tensor, search: bool) -> Callable[[], object]:
    x, lengths = features.unsqueeze(0), torch.tensor([len(features)])

    def run():
        out, frames = decoding.encode(model, x, lengths)
        return decoding.greedy_search(model, out, frames).tokens if search else out

    return run


def _stream(model, features: torch.Tensor) -> Callable[[], object]:
    search = decoding.GreedySearch(model)

    def run():
        encoder, state = decoding.ChunkEncoder(model), search.start()
        chunks = decoding.FeatureChunks(encoder.chunk_size)
        for chunk in [*chunks.accept(features), *chunks.finish()]:
            state = search.advance(state, encoder(chunk.unsqueeze(0)))
        return search.result(state).tokens

    return run


def _engine(model, features: torch.Tensor, chunk: int) -> Callable[[], object]:
    search = decoding.GreedySearch(model)
    encoder = StreamingEncoder.from_model(model, chunk, LEFT_CONTEXT, max_streams=1)
    pieces = [
        (piece.unsqueeze(0), torch.tensor([length])) for piece, length in utterance_chunks(features, chunk)
    ]

    def run():
        stream, state = encoder.open(), search.start()
        for piece, length in pieces:
            state = search.advance(state, *encoder.step(piece, [stream], length))
        encoder.close(stream)
        return search.result(state).tokens

    return run


@benchmark(NAME)
def measure(
    run: Run,
    *,
    size: str = "medium",
    seconds: float = SECONDS,
    chunks: tuple[int, ...] = CHUNKS,
    inner_compile: bool = True,
) -> Iterator[list[Row]]:
    """Yields the rows of each case.

    ``inner_compile`` keeps upstream's activations compiled, as shipped. Raises ``upstream.MissingUpstream``.
    """
    for name in ("onnx", "onnxruntime"):
        upstream.module(name)
    shape = shape_name(size, seconds)
    features = torch.randn(round(100 * seconds), upstream.BINS, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, upstream.activations(compiled=inner_compile):
        for chunk in (None, *chunks):
            cases = (STREAM.format(chunk),) if chunk else (ENCODER, WHOLE)
            wanted = [case for case in cases if not run.skip(case, shape, FORWARD)]
            if not wanted:
                continue
            run.report(f"{NAME}: models for {' and '.join(cases)}, and their ONNX files")
            models = _models(size, chunk, Path(folder))
            for case in wanted:
                runs = {
                    name: _stream(model, features) if chunk else _whole(model, features, case == WHOLE)
                    for name, model in models.items()
                }
                if chunk:
                    runs[ENGINE] = _engine(models[FASTASR], features, chunk)
                yield run.unit(case, FORWARD, shape, runs)


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table: a case per line, milliseconds and real-time factors side by side."""
    figures = "upstream | onnxruntime | fastasr | engine | best × upstream | best × onnxruntime"
    return by_machine(rows, "", figures, _line, "In brackets: the real-time factor.")


def _line(unit: Unit) -> list[list[str]]:
    spoken = int(unit.first.shape.split("x")[1]) * 10.0  # ms
    cells = [
        f"{duration(unit.median(name))} ({unit.median(name) / spoken:.3f})" if unit.median(name) else "–"
        for name in (UPSTREAM, ONNX, FASTASR, ENGINE)
    ]
    best = min(filter(None, (unit.median(FASTASR), unit.median(ENGINE))), default=None)
    for name in (UPSTREAM, ONNX):
        other = unit.median(name)
        cells.append(times(other / best if other and best else None))
    return [[f"{unit.first.case} ({unit.first.shape})", *cells]]
