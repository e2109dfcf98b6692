# SPDX-License-Identifier: Apache-2.0
"""Recognisers in float32 and int8 side by side, on the same weights and recordings; error rates of trained models.

    python -m fastasr.benchmarks.studies.int8_peers                  # the peers: JSON beside the rows, and the page
    python -m fastasr.benchmarks.studies.int8_peers --runs RUN ...   # error rates of the recipe's runs, JSON and page
    python -m fastasr.benchmarks.studies.int8_peers --readings RUN   # error rates of the peers with a run's weights
    python -m fastasr.benchmarks.studies.int8_peers --page-only      # the page from the JSON; --check compares it

Each implementation reads recordings from samples to tokens by greedy search, each in a process of its own: a Zipformer
with random weights whose joiner's bias lets blank win most frames. All but sherpa-onnx share our features and our
search, and their decoder and joiner run where their encoder does (OpenVINO's in onnxruntime). Files are those of
``fastasr.asr.export``. An implementation whose package is not installed is left out, and the program says so:
sherpa-onnx and OpenVINO may lie in a folder that PYTHONPATH names.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
import wave
from pathlib import Path
from types import SimpleNamespace

import torch

from fastasr import files
from fastasr.asr.decoding.chunks import SILENCE
from fastasr.asr.recipe.transducers import EBranchformerTransducer
from fastasr.benchmarks import upstream
from fastasr.benchmarks.environment import int8_saturates, stamp
from fastasr.benchmarks.harness import in_fresh_process
from fastasr.benchmarks.markdown import grid
from fastasr.benchmarks.plots import COLOURS, bars, png, pyplot
from fastasr.benchmarks.studies import results

RATE = 16000
FORMATS = ("float32", "bf16", "int8")
SPEEDS = (0.9, 1.0, 1.1)  # Three times the characters make rates finer.
PAUSE = 30  # frames of silence between recordings that are joined
TAIL = 50  # frames of silence behind a recording: sherpa-onnx drops a last chunk that is not full
LIMIT = 1800  # seconds for one implementation
NAMES = (
    "upstream",
    "torch.ao int8",
    "onnxruntime float32",
    "onnxruntime int8",
    "sherpa-onnx float32",
    "sherpa-onnx int8",
    "OpenVINO float32",
    "OpenVINO int8",
    "fastasr float32",
    "fastasr bf16",
    "fastasr int8",
)


# --------------------------------------------------------------------------- one implementation, in its own process
class OpenVinoSession:
    """OpenVINO with the interface of an onnxruntime session."""

    def __init__(self, file, threads):
        import openvino

        # Without this setting OpenVINO computes in bfloat16 if the processor has instructions for it.
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._model = openvino.Core().compile_model(str(file), "CPU", options)
        self._inputs = [
            SimpleNamespace(
                name=i.get_any_name(),
                shape=[n.get_length() if n.is_static else n for n in i.partial_shape],
                type=str(i.element_type),
            )
            for i in self._model.inputs
        ]

    def get_inputs(self):
        return self._inputs

    def run(self, names, inputs):
        found = self._model(inputs)
        return list(found.values()) if names is None else [found[name] for name in names]


def _in_torch(name):
    return name in NAMES[:2] or name.startswith("fastasr")


def _torch_model(name, folder):
    import fastasr

    made = torch.load(folder / "model.pt", weights_only=True)
    model = upstream.recogniser(made["config"])
    model.load_state_dict(made["state"])
    file = folder / "model.pt"
    if name.startswith("fastasr"):
        weights = name.split()[1]
        report = fastasr.accelerate(model, weights=None if weights == "float32" else weights)
        if weights != "float32" and not report.weights.reduced:
            raise ImportError(report.weights.rows[0].reason)
    elif name == "torch.ao int8":
        warnings.simplefilter("ignore")  # torch.ao is deprecated, but users have it.
        for part in ("encoder", "encoder_embed"):
            setattr(
                model, part, torch.ao.quantization.quantize_dynamic(getattr(model, part), {torch.nn.Linear})
            )
        file = folder / "torch.ao.pt"
        torch.save(model.state_dict(), file)
    return model, [file]


def _onnx_files(name, folder):
    ending = ".int8.onnx" if name.endswith("int8") else ".onnx"
    return [folder / f"{part}{ending}" for part in ("encoder", "decoder", "joiner")]


def _onnx_model(name, folder, threads, streams=False):
    from fastasr.asr.export import OnnxStreamingTransducerModel, OnnxTransducerModel

    files = _onnx_files(name, folder)
    model = (OnnxStreamingTransducerModel if streams else OnnxTransducerModel)(*files, threads=threads)
    if name.startswith("OpenVINO"):
        model.encoder = model._session = OpenVinoSession(files[0], threads)
    return model, files


def _sherpa(name, folder, threads):
    import sherpa_onnx

    files = _onnx_files(name, folder)
    recogniser = sherpa_onnx.OfflineRecognizer.from_transducer(
        *(str(file) for file in files),
        tokens=str(folder / "tokens.txt"),
        num_threads=threads,
        sample_rate=RATE,
    )

    def read(samples):
        stream = recogniser.create_stream()
        stream.accept_waveform(RATE, samples.numpy())
        recogniser.decode_stream(stream)
        return stream.result.tokens

    return read, files


def _reader(name, folder, threads):
    """Returns (read, encode or None, files): read(samples) -> tokens, encode(samples) -> the joiner's input."""
    from fastasr.asr import decoding
    from fastasr.asr.audio.features import fbank

    if name.startswith("sherpa"):
        read, files = _sherpa(name, folder, threads)
        return read, None, files
    made = _torch_model(name, folder) if _in_torch(name) else None
    model, files = made or _onnx_model(name, folder, threads)

    def encoded(samples):
        x = fbank(samples, RATE, upstream.BINS).unsqueeze(0)
        return decoding.encode(model, x, torch.tensor([x.shape[1]]))

    def read(samples):
        return decoding.greedy_search(model, *encoded(samples)).tokens[0]

    def encode(samples):
        y = encoded(samples)[0]
        return model.joiner.encoder_proj(y) if made else y

    return read, encode, files


