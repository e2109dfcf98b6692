# SPDX-License-Identifier: Apache-2.0
"""Error rates of a trained model as a stream: by its own code, and through the engine with fp32, bf16 and int8 weights.

    python -m fastasr.benchmarks.studies.streaming_accuracy RUN      # JSON beside the rows, and the page
    python -m fastasr.benchmarks.studies.streaming_accuracy          # the page from the JSON; --check compares it

RUN is a folder that examples/train_transducer.py wrote. Its held-out recordings are read chunk by chunk, by greedy
search.
"""

import sys
from pathlib import Path

import torch

from fastasr.benchmarks.environment import stamp
from fastasr.benchmarks.markdown import grid
from fastasr.benchmarks.studies import results

WEIGHTS = ("fp32", "bf16", "int8")
METHOD = "greedy"
STREAMS = 8


def measure(run, utterances):
    """Returns a dict of the error rates of ``run`` on ``utterances`` (name, features, text), by each way of encoding.

    ``differs`` counts the recordings that the engine reads differently from the model's own streaming code.
    """
    from fastasr.asr.recipe import recogniser, scoring

    loaded = recogniser.load(run)
    said = [utterance.text for utterance in utterances]
    own = [list(loaded.stream_features([utterance.features[0]]))[-1][0] for utterance in utterances]
    found = {
        "run": Path(run).name,
        "recordings": len(utterances),
        "seconds": round(sum(utterance.seconds for utterance in utterances), 1),
        "method": METHOD,
        "model": scoring.rates(said, own),
        "engine": {},
    }
    for kind in WEIGHTS:
        texts, report = engine_texts(loaded, utterances, kind)
        found["engine"][kind] = {
            **scoring.rates(said, texts),
            "differs": sum(a != b for a, b in zip(own, texts, strict=True)),
            "backend": report.backend,
            "output_error": report.error,
        }
    return found


def engine_texts(loaded, utterances, weights):
    """Returns the texts that the engine reads, ``STREAMS`` utterances side by side, and the engine's report."""
    from fastasr.asr.recipe import sizes
    from fastasr.asr.streaming import StreamingEncoder, StreamingRecogniser

    encoder = StreamingEncoder.from_model(
        loaded.model,
        sizes.CHUNK,
        sizes.LEFT_CONTEXT,
        weights=weights,
        max_streams=STREAMS,
        rate=loaded.rate,
        bins=loaded.bins,
    )
    reader = StreamingRecogniser(loaded.model, encoder, METHOD, to_text=loaded.units.decode)
    texts = []
    for first in range(0, len(utterances), STREAMS):
        texts += _read(reader, utterances[first : first + STREAMS])
    return texts, encoder.report


def _read(reader, utterances):
    """Returns the texts of utterances that are streamed side by side."""
    from fastasr.asr import decoding

    streams = [reader.open() for _ in utterances]
    waiting = {}
    for stream, utterance in zip(streams, utterances, strict=True):
        chunks = decoding.FeatureChunks(reader.encoder.chunk_size)
        waiting[stream] = [*chunks.accept(utterance.features[0]), *chunks.finish()]
    while any(waiting.values()):
        ready = [stream for stream, chunks in waiting.items() if chunks]
        x = torch.stack([waiting[stream].pop(0) for stream in ready])
        reader.accept(ready, reader.encoder.step(x, ready)[0])
    texts = [reader.result(stream).text for stream in streams]
    for stream in streams:
        reader.close(stream)
    return texts


def block(found: dict) -> str:
    """Returns the page's table of the results of ``measure``."""
    ways = {"the model's own code": found["model"]}
    ways |= {f"engine, {kind} ({values['backend']})": values for kind, values in found["engine"].items()}
    lines = []
    for way, values in ways.items():
        error = values.get("output_error")
        rates = f"{values['cer']:.1%}", f"{values['wer']:.1%}", values.get("differs", "")
        lines.append([way, *rates, "" if error is None else f"{error:.1e}"])
    heads = f"{found['recordings']} held-out recordings", "characters wrong", "words wrong", "other texts"
    place = found["environment"]
    where = f"{place['device_name']}, torch {place['torch']}, commit {place['commit']}."
    return "\n".join([*grid((*heads, "output changed by"), lines, 4), "", where])


def main(arguments=None):
    """Returns the exit code, see ``results.run``."""
    made = results.parser("streaming_accuracy", __doc__, "streaming.md")
    made.add_argument("run", type=Path, nargs="?", help="a run's folder or checkpoint")
    made.add_argument("--cache", type=Path, default=Path("demo/cache"), help="downloads")
    made.add_argument(
        "--speech", type=Path, help="a folder of recordings with transcripts instead of the prompts"
    )
    options = made.parse_args(arguments)

    def measured(_):
        from fastasr.asr.recipe import speech

        _, held_out = speech.load(options.cache, options.speech, speeds=(1.0,))
        return measure(options.run, held_out) | {"environment": stamp()}

    return results.run(options, measured if options.run else None, lambda found: {"bench": block(found)})


if __name__ == "__main__":
    sys.exit(main())
