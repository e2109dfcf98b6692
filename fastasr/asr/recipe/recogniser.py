# SPDX-License-Identifier: Apache-2.0
"""Transcribes recordings, whole or as streams, with a trained model from its checkpoint or its ONNX files."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastasr import files
from fastasr.asr import decoding
from fastasr.asr.audio.features import resample
from fastasr.asr.export import OnnxStreamingCtcModel, OnnxStreamingTransducerModel
from fastasr.asr.recipe import checkpoints, sizes, speech
from fastasr.asr.recipe.transducers import Transducer
from fastasr.asr.recipe.units import Units
from fastasr.asr.recogniser import SymbolTable

DESCRIPTION = "recogniser.json"  # the file beside the ONNX files


@dataclass
class Recogniser:
    """A trained model with its units and features.

    ``model`` is an AsrModel or another encoder's Transducer in eval mode, or a pair of streaming ONNX models,
    (transducer, CTC).
    """

    model: object
    units: Units
    rate: int
    bins: int

    def search(self, method: str, beam: int = 4) -> tuple[Any, Any]:
        """Returns the stream encoder and the search of ``method``, which is "greedy", "beam", "ctc-greedy" or
        "ctc-beam". Raises ValueError if the model does not stream.
        """
        search, model, ctc = self._search(method, beam), self._model(method), method.startswith("ctc-")
        if isinstance(model, Transducer):
            return model.stream(ctc), search
        return decoding.ChunkEncoder(model, ctc=ctc), search

    def _model(self, method: str) -> Any:
        return self.model[method.startswith("ctc-")] if isinstance(self.model, tuple) else self.model

    def _search(self, method: str, beam: int) -> Any:
        if method not in decoding.METHODS:
            raise ValueError(f"method must be one of {', '.join(decoding.METHODS)}, got {method!r}")
        return decoding.METHODS[method](self._model(method), beam, 0.0)

    def samples(self, path: Path | str, convert: bool = False) -> Tensor:
        """Returns a recording's samples at the model's rate. It resamples another rate if ``convert`` is set and raises
        ValueError otherwise."""
        clip = speech.read_wav(path)
        if clip.rate != self.rate:
            if not convert:
                raise ValueError(
                    f"{path}: the recording has {clip.rate} Hz, the model wants {self.rate} Hz (--resample converts)"
                )
            return resample(clip.samples, clip.rate, self.rate)
        return clip.samples

    def stream(
        self, parts: Iterable[Tensor], method: str = "greedy", beam: int = 4
    ) -> Iterator[tuple[str, decoding.Decoded]]:
        """Yields (text so far, Decoded) after every chunk. ``parts`` yields pieces of samples as they arrive."""
        computer = speech.features_of_stream(self.rate, self.bins)

        def features() -> Iterator[Tensor]:
            for part in parts:
                yield computer.accept(part)
            yield computer.finish()

        yield from self.stream_features(features(), method, beam)

    def stream_features(
        self, parts: Iterable[Tensor], method: str = "greedy", beam: int = 4
    ) -> Iterator[tuple[str, decoding.Decoded]]:
        """Does the same as ``stream`` for pieces of features (frames, bins)."""
        encoder, search = self.search(method, beam)
        chunks = decoding.FeatureChunks(encoder.chunk_size, encoder.right_context)
        state = search.start()

        def advanced(state: Any, ready: list[Tensor]) -> tuple[Any, tuple[str, decoding.Decoded]]:
            for chunk in ready:
                state = search.advance(state, encoder(chunk.unsqueeze(0)))
            result = search.result(state)
            return state, (self.units.decode(result.tokens[0]), result)

        for part in parts:
            ready = chunks.accept(part)
            if ready:
                state, found = advanced(state, ready)
                yield found
        _, found = advanced(state, chunks.finish())
        yield found

    def transcribe(
        self, samples: Tensor, method: str = "greedy", beam: int = 4
    ) -> tuple[str, decoding.Decoded]:
        """Returns (text, Decoded) of a whole recording. PyTorch models encode it at once, ONNX models in chunks."""
        if isinstance(self.model, tuple):
            return list(self.stream([samples], method, beam))[-1]
        return self.transcribe_features(speech.fbank(samples, self.rate, self.bins), method, beam)

    def transcribe_features(
        self, x: Tensor, method: str = "greedy", beam: int = 4
    ) -> tuple[str, decoding.Decoded]:
        """Returns (text, Decoded) of a whole recording's features (frames, bins), which a PyTorch model encodes at
        once."""
        search = self._search(method, beam)
        # A stream ends with this much silence, which the front end needs for the last word's frames.
        x = torch.nn.functional.pad(x, (0, 0, 0, 32), value=decoding.chunks.SILENCE).unsqueeze(0)
        lengths = torch.tensor([x.shape[1]], dtype=torch.int64, device="cpu")
        y, y_lens = decoding.encode(self.model, x, lengths, ctc=method.startswith("ctc-"))
        result = search.result(search.advance(search.start(), y, y_lens))
        return self.units.decode(result.tokens[0]), result


def disagreements(
    one: Recogniser, other: Recogniser, utterances: Sequence[speech.Utterance], method: str = "greedy"
) -> list[tuple[str, ...]]:
    """Returns [(name, text, other text)] for the utterances that two recognisers transcribe differently as streams."""
    found = []
    for utterance in utterances:
        texts = [list(r.stream_features([utterance.features[0]], method))[-1][0] for r in (one, other)]
        if texts[0] != texts[1]:
            found.append((utterance.name, *texts))
    return found


def load(path: Path | str) -> Recogniser:
    """Loads a Recogniser from a checkpoint or from a folder that ``export`` wrote. Raises ValueError if it cannot."""
    path = Path(path)
    if path.is_dir() and (path / DESCRIPTION).is_file():
        return _load_onnx(path)
    if path.is_dir():
        path = path / checkpoints.NAME
    found = checkpoints.load(path)
    try:
        model = sizes.build(sizes.streaming(found["arguments"])).eval()
        model.load_state_dict(found["model_avg"], strict=True)
        units = _units_for(model.vocab_size, Units.from_state_dict(found["units"]), path)
        return Recogniser(model, units, found["features"]["rate"], found["features"]["bins"])
    except RuntimeError as error:
        raise ValueError(f"the checkpoint {path} does not fit its model: {error}") from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint {path} is damaged: {type(error).__name__}: {error}") from None


def _units_for(vocabulary: int, units: Units, path: Path | str) -> Units:
    """Returns the units if each token of the model is one of them. Raises ValueError otherwise."""
    if len(units) != vocabulary:
        raise ValueError(f"{path} has {len(units)} tokens, its model {vocabulary}: they are of another model")
    return units


def export(path: Path | str, folder: Path | str) -> dict[str, Path]:
    """Writes the ONNX files of a checkpoint, its tokens and the description that ``load`` reads."""
    from fastasr.asr.export import export_onnx

    recogniser = load(path)
    if isinstance(recogniser.model, tuple):
        raise ValueError(f"{path} is exported already")
    if isinstance(recogniser.model, Transducer):
        raise ValueError(
            f"{path} holds {recogniser.model.NAME}: ONNX files are those of streaming Zipformers, which sherpa-onnx "
            f"loads, and there is no such format for its states"
        )
    folder = Path(folder)
    # A folder without its description is not loaded, so files of two models never mix, whenever this process ends.
    (folder / DESCRIPTION).unlink(missing_ok=True)
    written = export_onnx(recogniser.model, folder, feature_dim=recogniser.bins)
    recogniser.units.table.to_file(folder / "tokens.txt")
    description = {"rate": recogniser.rate, "bins": recogniser.bins}
    files.write(folder / DESCRIPTION, json.dumps(description))
    return written


def _load_onnx(folder: Path) -> Recogniser:
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        rate, bins = int(description["rate"]), int(description["bins"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{folder / DESCRIPTION} is damaged: {type(error).__name__}: {error}") from None
    encoder, decoder, joiner = (folder / f"{name}.onnx" for name in ("encoder", "decoder", "joiner"))
    transducer = OnnxStreamingTransducerModel(encoder, decoder, joiner)
    ctc = OnnxStreamingCtcModel(folder / "ctc.onnx")
    tokens = folder / "tokens.txt"
    units = _units_for(transducer.vocab_size, Units(SymbolTable.from_file(tokens)), tokens)
    return Recogniser((transducer, ctc), units, rate, bins)
