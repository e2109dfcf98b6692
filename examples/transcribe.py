# SPDX-License-Identifier: Apache-2.0
"""What is said in a recording, by a model that examples/train_transducer.py has trained.

    python examples/transcribe.py recording.wav --model exp                    # the run's checkpoint
    python examples/transcribe.py recording.wav --model exp --stream           # chunk by chunk, partial results
    python examples/transcribe.py --model exp --export exp/onnx                # writes ONNX files
    python examples/transcribe.py recording.wav --model exp/onnx --stream      # and reads with them
    python examples/transcribe.py --model exp --compare exp/onnx               # on the held-out recordings

--method is greedy, beam, ctc-greedy or ctc-beam. --times prints when each token was decided.
"""

import argparse
import time
from pathlib import Path

PIECE = 0.1  # seconds of samples that a stream gets at a time


def parser():
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("file", type=Path, nargs="*", help="wav files (others with soundfile)")
    made.add_argument("--model", type=Path, default=Path("exp"), help="run, checkpoint or ONNX folder")
    made.add_argument("--stream", action="store_true", help="as if the recording came in now")
    made.add_argument(
        "--real-time", action="store_true", help="with --stream: wait for the samples as they come"
    )
    made.add_argument("--method", default="greedy", choices=("greedy", "beam", "ctc-greedy", "ctc-beam"))
    made.add_argument("--beam", type=int, default=4, help="hypotheses (default: %(default)s)")
    made.add_argument("--times", action="store_true", help="print the time of every token")
    made.add_argument("--resample", action="store_true", help="take recordings of another sample rate")
    made.add_argument("--export", type=Path, metavar="FOLDER", help="write the model as ONNX files and stop")
    made.add_argument(
        "--compare",
        type=Path,
        metavar="MODEL",
        help="read the held-out recordings with this model too and stop",
    )
    made.add_argument(
        "--speech",
        type=Path,
        help="with --compare: a folder of recordings with .txt beside them, or a manifest",
    )
    made.add_argument("--held-out", help="with --compare: as for train_transducer.py")
    made.add_argument(
        "--cache",
        type=Path,
        default=Path("demo/cache"),
        help="with --compare: downloads (default: %(default)s)",
    )
    return made


def compare(options):
    """Reads the recordings that training has held out with both models, streaming. Exits with 1 when a text differs."""
    from fastasr.asr.recipe import recogniser, speech

    readers = recogniser.load(options.model), recogniser.load(options.compare)
    _, held_out = speech.load(options.cache, options.speech, (1.0,), held_out=options.held_out)
    different = recogniser.disagreements(*readers, held_out, options.method)
    print(
        f"{len(held_out) - len(different)} of {len(held_out)} held-out recordings are read as the same text"
    )
    for name, text, other in different:
        print(f"{name}\n  {options.model}: {text}\n  {options.compare}: {other}")
    raise SystemExit(int(bool(different)))


def pieces(samples, rate, real_time):
    for piece in samples.split(round(PIECE * rate)):
        if real_time:
            time.sleep(len(piece) / rate)
        yield piece


def transcribe(recogniser, path, options):
    samples = recogniser.samples(path, options.resample)
    began = time.perf_counter()
    if options.stream:
        shown = None
        parts = pieces(samples, recogniser.rate, options.real_time)
        for partial in recogniser.stream(parts, options.method, options.beam):
            text, result = partial
            if text != shown:
                print(f"  ... {text}", flush=True)
                shown = text
    else:
        text, result = recogniser.transcribe(samples, options.method, options.beam)
    seconds, took = len(samples) / recogniser.rate, time.perf_counter() - began
    print(f"{path.name}: {text}")
    if options.times:
        for token, frame in zip(result.tokens[0], result.timestamps[0], strict=True):
            print(f"  {frame * 0.04:6.2f} s  {recogniser.units.table[token]}")
    if not options.real_time:
        print(f"  {seconds:.1f} s of speech in {took:.2f} s")


def main(arguments=None):
    options = parser().parse_args(arguments)
    from fastasr.asr.recipe import recogniser

    try:
        if options.export:
            for name, path in recogniser.export(options.model, options.export).items():
                print(f"wrote {name}: {path}")
            return
        if options.compare:
            compare(options)
        if not options.file:
            raise ValueError("give at least one recording, --export FOLDER or --compare MODEL")
        loaded = recogniser.load(options.model)
        for path in options.file:
            transcribe(loaded, path, options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
