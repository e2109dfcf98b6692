# SPDX-License-Identifier: Apache-2.0
"""``fastasr transcribe`` writes down recordings with a model of transformers from a local folder."""

import itertools
import json
import resource
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import Progress

import fastasr
from fastasr import files
from fastasr.asr.audio import captions, recordings
from fastasr.asr.audio.captions import Timed
from fastasr.asr.decoding import ctc_prefix_beam_search, modified_beam_search
from fastasr.cli.bench import DTYPES
from fastasr.cli.console import check_device, check_folder, err, escape, fail, out
from fastasr.rnnt import ctc_align

MODELS = ("ParakeetForCTC", "ParakeetForRNNT", "ParakeetForTDT")
INSTALL = "pip install 'fastasr[asr,cli]' 'transformers>=5.23'"


def load(folder: Path, device: str, dtype: torch.dtype):
    """Returns model and processor. It ends the command if the folder holds no known model."""
    try:
        import transformers
    except ImportError as error:
        fail(f"transformers cannot be imported ({error}): {INSTALL}")
    config = folder / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        fail(f"MODEL_DIR: {config} cannot be read: {error}")
    try:
        name = content["architectures"][0]
    except (KeyError, IndexError, TypeError):
        name = None
    if name not in MODELS:
        fail(f"MODEL_DIR: expected a {', '.join(MODELS[:-1])} or {MODELS[-1]}, got {name}")
    try:
        _check_layers(content, folder)
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = getattr(transformers, name).from_pretrained(folder, local_files_only=True, dtype=dtype)
        return model.eval().to(device), processor
    except Exception as error:  # transformers raises anything for a folder that lacks a file
        fail(f"MODEL_DIR: {folder} cannot be loaded: {type(error).__name__}: {error}")


def _check_layers(config: dict, folder: Path) -> None:
    """Raises ValueError if the configuration has more layers than the folder has tensors: transformers would build all
    layers before it compares.
    """
    from safetensors import safe_open

    tensors = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors += len(opened.keys())
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    layers = [
        n for part in parts for key, n in part.items() if key.endswith("_layers") and isinstance(n, int)
    ]
    if tensors and max(layers, default=0) > tensors:
        raise ValueError(f"config.json says {max(layers)} layers, the weights have {tensors} tensors")


def read(path: Path, rate: int, hop: int) -> torch.Tensor:
    """Returns the recording's first channel at ``rate``. It ends the command if it cannot be read, or if it has fewer
    than two frames of ``hop`` samples: the feature extractor would divide 0 by 0 for their variance.
    """
    try:
        clip = recordings.read(path)
    except ValueError as error:
        fail(f"RECORDING: {error}")
    samples = clip.samples if clip.rate == rate else _resampled(path, clip, rate)
    if len(samples) < 2 * hop:
        least = f"{2 * hop} samples at {rate} Hz ({2 * hop / rate:g} s)"
        fail(f"RECORDING: {path} is too short: expected at least {least}, got {len(samples)}")
    return samples


def _resampled(path: Path, clip: recordings.Clip, rate: int) -> torch.Tensor:
    try:
        import soxr
    except ImportError:
        fail(
            f"RECORDING: {path} has {clip.rate} Hz, the model wants {rate}; resampling needs soxr: {INSTALL}"
        )
    return torch.from_numpy(soxr.resample(clip.samples.numpy(), clip.rate, rate))


@torch.inference_mode()
def transcribe(model, processor, samples: torch.Tensor, beam: int | None = None) -> tuple[str, list[Timed]]:
    """Returns the text of one recording, and its pieces with their times. Without ``beam`` the search is greedy."""
    features, tokenizer = processor.feature_extractor, processor.tokenizer
    inputs = processor(samples.numpy(), sampling_rate=features.sampling_rate).to(model.device)
    inputs["input_features"] = inputs["input_features"].to(model.dtype)
    seconds = features.hop_length * model.config.encoder_config.subsampling_factor / features.sampling_rate
    if beam is not None:
        tokens, starts, durations = _beam_search(model, inputs, beam)
        times = [(first * seconds, (first + n) * seconds) for first, n in zip(starts, durations, strict=True)]
        text = tokenizer.decode(tokens, skip_special_tokens=True, group_tokens=False)
        return text, _pieces(tokens, times, tokenizer)
    found = model.generate(**inputs)
    if isinstance(found, torch.Tensor):
        text = processor.decode(found[0], skip_special_tokens=True)
        return text, _ctc_pieces(found[0].tolist(), tokenizer, seconds)
    text, pieces = processor.decode(found.sequences, durations=found.durations, skip_special_tokens=True)
    return text[0], [Timed(piece["token"], piece["start"], piece["end"]) for piece in pieces[0]]