def _resident():
    """Returns the resident memory of this process in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmRSS"].split()[0])


def one(name, folder, threads, calls):
    """Prints a line of JSON about one implementation."""
    torch.set_num_threads(threads)
    samples = _samples(folder)
    before = _resident()
    read, encode, files = _reader(name, folder, threads)
    with torch.inference_mode():
        read(samples), read(samples)
        taken = []
        for _ in range(calls):
            began = time.perf_counter()
            read(samples)
            taken.append(time.perf_counter() - began)
        grown = _resident() - before
        if encode is not None:
            torch.save(encode(samples).clone(), folder / f"{name}.out")
    sizes = sum(file.stat().st_size for file in files)
    print(json.dumps({"seconds": sorted(taken), "resident": grown, "file": sizes}))


# --------------------------------------------------------------------------- the peers
def _samples(folder):
    with wave.open(str(folder / "recording.wav")) as file:
        data = bytearray(file.readframes(file.getnframes()))
    return torch.frombuffer(data, dtype=torch.int16).float() / 32768


def _prepare(folder, size, seconds):
    from fastasr.asr.export import export_onnx
    from fastasr.benchmarks.models.transcribe import VOCABULARY, config

    model = upstream.distinct(upstream.recogniser(config(size, None)))
    with torch.no_grad():
        model.joiner.output_linear.bias[0] += 4.0
    torch.save({"config": config(size, None), "state": model.state_dict()}, folder / "model.pt")
    from fastasr.asr.recogniser import AsrModel

    ours = AsrModel(**config(size, None)).eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    export_onnx(ours, folder, int8=True, reduce_range=int8_saturates())
    names = ["<blk>", *(f"t{i}" for i in range(1, VOCABULARY))]
    (folder / "tokens.txt").write_text("".join(f"{n} {i}\n" for i, n in enumerate(names)), encoding="utf-8")
    noise = torch.randn(round(RATE * seconds), generator=torch.Generator().manual_seed(1)) * 3000
    with wave.open(str(folder / "recording.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(RATE)
        file.writeframes(noise.clamp(-32767, 32767).to(torch.int16).numpy().tobytes())


def measure(
    names=NAMES, size="medium", seconds=16.0, threads=(1, 2), calls=7, rounds=2, report=lambda _: None
):
    """Returns the results as a dict, as in the JSON file: for each number of threads and implementation the median
    time over the recording's length, the resident memory that it added, its files' size, and the relative rms change
    of the joiner's input from upstream's.

    The implementations take turns, ``rounds`` times; the time is that of the best round.
    """
    found = {}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        _prepare(folder, size, seconds)
        for count in threads:
            rows = found.setdefault(str(count), {})
            for _ in range(rounds):
                for name in names:
                    row = _in_process(name, report, "--one", name, folder, count, calls)
                    if row is None:
                        continue
                    row["median"] = row["seconds"][len(row["seconds"]) // 2]
                    report(f"{name}, {count} thread(s): {1e3 * row['median']:.1f} ms")
                    if name not in rows or row["median"] < rows[name]["median"]:
                        rows[name] = row
        exact = torch.load(folder / "upstream.out") if (folder / "upstream.out").exists() else None
        changes = {}
        for name in names:
            file = folder / f"{name}.out"
            if exact is not None and file.exists():
                changes[name] = ((torch.load(file) - exact).norm() / exact.norm()).item()
    rows = {
        count: {
            name: {
                "rtf": round(row["median"] / seconds, 5),
                "resident_mb": round(row["resident"] / 1e6, 1),
                "file_mb": round(row["file"] / 1e6, 1),
                "change": changes.get(name),
            }
            for name, row in of_count.items()
        }
        for count, of_count in found.items()
    }
    return {"size": size, "seconds": seconds, "calls": calls, "rounds": rounds, "threads": rows}


def _in_process(name, report, *arguments):
    """Returns the output of this program in a process of its own, or None if an implementation is left out."""
    try:
        return in_fresh_process(__spec__.name, *arguments, timeout=LIMIT)
    except RuntimeError as error:
        report(f"{name}: left out: {error}")
        return None


def versions():
    """Returns the versions of the peers that are installed."""
    found = {}
    for name in ("onnxruntime", "sherpa_onnx", "openvino"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            continue
    return found


# --------------------------------------------------------------------------- error rates of trained models
def joined(utterances, longer_than, silence=SILENCE):
    """Returns utterances made of ``utterances``, one after another with pauses, each longer than ``longer_than``
    seconds."""
    from fastasr.asr.recipe.speech import Utterance

    made, parts, words = [], [], []
    for utterance in utterances:
        x = utterance.features[0]
        parts += [x, x.new_full((PAUSE, x.shape[1]), silence)]
        words.append(utterance.text)
        if sum(map(len, parts)) > 100 * longer_than:
            made.append(Utterance(f"{len(words)} joined", [torch.cat(parts)], " ".join(words)))
            parts, words = [], []
    return made


def _whole(loaded, utterances, _):
    return [loaded.transcribe_features(utterance.features[0])[0] for utterance in utterances]


def _streaming(loaded, utterances, weights):
    """Reads a Zipformer's streams by the engine, another encoder's by its own code."""
    from fastasr.asr.recipe.transducers import Transducer
    from fastasr.benchmarks.studies import streaming_accuracy

    if isinstance(loaded.model, Transducer):
        return [list(loaded.stream_features([u.features[0]]))[-1][0] for u in utterances]
    return streaming_accuracy.engine_texts(loaded, utterances, weights.replace("float32", "fp32"))[0]


def accuracy(runs, utterances, report=lambda _: None):
    """Returns for each run of the recipe how it reads ``utterances`` (name, features, text), whole and, where its
    encoder streams, as streams, in each format: a row for those of up to LONGEST seconds and one for the others, with
    the error rates and how many texts are not those of float32."""
    import fastasr
    from fastasr.asr.recipe import checkpoints, recogniser
    from fastasr.asr.recipe.speech import LONGEST

    found = {}
    for run in runs:
        loaded = recogniser.load(run)
        ways = {"whole": _whole}
        if not isinstance(loaded.model, EBranchformerTransducer):
            ways["as streams"] = _streaming
        texts, weights = {}, {}
        for kind in FORMATS:
            if kind != "float32":
                reduced = fastasr.accelerate(loaded.model, weights=kind).weights
                weights[kind] = {
                    "reduced": len(reduced.reduced),
                    "all": len(reduced.rows),
                    "bytes": reduced.bytes_after / reduced.bytes_before,
                }
            with torch.inference_mode():
                for way, read in ways.items():
                    report(f"{run}: {kind}, {way}")
                    texts[way, kind] = read(loaded, utterances, kind)
        fastasr.restore(loaded.model)
        rows = [
            {"read": way, **row}
            for way in ways
            for row in _compared(utterances, {kind: texts[way, kind] for kind in FORMATS})
        ]
        steps = checkpoints.load(Path(run) / checkpoints.NAME)["step"]
        found[Path(run).name] = {"steps": steps, "weights": weights, "rows": rows}
    return {"longest": LONGEST, "runs": found}


def _compared(utterances, heard):
    """Returns a row about the recordings of up to LONGEST seconds and one about the others: the error rates of each of
    ``heard``, name -> texts, and how many of its texts are not those of the first."""
    from fastasr.asr.recipe import scoring
    from fastasr.asr.recipe.speech import LONGEST

    rows = []
    for long in (False, True):
        chosen = [i for i, u in enumerate(utterances) if (u.seconds > LONGEST) == long]
        if not chosen:
            continue
        said = [utterances[i].text for i in chosen]
        texts = {name: [of[i] for i in chosen] for name, of in heard.items()}
        first, *others = texts
        rows.append(
            {
                "long": long,
                "recordings": len(chosen),
                "characters": sum(map(len, said)),
                "rates": {name: scoring.rates(said, of) for name, of in texts.items()},
                "differs": {
                    name: sum(a != b for a, b in zip(texts[first], texts[name], strict=True))
                    for name in others
                },
            }
        )
    return rows


# --------------------------------------------------------------------------- error rates of the peers
def in_frames(samples):
    """Returns samples as (frames of 10 ms, samples of a frame), as many frames as the features have: ``joined`` then
    joins the same recordings."""
    from fastasr.asr.recipe import speech

    length = speech.RATE // 100
    frames = (len(samples) + length // 2) // length
    return torch.nn.functional.pad(samples, (0, frames * length - len(samples))).view(frames, length)


def _sherpa_streams(name, folder, rate, bins):
    """Returns a function from the samples of a whole recording to its text."""
    import sherpa_onnx

    from fastasr.asr.recipe import speech

    parts = dict(zip(("encoder", "decoder", "joiner"), map(str, _onnx_files(name, folder)), strict=True))
    recogniser = sherpa_onnx.OnlineRecognizer.from_transducer(
        **parts,
        tokens=str(folder / "tokens.txt"),
        num_threads=1,
        sample_rate=rate,
        feature_dim=bins,
        high_freq=speech.HIGH_FREQ,
    )

    def read(samples):
        stream = recogniser.create_stream()
        stream.accept_waveform(rate, samples.numpy())
        stream.input_finished()
        while recogniser.is_ready(stream):
            recogniser.decode_stream(stream)
        return recogniser.get_result(stream)

    return read


def texts(name, folder):
    """Prints the texts that an implementation reads in the recordings of ``readings``, as a line of JSON."""
    from fastasr.asr.recipe.recogniser import Recogniser
    from fastasr.asr.recipe.units import Units

    torch.set_num_threads(1)
    given = torch.load(folder / "recordings.pt", weights_only=True)
    rate, bins = given["rate"], given["bins"]
    if name.startswith("sherpa"):
        read = _sherpa_streams(name, folder, rate, bins)
    else:
        torch_model = _in_torch(name)
        model, _ = _torch_model(name, folder) if torch_model else _onnx_model(name, folder, 1, streams=True)
        units = Units.from_state_dict(
            {"table": (folder / "tokens.txt").read_text(encoding="utf-8"), "model": None}
        )
        loaded = Recogniser(model if torch_model else (model, None), units, rate, bins)

        def read(samples):
            return loaded.transcribe(samples)[0]

    with torch.inference_mode():
        print(json.dumps([read(samples) for samples in given["samples"]]))


def readings(run, utterances, names=NAMES, report=lambda _: None):
    """Returns how the implementations read ``utterances``, whose features are ``in_frames``, with the weights of a
    Zipformer's run: rows as in ``accuracy``, in which upstream's are the first texts."""
    from fastasr.asr.export import export_onnx
    from fastasr.asr.recipe import checkpoints, recogniser, sizes
    from fastasr.asr.recipe.speech import LONGEST
    from fastasr.asr.recogniser import AsrModel

    loaded = recogniser.load(run)
    if not isinstance(loaded.model, AsrModel):
        raise ValueError(f"{run} is no Zipformer's run, whose ONNX files the peers read")
    found = checkpoints.load(Path(run) / checkpoints.NAME)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        torch.save(
            {"config": sizes.streaming(found["arguments"]), "state": found["model_avg"]}, folder / "model.pt"
        )
        export_onnx(loaded.model, folder, feature_dim=loaded.bins, int8=True, reduce_range=int8_saturates())
        loaded.units.table.to_file(folder / "tokens.txt")
        samples = [torch.nn.functional.pad(u.features[0], (0, 0, 0, TAIL)).flatten() for u in utterances]
        torch.save({"samples": samples, "rate": loaded.rate, "bins": loaded.bins}, folder / "recordings.pt")
        heard = {}
        for name in names:
            report(f"{run}: {name}")
            heard[name] = _in_process(name, report, "--texts", name, folder)
    heard = {name: of for name, of in heard.items() if of is not None}
    if next(iter(heard), None) != NAMES[0]:
        raise ValueError(f"the others are compared with {NAMES[0]}, which must be installed and come first")
    rows = _compared(utterances, heard)
    return {"run": Path(run).name, "steps": found["step"], "longest": LONGEST, "rows": rows}


# --------------------------------------------------------------------------- the page
def peers_block(found):
    """Returns the page's table of ``measure``."""
    counts = list(found["threads"])
    lines = []
    for name in NAMES:
        of_counts = [found["threads"][count].get(name) for count in counts]
        known = next((row for row in of_counts if row), None)
        if known is None:
            continue
        cells = ["–" if row is None else f"{row['rtf']:.4f}" for row in of_counts]
        change = "" if known["change"] is None else f"{known['change']:.1e}"
        lines.append([name, *cells, f"{known['resident_mb']:.0f}", f"{known['file_mb']:.0f}", change])
    factors = (f"RTF, {count} thread{'s' * (count != '1')}" for count in counts)
    heads = "", *factors, "memory, MB", "files, MB", "output changed by"
    lines = grid(heads, lines, len(heads) - 1)
    what = f"Zipformer {found['size']}, a recording of {found['seconds']:g} s"
    return "\n".join([*lines, "", f"{what}. {_with_peers(found)}."])


