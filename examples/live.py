# SPDX-License-Identifier: Apache-2.0
"""Live recognition with a model that examples/train_transducer.py has trained: partial text while samples come.

    python examples/live.py recording.wav --model exp                # a wav as if it were spoken now
    arecord -t raw -f S16_LE -r 8000 | python examples/live.py - --model exp    # raw 16-bit PCM from standard input
    python examples/live.py recordings/ --model exp --fast           # every wav of a folder at once, in a live table

--weights bf16, fp16 or int8 packs smaller weights; --fast does not wait for real time; --endpoints cuts into segments.
"""

import argparse
import sys
import time
from pathlib import Path

PIECE = 0.1  # seconds of samples at a time


def parser():
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("source", help="a wav file, a folder of them, or - for raw PCM from standard input")
    made.add_argument("--model", type=Path, default=Path("exp"), help="run or checkpoint")
    made.add_argument("--method", default="greedy", choices=("greedy", "beam", "ctc-greedy", "ctc-beam"))
    made.add_argument("--beam", type=int, default=4, help="hypotheses (default: %(default)s)")
    made.add_argument("--weights", default="fp32", choices=("fp32", "bf16", "fp16", "int8"))
    made.add_argument("--threads", type=int, default=1, help="of a call (default: %(default)s)")
    made.add_argument("--fast", action="store_true", help="do not wait for the samples as they would come")
    made.add_argument("--endpoints", action="store_true", help="cut into segments at silence")
    made.add_argument("--resample", action="store_true", help="take recordings of another sample rate")
    return made


def made(options, streams):
    """Returns (recogniser, a reader of recordings of its rate) of ``options``."""
    from fastasr.asr.recipe import recogniser, sizes, speech
    from fastasr.asr.recipe.transducers import Transducer
    from fastasr.asr.streaming import EndpointRules, StreamingEncoder, StreamingRecogniser

    loaded = recogniser.load(options.model)
    if isinstance(loaded.model, tuple):
        raise ValueError(f"{options.model} holds ONNX files: give the run that they are from")
    if isinstance(loaded.model, Transducer):
        raise ValueError(
            f"{options.model} holds {loaded.model.NAME}: the streaming engine is for Zipformers, use transcribe.py"
        )
    encoder = StreamingEncoder.from_model(
        loaded.model,
        sizes.CHUNK,
        sizes.LEFT_CONTEXT,
        weights=options.weights,
        max_streams=streams,
        threads=options.threads,
        rate=loaded.rate,
        bins=loaded.bins,
        high_freq=speech.HIGH_FREQ,
    )
    print(encoder.report, file=sys.stderr)
    live = StreamingRecogniser(
        loaded.model,
        encoder,
        options.method,
        options.beam,
        to_text=loaded.units.decode,
        endpoint=EndpointRules() if options.endpoints else None,
    )
    return live, loaded


def show(result, shown):
    """Prints a partial result once and a final one on a line of its own; returns what is shown now."""
    if result.final:
        print(f"[{result.start:7.2f} - {result.end:7.2f}] {result.text}", flush=True)
        return None
    if result.text != shown:
        print(f"  ... {result.text}", flush=True)
    return result.text


def one(live, pieces):
    """Recognises a single stream of ``pieces`` of samples."""
    stream, shown = live.open(), None
    for samples in pieces:
        live.push(stream, samples)
        for result in live.advance():
            shown = show(result, shown)
    for result in live.finish(stream):
        shown = show(result, shown)


def paced(samples, rate, fast):
    """Yields pieces of a recording, each when its last sample would have been spoken."""
    began, size = time.perf_counter(), round(PIECE * rate)
    for first in range(0, len(samples), size):
        piece = samples[first : first + size]
        if not fast:
            time.sleep(max(0.0, began + (first + len(piece)) / rate - time.perf_counter()))
        yield piece


def raw_pcm(rate):
    """Yields pieces of 16-bit little-endian PCM, one channel, from standard input."""
    import numpy

    while data := sys.stdin.buffer.read(2 * round(PIECE * rate)):
        yield numpy.frombuffer(data[: len(data) // 2 * 2], dtype="<i2").copy()


def many(live, recordings, rate, fast):
    """Recognises every recording, {name: samples}, as a stream of its own, with a live table of the text."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    streams = {live.open(): name for name in recordings}
    sources = {stream: paced(recordings[name], rate, True) for stream, name in streams.items()}
    texts = dict.fromkeys(streams, "")
    done, began, heard = {}, time.perf_counter(), 0

    def table():
        made = Table(title=f"{len(streams) - len(done)} of {len(streams)} streams are open")
        for title in ("recording", "seconds", "text"):
            made.add_column(title)
        for stream, name in streams.items():
            mark = "" if stream in done else " ..."
            made.add_row(
                name, f"{len(recordings[name]) / rate:.1f}", " ".join((*finals(stream), texts[stream])) + mark
            )
        return made

    def finals(stream):
        return [result.text for result in live.finals(stream)]

    console = Console()
    with Live(table(), console=console, refresh_per_second=8) as shown:
        while len(done) < len(streams):
            heard += 1
            if not fast:
                time.sleep(max(0.0, began + heard * PIECE - time.perf_counter()))
            for stream, source in list(sources.items()):
                piece = next(source, None)
                if piece is None:
                    live.end(stream)
                    del sources[stream]
                else:
                    live.push(stream, piece)
            for result in live.advance():
                texts[result.stream] = "" if result.final else result.text
            for stream in streams:
                if stream not in sources and stream not in live.encoder.ready:
                    done[stream] = True
            shown.update(table())
    if not console.is_terminal:
        print()  # rich leaves the last line of the table open there
    for stream, name in streams.items():
        print(f"{name}: {' '.join(finals(stream))}")
    took, seconds = time.perf_counter() - began, sum(map(len, recordings.values())) / rate
    print(f"{seconds:.1f} s of speech in {took:.2f} s", file=sys.stderr)


def main(arguments=None):
    options = parser().parse_args(arguments)
    try:
        folder = Path(options.source)
        if options.source != "-" and folder.is_dir():
            files = sorted(folder.rglob("*.wav"))
            if not files:
                raise ValueError(f"{folder} has no wav files")
            live, loaded = made(options, len(files))
            recordings = {
                path.relative_to(folder).as_posix(): loaded.samples(path, options.resample) for path in files
            }
            many(live, recordings, loaded.rate, options.fast)
            return
        live, loaded = made(options, 1)
        if options.source == "-":
            one(live, raw_pcm(loaded.rate))
        else:
            samples = loaded.samples(folder, options.resample)
            one(live, paced(samples, loaded.rate, options.fast))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