def _beam_search(model, inputs, beam: int) -> tuple[list[int], list[int], list[int]]:
    """Returns the tokens, and each token's first frame and number of frames: CTC's come from the best path through
    these tokens, and a transducer's token has one frame."""
    if type(model).__name__ == "ParakeetForCTC":
        log_probs = model(**inputs).logits.float().log_softmax(-1)
        mask = model._get_output_attention_mask(inputs["attention_mask"], target_length=log_probs.shape[1])
        lengths, blank = mask.sum(1), model.config.pad_token_id
        (tokens,) = ctc_prefix_beam_search(log_probs, lengths, beam, blank).tokens
        targets = torch.tensor([tokens], dtype=torch.int64, device=log_probs.device)
        found = ctc_align(log_probs, targets, lengths, lengths.new_tensor([len(tokens)]), blank)
        return tokens, found.starts[0].tolist(), found.durations[0].tolist()
    encoded = model.encoder(**inputs, output_attention_mask=True)
    x, lengths = encoded.last_hidden_state.float(), encoded.attention_mask.sum(1)
    try:
        found = modified_beam_search(model, x, lengths, beam)
    except TypeError as error:  # its predictor or joint network is of an unknown kind
        fail(f"--beam: {error}")
    return found.tokens[0], found.timestamps[0], [1] * len(found.tokens[0])


def _ctc_pieces(labels: list[int], tokenizer, seconds: float) -> list[Timed]:
    """Returns the pieces of a CTC path, a label per frame of ``seconds``."""
    tokens, times, frame = [], [], 0
    for label, run in itertools.groupby(labels):
        first, frame = frame, frame + sum(1 for _ in run)
        if label != tokenizer.pad_token_id:
            tokens.append(label)
            times.append((first * seconds, frame * seconds))
    return _pieces(tokens, times, tokenizer)


def _pieces(tokens: list[int], times: list[tuple[float, float]], tokenizer) -> list[Timed]:
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    texts = [stream.step(tokenizer.backend_tokenizer, token) for token in tokens]
    return [Timed(text, *time) for text, time in zip(texts, times, strict=True) if text is not None]


@contextmanager
def progress(model, name: str):
    """Shows how many of the encoder's layers have run."""
    layers = model.encoder.layers
    with Progress(console=err(), transient=True) as shown:
        task = shown.add_task(escape(name), total=len(layers))
        hooks = [layer.register_forward_hook(lambda *_: shown.advance(task)) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def peak(device: torch.device) -> float:
    """Returns the largest memory so far in GiB: the process's, or the device's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def check_names(paths: list[Path]) -> None:
    """Ends the command if two recordings would write the same files into --out."""
    known: dict[str, Path] = {}
    for path in paths:
        other = known.setdefault(path.stem, path)
        if other.absolute() != path.absolute():
            fail(
                f"--out: {other} and {path} would both be written as {path.stem}.txt: rename one, or run them apart"
            )


def write(folder: Path, result: dict, words: list[Timed]) -> None:
    """Writes the text, the subtitles and everything as JSON."""
    stem = Path(result["recording"]).stem
    subtitles = captions.srt(captions.lines(words))
    texts = {"txt": result["text"] + "\n", "srt": subtitles, "json": json.dumps(result, indent=2) + "\n"}
    for suffix, text in texts.items():
        files.write(folder / f"{stem}.{suffix}", text)


def run(
    folder: Path,
    paths: list[Path],
    *,
    target: Path | None,
    device: str,
    dtype: str,
    swap: bool,
    beam: int | None,
    as_json: bool,
) -> None:
    if beam is not None and beam < 1:
        fail(f"--beam: expected at least 1, got {beam}")
    if dtype not in DTYPES:
        fail(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    check_device(device)
    if target is not None:
        check_names(paths)
    model, processor = load(folder, device, getattr(torch, dtype))
    if target is not None:
        check_folder("--out", target)
    if beam is not None and hasattr(model, "joint"):
        for part in (model.decoder, model.joint, model.encoder_projector):
            part.float()  # beam search computes in float32, whatever the encoder's dtype
    console = err()
    if swap:
        report = fastasr.accelerate(model)
        console.print(f"{type(model).__name__}: {len(report.replaced)} modules replaced")
    results = []
    rate, hop = processor.feature_extractor.sampling_rate, processor.feature_extractor.hop_length
    try:
        for path in paths:
            samples = read(path, rate, hop)
            seconds = len(samples) / rate
            with progress(model, path.name):
                begin = time.perf_counter()
                text, pieces = transcribe(model, processor, samples, beam)
                took = time.perf_counter() - begin
            words = captions.words(pieces)
            result = {
                "recording": str(path),
                "text": text,
                "words": [word._asdict() for word in words],
                "seconds": round(seconds, 3),
                "seconds_taken": round(took, 3),
                "real_time_factor": round(took / seconds, 4),
                "peak_gib": round(peak(model.device), 2),
            }
            results.append(result)
            if target is not None:
                write(target, result, words)
            if not as_json:
                out().print(escape(text), soft_wrap=True)
            console.print(
                f"{escape(path.name)}: {seconds:.1f} s of audio in {took:.1f} s, "
                f"real-time factor {took / seconds:.3f}, {result['peak_gib']:.2f} GiB at most"
            )
    finally:
        if as_json and results:  # of the recordings before one that cannot be read, too
            print(json.dumps(results, indent=2))