def _with_peers(found):
    place = found["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    when = f"commit {place['commit']}, {place['date'][:10]}"
    return f"{place['device_name']}, torch {place['torch']}, {packages}; {when}"


def figure(found):
    """Draws the time of each implementation for the recording, a panel for each number of threads."""
    counts = list(found["threads"])
    picture, axes = pyplot().subplots(
        1, len(counts), figsize=(4.4 * len(counts), 3.6), layout="constrained", squeeze=False
    )
    for panel, count in zip(axes[0], counts, strict=True):
        rows = found["threads"][count]
        times = {name: 1e3 * found["seconds"] * rows[name]["rtf"] for name in NAMES if name in rows}
        bars(panel, times, {}, {name: COLOURS["fastasr"] for name in NAMES if name.startswith("fastasr")})
        panel.set_title(f"{count} thread{'s' * (count != '1')}", fontsize=9, loc="left")
    what = f"Zipformer {found['size']}, a recording of {found['seconds']:g} s"
    picture.suptitle(f"{what}, {found['environment']['device_name']}", fontsize=10)
    return picture


def _groups(rows, longest):
    groups = {f"{'over' if row['long'] else 'up to'} {longest:g} s": [row] for row in rows}
    return {"all": rows} | groups


def _cer(rows, name):
    """Returns the share of characters that are wrong in the recordings of several rows."""
    wrong = sum(row["characters"] * row["rates"][name]["cer"] for row in rows)
    return wrong / sum(row["characters"] for row in rows)


def runs_block(found):
    """Returns the page's table of ``accuracy``."""
    lines = []
    for name, run in found["runs"].items():
        for way in dict.fromkeys(row["read"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["read"] == way]
            for lengths, of in _groups(rows, found["longest"]).items():
                characters = sum(row["characters"] for row in of)
                exact, *others = (_cer(of, kind) for kind in FORMATS)
                cells = [name, f"{way}, {lengths}", sum(row["recordings"] for row in of), characters]
                cells += [f"{exact:.2%}", *(f"{100 * (cer - exact):+.2f}" for cer in others)]
                lines.append(cells + [sum(row["differs"][kind] for row in of) for kind in FORMATS[1:]])
    counted = "recordings", "characters", "float32: characters wrong", "bf16", "int8"
    lines = grid(("run", "read", *counted, "other texts: bf16", "int8"), lines, 7)
    trained = [
        f"{name}: {run['steps']} steps, "
        + ", ".join(
            f"{of['reduced']} of {of['all']} weights in {kind} ({of['bytes']:.2f} of float32's bytes)"
            for kind, of in run["weights"].items()
        )
        for name, run in found["runs"].items()
    ]
    place = found["environment"]
    where = f"{place['device_name']}, torch {place['torch']}, commit {place['commit']}, {place['date'][:10]}"
    return "\n".join([*lines, "", f"{'; '.join(trained)}. {where}."])


def readings_block(found):
    """Returns the page's table of ``readings``."""
    groups = _groups(found["rows"], found["longest"])
    first = NAMES[0]
    lines = [[first, *(f"{_cer(rows, first):.2%}" for rows in groups.values()), *("" for _ in groups)]]
    for name in found["rows"][0]["differs"]:
        rates = [
            f"{_cer(rows, name):.2%} ({100 * (_cer(rows, name) - _cer(rows, first)):+.2f})"
            for rows in groups.values()
        ]
        lines.append([name, *rates, *(sum(r["differs"][name] for r in rows) for rows in groups.values())])
    heads = [f"{what}{group}" for what in ("", "other texts: ") for group in groups]
    lines = grid(("", *heads), lines, len(heads))
    counts = ", ".join(
        f"{group}: {sum(row['recordings'] for row in rows)} recordings of "
        f"{sum(row['characters'] for row in rows)} characters"
        for group, rows in groups.items()
    )
    what = f"{found['run']}, {found['steps']} steps; {counts}"
    return "\n".join([*lines, "", f"{what}. {_with_peers(found)}."])


def main(arguments=None):
    """Returns the exit code, see ``results.run``."""
    parser = results.parser("int8_peers", __doc__, "int8_peers.md")
    parser.add_argument(
        "--only", nargs="*", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--size", choices=sorted(upstream.SIZES), default="medium")
    parser.add_argument("--seconds", type=float, default=16.0, help="of the recording")
    parser.add_argument("--threads", type=int, nargs="*", default=(1, 2))
    parser.add_argument("--calls", type=int, default=7, help="timed calls of an implementation in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=Path, nargs="*", help="runs of the recipe, instead of the peers")
    parser.add_argument(
        "--readings",
        type=Path,
        metavar="RUN",
        help="a Zipformer's run of the recipe, which all implementations read",
    )
    parser.add_argument("--cache", type=Path, default=Path("demo/cache"), help="downloads, for runs")
    parser.add_argument(
        "--speech", type=Path, help="a folder of recordings with transcripts instead of the prompts"
    )
    parser.add_argument("--out", type=Path, default=results.ROOT / "docs" / "plots" / "int8_peers.png")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--texts", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        name, folder, threads, calls = options.one
        one(name, Path(folder), int(threads), int(calls))
        return 0
    if options.texts:
        texts(options.texts[0], Path(options.texts[1]))
        return 0

    def measured(found):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            part, values = _measured(options)
        return found | {part: values}

    blocks = {"peers": peers_block, "runs": runs_block, "readings": readings_block}
    code = results.run(options, measured, lambda found: {part: blocks[part](found[part]) for part in found})
    if code == 0 and not options.check and not options.runs and not options.readings:
        peers = json.loads(options.results.read_text(encoding="utf-8"))["peers"]
        files.write(options.out, png(figure(peers)))
    return code


def _unheard(options, features=None, silence=SILENCE):
    """Returns the recordings at each speed that the recipe does not train on, and longer ones made of them."""
    from fastasr.asr.recipe import speech

    found = []
    for speed in SPEEDS:
        read = speech.unheard(options.cache, options.speech, (speed,), features=features or speech.fbank)
        found += [*read, *joined([u for u in read if u.seconds <= speech.LONGEST], speech.LONGEST, silence)]
    return found


def _measured(options):
    def report(line):
        print(line, flush=True)

    if options.runs:
        return "runs", {**accuracy(options.runs, _unheard(options), report), "environment": stamp()}
    if options.readings:
        recordings = _unheard(options, features=in_frames, silence=0.0)
        found = readings(options.readings, recordings, options.only, report)
        return "readings", {**found, "versions": versions(), "environment": stamp()}
    sizes = options.size, options.seconds, options.threads, options.calls, options.rounds
    found = measure(options.only, *sizes, report=report)
    return "peers", {**found, "versions": versions(), "environment": stamp()}


if __name__ == "__main__":
    sys.exit(main())
