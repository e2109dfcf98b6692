# SPDX-License-Identifier: Apache-2.0
"""Recognises many streams live with an encoder, a search over its frames, and rules for the end of a segment."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from fastasr.asr import decoding
from fastasr.asr.streaming.encoder import StreamingEncoder, in_turns

FRAME = 0.04  # seconds per frame of the encoder's output, with features every 10 ms


@dataclass(frozen=True)
class EndpointRules:
    """The rules for the end of a segment.

    A segment without tokens ends after ``silence`` seconds, one with tokens ``trailing`` seconds after the last token,
    and any segment after ``longest`` seconds. None turns a rule off.
    """

    silence: float | None = 2.4
    trailing: float | None = 1.2
    longest: float | None = 20.0

    def reached(self, frames: int, last: Any) -> bool:
        """Says whether a segment of ``frames`` frames ends here; ``last`` is the frame of its last token, None
        without.
        """
        quiet = frames * FRAME if last is None else (frames - 1 - last) * FRAME
        limit = self.silence if last is None else self.trailing
        return (limit is not None and quiet >= limit) or (
            self.longest is not None and frames * FRAME >= self.longest
        )


@dataclass
class Result:
    """The tokens of a stream's segment so far, or of the whole segment if ``final``.

    ``times`` are the times at which the tokens were decided, ``start`` is the segment's beginning and ``end`` how far
    it has been heard, all in seconds from the stream's beginning. ``text`` is the tokens' text if the recogniser has
    ``to_text``.
    """

    stream: int
    segment: int
    tokens: list[int]
    times: list[float]
    start: float
    end: float
    score: float
    text: str | None = None
    final: bool = False


@dataclass
class _Stream:
    state: object
    segment: int = 0
    first_frame: int = 0  # first frame of the segment
    frames: int = 0
    ended: bool = False
    finals: list = field(default_factory=list)


class StreamingRecogniser:
    """Runs greedy or beam search, of the transducer or CTC, over a StreamingEncoder.

        recogniser = StreamingRecogniser(model, encoder, method="beam", to_text=units.decode)
        stream = recogniser.open()
        recogniser.push(stream, samples)          # as they arrive
        for result in recogniser.advance(): ...   # one chunk of every stream that has one waiting
        recogniser.end(stream)                    # no more samples
        recogniser.finish(stream)                 # the Results of the waiting chunks

    Calls from several threads take turns.

    Args:
        model: the model with the ``decoder`` and ``joiner`` or the ``ctc_output`` that belong to the encoder.
        encoder: a StreamingEncoder of the same model.
        method: "greedy", "beam", "ctc-greedy" or "ctc-beam".
        beam: number of hypotheses of a beam search.
        to_text: a function from a list of tokens to text.
        endpoint: EndpointRules, or None for one segment per stream. A new segment begins with an empty search, but the
            encoder keeps its states.
        blank_penalty: subtracted from blank's logit in transducer searches.
    """

    def __init__(
        self,
        model: Any,
        encoder: Any,
        method: str = "greedy",
        beam: int = 4,
        to_text: Callable[[list[int]], str] | None = None,
        endpoint: EndpointRules | None = None,
        blank_penalty: float = 0.0,
    ) -> None:
        if not isinstance(encoder, StreamingEncoder):
            raise TypeError(
                f"StreamingRecogniser: encoder must be a StreamingEncoder, got {type(encoder).__name__}"
            )
        if method not in decoding.METHODS:
            raise ValueError(
                f"StreamingRecogniser: method must be one of {', '.join(decoding.METHODS)}, got {method!r}"
            )
        if model.training:
            raise ValueError("StreamingRecogniser: the model is in training mode: call model.eval()")
        self.encoder = encoder
        self.head = None
        if method.startswith("ctc-"):
            self.head = getattr(model, "ctc_output", None)
            if self.head is None:
                raise ValueError(f"StreamingRecogniser: this {type(model).__name__} has no CTC output")
        self.search = decoding.METHODS[method](model, beam, blank_penalty)
        self.to_text = to_text
        self.endpoint = endpoint
        self._streams: dict[int, Any] = {}
        self._turn = threading.RLock()
        self.seconds = {"encoder": 0.0, "search": 0.0}

    # ------------------------------------------------------------------ streams
    @in_turns
    def open(self) -> int:
        """Opens a stream and returns its number. Raises RuntimeError if the encoder has no free slot."""
        stream = self.encoder.open()
        self._streams[stream] = _Stream(self.search.start(1))
        return stream

    @in_turns
    def close(self, stream: int) -> None:
        """Closes a stream and drops its results."""
        self._of("close", stream)
        del self._streams[stream]
        self.encoder.close(stream)

    @in_turns
    def reset(self, stream: int) -> None:
        """Puts the stream back to its beginning."""
        self._of("reset", stream)
        self.encoder.reset(stream)
        self._streams[stream] = _Stream(self.search.start(1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        for stream in list(self._streams):
            self.close(stream)

    @property
    def streams(self) -> list[int]:
        return list(self._streams)

    def _of(self, function: str, stream: int) -> Any:
        found = self._streams.get(stream)
        if found is None:
            raise ValueError(f"{function}: this recogniser has no open stream {stream!r}")
        return found

    # ------------------------------------------------------------------ samples and words
    def push(self, stream: int, samples: Tensor, rate: int | None = None) -> int:
        """Adds samples to a stream. Returns how many of its chunks wait for ``advance``."""
        self._of("push", stream)
        return self.encoder.push(stream, samples, rate)

    @in_turns
    def end(self, stream: int) -> int:
        """Ends the samples of a stream. Returns how many of its chunks wait for ``advance``."""
        self._of("end", stream).ended = True
        return self.encoder.end(stream)

    @in_turns
    def advance(self, streams: Any = None) -> list[Result]:
        """Recognises one waiting chunk of each of ``streams`` (default: all) and returns a Result for each.

        A Result is final if the segment ends with this chunk: at an endpoint, or at the last chunk after ``end``.
        """
        mine = self.streams if streams is None else [s for s in streams if self._of("advance", s)]
        began = time.perf_counter()
        streams, encoder_out = self.encoder.advance(mine)
        middle = time.perf_counter()
        results = self.accept(streams, encoder_out)
        self.seconds["encoder"] += middle - began
        self.seconds["search"] += time.perf_counter() - middle
        return results

    @in_turns
    @torch.inference_mode()
    def accept(self, streams: Any, encoder_out: Tensor, lengths: Tensor | None = None) -> list[Result]:
        """Does the same as ``advance`` for given encoder output (n, frames, channels) and lengths (n,)."""
        if not streams:
            return []
        kept = [self._of("accept", stream) for stream in streams]
        frames = encoder_out if self.head is None else self.head(encoder_out)
        state = self.search.advance(decoding.join_states([one.state for one in kept]), frames, lengths)
        counts = (
            [frames.shape[1]] * len(kept)
            if lengths is None
            else torch.as_tensor(lengths, device="cpu").tolist()
        )
        for one, part, count in zip(kept, decoding.split_state(state), counts, strict=True):
            one.state = part
            one.frames += count
        waiting = set(self.encoder.ready)  # An error of to_text below loses no stream's frames.
        return [
            self._result(stream, one, last=one.ended and stream not in waiting)
            for stream, one in zip(streams, kept, strict=True)
        ]

    @in_turns
    def finish(self, stream: int) -> list[Result]:
        """Ends a stream and recognises its waiting chunks. Returns their Results, of which the last is final: the
        segment so far if no chunk waits. It is empty if every segment is already final.
        """
        self.end(stream)
        results = []
        while stream in self.encoder.ready:
            results += self.advance([stream])
        one = self._of("finish", stream)
        if not results and (one.frames > one.first_frame or not one.finals):
            results.append(self._result(stream, one, last=True))
        return results

    def result(self, stream: int) -> Result:
        """Returns the Result of the stream's current segment so far."""
        return self._made(stream, self._of("result", stream))

    def finals(self, stream: int) -> list[Result]:
        """Returns the stream's final Results so far."""
        return list(self._of("finals", stream).finals)

    def _result(self, stream: int, one: Any, last: Any) -> Result:
        made = self._made(stream, one)
        frames = one.frames - one.first_frame
        decided = round(made.times[-1] / FRAME) - one.first_frame if made.times else None
        if last or (self.endpoint is not None and self.endpoint.reached(frames, decided)):
            made.final = True
            one.finals.append(made)
            one.segment += 1
            one.first_frame = one.frames
            one.state = self.search.start(1)
        return made

    def _made(self, stream: int, one: Any) -> Result:
        found = self.search.result(one.state)
        tokens, frames = found.tokens[0], found.timestamps[0]
        return Result(
            stream,
            one.segment,
            tokens,
            [(one.first_frame + frame) * FRAME for frame in frames],
            one.first_frame * FRAME,
            one.frames * FRAME,
            found.scores[0],
            None if self.to_text is None else self.to_text(tokens),
        )
