# SPDX-License-Identifier: Apache-2.0
"""Runs many streams through one encoder chunk by chunk, for live recognition."""

import copy
import functools
import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

import torch
from torch import Tensor

from fastasr import _left
from fastasr.asr.decoding.chunks import RIGHT_CONTEXT, SILENCE
from fastasr.asr.export.wrappers import width
from fastasr.asr.streaming.backend import EagerBackend, EncoderPair
from fastasr.asr.streaming.cuda_graph import CudaGraphBackend
from fastasr.asr.streaming.features import StreamFeatures, frames_out, with_silence
from fastasr.asr.streaming.identify import identify
from fastasr.ops import _kept
from fastasr.ops._weight_formats import FORMATS

BACKENDS = ("native", "cuda graph", "eager")
_PROBE = 3  # chunks over which the error of rounded weights is measured
_GROUPS = 64  # groups of parameters: each step looks for changes in one of them

P = ParamSpec("P")
R = TypeVar("R")


class _Shared(Protocol):
    _turn: Any


S = TypeVar("S", bound=_Shared)


def in_turns(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Has calls of an object's methods from several threads take turns: they share its scratch memory and its slots."""

    @functools.wraps(method)
    def call(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._turn:
            return method(self, *args, **kwargs)

    return call


@dataclass
class EngineReport:
    """The chosen backend with the reason, the bytes that it holds, and the error of rounded weights.

    ``error`` is the rms difference from the model's own output in fp32, relative to that output's rms, on noise; it is
    None for fp32 weights. ``released`` counts the bytes of the model's weights that were freed.
    """

    backend: str
    reason: str
    origin: str
    weights: str
    weights_bytes: int
    streams_bytes: int
    max_streams: int
    released: int
    seconds: float
    error: float | None = None

    def __str__(self) -> str:
        lines = [
            f"backend {self.backend}: {self.reason}",
            f"model: code of {self.origin}",
            f"weights {self.weights}: {self.weights_bytes / 2**20:.1f} MiB packed in {self.seconds:.2f} s, "
            f"{self.released / 2**20:.1f} MiB of the model released",
            f"states: {self.streams_bytes / 2**20:.1f} MiB for {self.max_streams} streams",
        ]
        if self.error is not None:
            lines.append(f"{self.weights} weights change the output by {self.error:.1e} of its rms, on noise")
        return "\n".join(lines)


class StreamingEncoder:
    """The encoder of a model for up to ``max_streams`` streams at once; made by ``from_model``.

        encoder = StreamingEncoder.from_model(model, chunk_size=16, left_context_frames=128)
        i, j = encoder.open(), encoder.open()
        y, lengths = encoder.step(features, [i, j])     # (2, 45, 80) -> (2, 8, channels)
        encoder.close(j)

    A call takes a chunk of any subset of the open streams, which may be of any age. Calls from several threads take
    turns. Values that are not finite stay in their own stream and disappear with ``reset``.

    As long as the model lives, a step reads its weights again where they have changed, and streams go on. The first
    step after a change of all parameters notices it; a change of few may take 64 steps, and some need
    :func:`fastasr.refresh` (:mod:`fastasr.ops._kept`).
    """

    def __init__(
        self,
        backend: Any,
        found: Any,
        chunk_size: int,
        left_context_frames: int,
        max_streams: int,
        rate: int,
        bins: int,
        high_freq: float,
    ) -> None:
        self._backend = backend
        self.report: EngineReport | None = None
        self.refusal: str | None = None  # why the native backend, if it was tried, does not serve
        self.chunk_size, self.left_context_frames = chunk_size, left_context_frames
        self.max_streams, self.rate, self.bins = max_streams, rate, bins
        self.channels = found.channels
        self.frames_per_chunk = 2 * chunk_size + RIGHT_CONTEXT
        self._high_freq = high_freq
        self._free = list(range(max_streams - 1, -1, -1))
        self._slots: dict[int, int] = {}  # stream -> slot
        self._audio: dict[int, StreamFeatures] = {}
        self._opened = 0
        self._turn = threading.RLock()
        # set if the engine has a copy that may become old
        self._model: _Parameters | None = None
        self._device: torch.device | None = None

    @classmethod
    def from_model(
        cls,
        model: Any,
        chunk_size: int,
        left_context_frames: int,
        weights: str = "fp32",
        device: torch.device | str | None = None,
        max_streams: int = 8,
        release_weights: bool = False,
        threads: int = 1,
        backend: str | None = None,
        rate: int = 16000,
        bins: int | None = None,
        high_freq: float = -400.0,
    ) -> Self:
        """Packs ``model.encoder`` and ``model.encoder_embed``, ours or upstream's, in eval mode and float32.

        Args:
            chunk_size, left_context_frames: values that the model was trained with, in frames of 20 ms.
            weights: "fp32", "bf16", "fp16" or "int8", the storage of the large matrices.
            device: the device to run on; the model's own by default.
            max_streams: number of streams that can be open at once; their states are allocated here.
            release_weights: whether to free the model's own weights; the model cannot be used afterwards.
            threads: CPU threads of a call.
            backend: "native", "cuda graph" or "eager"; by default the fastest one that supports the model. "eager"
                runs the model's own code and needs no known version of it.
            rate, bins, high_freq: parameters of the features that ``push`` computes; bins default to the front end's.

        Raises TypeError if ``model`` has no encoder or front end, ValueError with the reason if no backend supports it.
        """
        if weights not in FORMATS:
            raise ValueError(
                f"StreamingEncoder: weights must be one of {', '.join(FORMATS)}, got {weights!r}"
            )
        for name, value in (("max_streams", max_streams), ("threads", threads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"StreamingEncoder: {name} must be an int of 1 or more, got {value!r}")
        if backend is not None and backend not in BACKENDS:
            raise ValueError(
                f"StreamingEncoder: backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
            )
        found = identify(model, chunk_size, left_context_frames, foreign=backend == "eager")
        bins = _checked_bins(found, bins)
        pair = _on_device(EncoderPair(found.encoder, found.encoder_embed), device)
        began = time.perf_counter()
        options = (chunk_size, left_context_frames, weights, max_streams, threads)
        made, why, refusal = _choose(backend, pair, options, release_weights)
        seconds = time.perf_counter() - began
        encoder = cls(made, found, chunk_size, left_context_frames, max_streams, rate, bins, high_freq)
        encoder.refusal = refusal
        error = None
        if weights != "fp32":
            error = _rounding_error(made, pair, chunk_size, left_context_frames, bins)
        if release_weights:
            made.release(pair)
        else:
            encoder._model = _Parameters(found.encoder, found.encoder_embed)
            encoder._device = next(pair.parameters()).device
        encoder.report = EngineReport(
            made.name,
            why if refusal is None else f"native does not serve: {refusal}",
            found.origin,
            weights,
            made.weights_bytes,
            made.streams_bytes,
            max_streams,
            made.released,
            seconds,
            error,
        )
        return encoder

    # ------------------------------------------------------------------ streams
    @property
    def streams(self) -> list[int]:
        """Returns the open streams in the order of their opening."""
        return list(self._slots)

    @in_turns
    def open(self) -> int:
        """Opens a stream and returns its number. Raises RuntimeError if ``max_streams`` are open."""
        if not self._free:
            raise RuntimeError(
                f"StreamingEncoder: all {self.max_streams} streams are open: close one, or make the "
                f"engine with a larger max_streams"
            )
        stream, slot = self._opened, self._free.pop()
        self._opened += 1
        self._backend.reset(slot)
        self._slots[stream] = slot
        return stream

    @in_turns
    def close(self, stream: int) -> None:
        """Ends a stream; its number is never used again."""
        self._free.append(self._slot("close", stream))
        del self._slots[stream]
        self._audio.pop(stream, None)

    @in_turns
    def reset(self, stream: int) -> None:
        """Puts the stream back to its beginning and drops the samples that wait."""
        self._backend.reset(self._slot("reset", stream))
        self._audio.pop(stream, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        for stream in self.streams:
            self.close(stream)

    def _slot(self, function: str, stream: int) -> int:
        slot = self._slots.get(stream)
        if slot is None:
            known = isinstance(stream, int) and 0 <= stream < self._opened
            raise ValueError(f"{function}: stream {stream!r} {'is closed' if known else 'was never opened'}")
        return slot

    # ------------------------------------------------------------------ features
    @in_turns
    def step(self, features: Tensor, streams: Iterable[int], lengths: Any = None) -> tuple[Tensor, Tensor]:
        """Encodes the next chunk of each of ``streams``.

        Args:
            features: (n, 2 chunk_size + 13, bins), float32; the next chunk begins 2 chunk_size frames later. Fewer
                frames mean the end of an utterance and are padded with silence.
            streams: n different open streams.
            lengths: frames of each row before silence; all by default.

        Returns (encoder_out (n, frames, channels), lengths (n,)). A chunk gives chunk_size / 2 frames, fewer where the
        features end.
        """
        streams = list(streams)
        slots = [self._slot("step", stream) for stream in streams]
        if len(set(slots)) != len(slots):
            raise ValueError(f"step: every stream may be there once, got {streams}")
        features, lengths = self._checked(features, len(slots), lengths)
        if not slots:
            none = torch.zeros(0, self.chunk_size // 2, self.channels, dtype=torch.float32, device="cpu")
            return none, torch.zeros(0, dtype=torch.int64, device="cpu")
        if self.refusal is not None:
            _left.note(self, self.refusal, "step")
        if self._model is not None and (changed := self._model.changed()) is not None:
            self._backend.load(_as_at_first(EncoderPair(*changed), self._device))
            self._model = _Parameters(*changed)
        y = self._backend.step(features, slots)
        frames = [frames_out(length, self.chunk_size) for length in lengths]
        longest = max(frames)
        lengths = torch.tensor(frames, dtype=torch.int64, device="cpu")
        return (y if longest == y.shape[1] else y[:, :longest]), lengths

    def _checked(self, features: Tensor, n: int, lengths: Any) -> tuple[Tensor, list[int]]:
        if not isinstance(features, torch.Tensor) or features.dtype != torch.float32:
            found = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
            raise TypeError(f"step: features must be a float32 tensor, got {found}")
        frames = self.frames_per_chunk
        if (
            features.ndim != 3
            or features.shape[0] != n
            or features.shape[2] != self.bins
            or not 1 <= features.shape[1] <= frames
        ):
            raise ValueError(
                f"step: features of {n} streams must be ({n}, {frames}, {self.bins}), fewer frames at an "
                f"utterance's end, got {tuple(features.shape)}"
            )
        given = features.shape[1]
        features = with_silence(features.detach(), frames)
        if lengths is None:
            return features, [given] * n
        lengths = torch.as_tensor(lengths, device="cpu").tolist()
        if len(lengths) != n or not all(0 <= length <= given for length in lengths):
            raise ValueError(f"step: expected {n} lengths of at most {given} frames, got {lengths}")
        short = [row for row, length in enumerate(lengths) if length < given]
        if short:
            features = features.clone()
            for row in short:
                features[row, lengths[row] :] = SILENCE
        return features, lengths

    def leaves(self) -> dict[str, str]:
        """Returns why ``step`` does not run the native backend, if that was tried."""
        return {"step": self.refusal or ""}

    # ------------------------------------------------------------------ samples
    @in_turns
    def push(self, stream: int, samples: Any, rate: int | None = None) -> int:
        """Adds samples, floats in [-1, 1] or int16, to a stream. Returns how many of its chunks wait."""
        self._slot("push", stream)
        audio = self._audio.get(stream)
        if audio is None:
            audio = StreamFeatures(self.rate, self.bins, self.chunk_size, self._high_freq)
            self._audio[stream] = audio
        audio.push(samples, rate)
        return len(audio)

    @in_turns
    def end(self, stream: int) -> int:
        """Ends the samples of a stream and makes chunks of the rest. Returns how many of its chunks wait."""
        self._slot("end", stream)
        audio = self._audio.get(stream)
        if audio is None:
            return 0
        audio.end()
        return len(audio)

    @property
    def ready(self) -> list[int]:
        """Returns the streams for which a chunk of pushed samples waits."""
        return [stream for stream, audio in list(self._audio.items()) if len(audio)]

    @in_turns
    def advance(self, streams: Iterable[int] | None = None) -> tuple[list[int], Tensor]:
        """Encodes one waiting chunk of each of ``streams`` (default: all). Returns (the streams that had one,
        encoder_out (n, chunk_size / 2, channels)). All frames count, even those of the silence at the end, because the
        search decides the last words there.
        """
        if streams is not None:
            streams = set(streams)
        ready = [stream for stream in self.ready if streams is None or stream in streams]
        features = (
            torch.stack([self._audio[stream].next() for stream in ready])
            if ready
            else torch.zeros(0, self.frames_per_chunk, self.bins, dtype=torch.float32, device="cpu")
        )
        encoder_out = self.step(features, ready)[0]
        for stream in ready:  # Only now: if the step raises an error, the chunks wait for the next call.
            self._audio[stream].take()
        return ready, encoder_out

    # ------------------------------------------------------------------ states
    @in_turns
    def export_states(self, stream: int) -> list[Tensor]:
        """Returns the stream's states in the form of upstream's streaming wrapper, for a batch of one."""
        return self._backend.export_states(self._slot("export_states", stream))

    @in_turns
    def import_states(self, stream: int, states: Iterable[Tensor]) -> None:
        """Makes the stream continue from these states, ours or upstream's. Raises ValueError if they do not fit."""
        self._backend.import_states(self._slot("import_states", stream), list(states))


class _Parameters:
    """The parameters of an encoder and its front end, in groups at random, so that each has some of most layers.

    A look at 800 parameters would take 1.2 ms, of the 5 ms of a step in int8; a look at one group takes 0.06 ms.
    """

    def __init__(self, *parts: Any) -> None:
        self._parts = [weakref.ref(part, self._forget()) for part in parts]
        owners = [m._parameters for part in parts for m in part.modules()]
        places = [(owner, name) for owner in owners for name, p in owner.items() if p is not None]
        random.Random(0).shuffle(places)
        groups = [places[i::_GROUPS] for i in range(_GROUPS)]
        originals = (_kept.Originals([owner[name] for owner, name in g], parts=_kept.PARTS) for g in groups)
        pairs = zip(groups, originals, strict=True)
        self._groups: Iterator | None = itertools.cycle([pair for pair in pairs if pair[0]])

    def _forget(self) -> Callable[[Any], None]:
        """Returns what frees the parameters when their module dies."""
        this = weakref.ref(self)

        def forget(_: Any) -> None:
            if (parameters := this()) is not None:
                parameters._groups = None

        return forget

    def changed(self) -> list | None:
        """Returns the two modules if parameters of the next group have changed and were not freed, else None."""
        if self._groups is None:
            return None
        places, originals = next(self._groups)
        now = [owner.get(name) for owner, name in places]
        replaced = any(p is None for p in now)  # by a parametrisation, for example
        if not replaced and originals.unchanged(now):
            return None
        if not replaced and not all(p.numel() for p in now):  # by another engine's release_weights
            self._groups = None
            return None
        return [part() for part in self._parts]


def _checked_bins(found: Any, bins: int | None) -> int:
    if bins is None:
        return found.bins
    if not isinstance(bins, int) or width(bins) != found.encoder_embed.out_width:
        raise ValueError(f"StreamingEncoder: the front end does not take {bins!r} bins, rather {found.bins}")
    return bins


def _on_device(pair: Any, device: torch.device | str | None) -> EncoderPair:
    """Returns the pair, or a copy of it on ``device`` if it is elsewhere."""
    own = next(pair.parameters()).device
    device = own if device is None else torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"StreamingEncoder: there is no CUDA device for device={device}")
    if device.type == own.type and device.index in (None, own.index):
        return pair
    return copy.deepcopy(pair).to(device)


def _as_at_first(pair: Any, device: torch.device | None) -> EncoderPair:
    """Returns the pair, or a copy of it in eval mode in float32 on ``device``, as it was when the engine was made."""
    same = all(p.device == device and p.dtype is torch.float32 for p in pair.parameters())
    if same and not any(module.training for module in (pair.encoder, pair.encoder_embed)):
        return pair
    return copy.deepcopy(pair).to(device, torch.float32).eval()


def _choose(wanted: str | None, pair: Any, options: tuple, release: bool) -> tuple[Any, str, str | None]:
    """Returns (backend, why it was chosen, why the native one does not serve or None). Raises ValueError if no backend
    supports the request."""
    device = next(pair.parameters()).device
    if wanted is None and device.type == "cuda":
        wanted, why = "cuda graph", "the model is on a GPU"
    elif wanted is None:
        why = "the model is on a CPU"
    else:
        why = "it was asked for"
    refusal = None
    if wanted in (None, "native"):
        made, refusal = _native(pair, options, device)
        if made is not None:
            return made, why, None
        if wanted == "native":
            raise ValueError(f"StreamingEncoder: the native backend cannot serve: {refusal}")
    if release:
        reason = refusal or f"the {wanted} backend runs the model's own"
        raise ValueError(f"StreamingEncoder: release_weights needs packed weights: {reason}")
    if wanted == "cuda graph":
        if device.type != "cuda":
            raise ValueError(f"StreamingEncoder: CUDA graphs need a model on a GPU, this one is on {device}")
        return CudaGraphBackend(pair, *options), why, None
    return EagerBackend(pair, *options), why, refusal


def _native(pair: Any, options: tuple, device: torch.device) -> tuple[Any, str | None]:
    """Returns (NativeBackend, None), or (None, reason) if it does not support the model."""
    if device.type != "cpu":
        return None, f"it runs on CPUs, the model is on {device}"
    try:
        from fastasr.asr.streaming.native import NativeBackend
    except ImportError as error:
        return None, str(error)
    try:
        return NativeBackend(pair, *options), None
    except NotImplementedError as error:
        return None, str(error)


@torch.inference_mode()
def _rounding_error(backend: Any, pair: Any, chunk_size: int, left_context_frames: int, bins: int) -> float:
    """Returns the rms difference from the model's own output in fp32, relative to its rms, on chunks of noise."""
    exact = EagerBackend(pair, chunk_size, left_context_frames)
    generator = torch.Generator().manual_seed(0)
    frames = 2 * chunk_size + RIGHT_CONTEXT
    difference = total = torch.zeros((), dtype=torch.float64, device="cpu")
    for _ in range(_PROBE):
        noise = torch.randn(1, frames, bins, generator=generator, dtype=torch.float32, device="cpu")
        features = noise * 3 - 6  # like log-mel energies
        y, x = backend.step(features, [0]).double().cpu(), exact.step(features, [0]).double().cpu()
        difference, total = difference + (y - x).square().sum(), total + x.square().sum()
    backend.reset(0)
    return float((difference / total).sqrt())
