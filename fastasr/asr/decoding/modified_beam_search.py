# SPDX-License-Identifier: Apache-2.0
"""Beam search of a transducer with at most one token per frame, and of a TDT, whose tokens and blanks have durations.

A step takes, of each sequence, the hypotheses that stand on the earliest frame. Of all their pairs with a token, in a
TDT their triples with a token and a duration, the ``beam`` likeliest remain; then the ``beam`` likeliest of these and
of the hypotheses that wait on later frames. Those with equal tokens on the same frame are one hypothesis, whose
probability is the sum. Without durations each token and each blank moves on by a frame. In a TDT (Xu et al., 2023) the
duration moves a hypothesis as it moves greedy search, which is the search with a beam of 1.

All hypotheses of a batch go through the networks together. The result is the hypothesis with the highest
log-probability per token, summed over the frames where it stands; the context before the first token counts as tokens
too.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastasr.asr.decoding.predictors import require_predictor
from fastasr.asr.decoding.results import Decoded, check_beam, frames_of


@dataclass
class Hypothesis:
    """Tokens with the context before them, the frames of the tokens, the log-probability of all its paths, the frame on
    which it stands, the tokens that it emitted there, the predictor's state, and whether the predictor has yet to read
    the last token.
    """

    tokens: tuple[int, ...]
    timestamps: tuple[int, ...]
    log_prob: float
    frame: int = 0
    symbols: int = 0
    state: Any = field(default=None, repr=False)  # a tensor, or None before the first token
    pending: bool = True


@dataclass
class BeamState:
    """The hypotheses of every stream, the likeliest first, and how many frames it has seen."""

    beams: list[list[Hypothesis]]
    frames: list[int]


class ModifiedBeamSearch:
    """Beam search of ``model``: an AsrModel, an ONNX model, torchaudio's RNN-T, or transformers' ParakeetForRNNT or
    ParakeetForTDT.

    Args:
        beam: hypotheses that remain after a step.
        temperature: divides the logits.
        blank_penalty: subtracted from blank's logit.
        max_sym_per_frame: for a TDT alone, the tokens of duration 0 on a frame after which it moves on by 1. None: the
            model's own.

    Raises:
        TypeError: the model is no transducer that can be searched. ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: Any,
        beam: int = 4,
        temperature: float = 1.0,
        blank_penalty: float = 0.0,
        max_sym_per_frame: int | None = None,
    ) -> None:
        check_beam("ModifiedBeamSearch", beam)
        if temperature <= 0:
            raise ValueError(f"ModifiedBeamSearch: temperature must be above 0, got {temperature}")
        self.predictor = require_predictor("ModifiedBeamSearch", model)
        self.predictor.prepare("ModifiedBeamSearch")
        self.durations = self.predictor.durations
        if max_sym_per_frame is not None and (max_sym_per_frame < 1 or not self.durations):
            raise ValueError(
                "ModifiedBeamSearch: max_sym_per_frame: expected None, or at least 1 for a TDT, "
                f"got {max_sym_per_frame}"
            )
        self.max_sym_per_frame = max_sym_per_frame or (self.predictor.most_symbols if self.durations else 1)
        self.beam = beam
        self.temperature = temperature
        self.blank_penalty = blank_penalty

    def start(self, batch_size: int = 1) -> BeamState:
        first = Hypothesis(tuple(self.predictor.first_context), (), 0.0)
        return BeamState([[first] for _ in range(batch_size)], [0] * batch_size)

    @torch.inference_mode()
    def advance(self, state: BeamState, encoder_out: Tensor, lengths: Tensor | None = None) -> BeamState:
        """Updates ``state`` in place by encoder_out (batch, frames, channels), of which ``lengths`` (batch,) frames are
        valid, and returns it.
        """
        frames = frames_of("ModifiedBeamSearch", encoder_out, lengths, len(state.beams))
        self.predictor.prepare("ModifiedBeamSearch")  # weights may have changed since the last call
        projected = self.predictor.project(encoder_out)
        ends = [before + more for before, more in zip(state.frames, frames, strict=True)]
        while True:
            earliest = [min(h.frame for h in beam) for beam in state.beams]
            rows = [n for n, t in enumerate(earliest) if t < ends[n]]
            if not rows:
                break
            at = [earliest[n] - state.frames[n] for n in rows]
            self._step(state, projected[rows, at], rows, [earliest[n] for n in rows])
        state.frames = ends
        return state

    def _step(self, state: BeamState, frames: Tensor, rows: list[int], earliest: list[int]) -> None:
        """Moves the hypotheses of ``rows`` that stand on their ``earliest`` frames, whose features are ``frames``."""
        here = [[h for h in state.beams[n] if h.frame == t] for n, t in zip(rows, earliest, strict=True)]
        hypotheses = [h for standing in here for h in standing]
        owners = [row for row, standing in enumerate(here) for _ in standing]
        logits = self.predictor.join(frames[owners], self._read_tokens(hypotheses))
        outputs = logits.shape[1] - len(self.durations)
        if self.blank_penalty:
            logits[:, self.predictor.blank_id] -= self.blank_penalty
        logits = logits.float() / self.temperature
        log_probs = logits[:, :outputs].log_softmax(dim=-1)
        if self.durations:
            of_durations = logits[:, outputs:].log_softmax(dim=-1)
            log_probs = (log_probs.unsqueeze(2) + of_durations.unsqueeze(1)).flatten(1)
        log_probs += torch.tensor(
            [h.log_prob for h in hypotheses], device=log_probs.device, dtype=torch.float32
        ).unsqueeze(1)
        first = 0
        for n, t, standing in zip(rows, earliest, here, strict=True):
            scores = log_probs[first : first + len(standing)].flatten()
            best, places = scores.topk(min(self.beam, scores.numel()))
            first += len(standing)
            moved = [
                self._move(standing[place // log_probs.shape[1]], place % log_probs.shape[1], p)
                for place, p in zip(places.tolist(), best.tolist(), strict=True)
            ]
            waiting = [h for h in state.beams[n] if h.frame > t]
            state.beams[n] = self._merge(waiting + moved)

    def _read_tokens(self, hypotheses: list[Hypothesis]) -> Tensor:
        """Returns the predictor's states (hypotheses, floats) after the last tokens."""
        context = self.predictor.context_size
        late = [h for h in hypotheses if h.pending]
        if late:
            states = self.predictor.step([h.tokens[-context:] for h in late], [h.state for h in late])
            for h, new in zip(late, states, strict=True):
                h.state, h.pending = new, False
        return torch.stack([h.state for h in hypotheses])

    def _move(self, old: Hypothesis, choice: int, log_prob: float) -> Hypothesis:
        """Returns the hypothesis after a choice of token and duration."""
        token, which = divmod(choice, len(self.durations) or 1)
        move = self.durations[which] if self.durations else 1
        if token in (self.predictor.blank_id, self.predictor.skipped):
            to = old.frame + max(move, 1)
            return Hypothesis(old.tokens, old.timestamps, log_prob, to, 0, old.state, old.pending)
        symbols = 0 if move else old.symbols + 1
        if symbols == self.max_sym_per_frame:
            move, symbols = 1, 0
        tokens, timestamps = (*old.tokens, token), (*old.timestamps, old.frame)
        return Hypothesis(tokens, timestamps, log_prob, old.frame + move, symbols, old.state)

    def _merge(self, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """Returns the likeliest hypotheses, the likeliest first."""
        found: dict[tuple[tuple[int, ...], int], Hypothesis] = {}
        for new in sorted(hypotheses, key=lambda h: h.log_prob, reverse=True):
            same = found.setdefault((new.tokens, new.frame), new)
            if same is not new:
                same.log_prob = log_add(same.log_prob, new.log_prob)
        return sorted(found.values(), key=lambda h: h.log_prob, reverse=True)[: self.beam]

    def result(self, state: BeamState) -> Decoded:
        best = [max(_merge_frames(beam), key=lambda h: h.log_prob / len(h.tokens)) for beam in state.beams]
        context = self.predictor.context_size
        return Decoded(
            [list(h.tokens[context:]) for h in best],
            [list(h.timestamps) for h in best],
            [h.log_prob for h in best],
        )


def _merge_frames(beam: list[Hypothesis]) -> Collection[Hypothesis]:
    """Returns one hypothesis for all with the same tokens, with the log-probability of them all."""
    found: dict[tuple[int, ...], Hypothesis] = {}
    for h in beam:
        same = found.setdefault(h.tokens, Hypothesis(h.tokens, h.timestamps, -math.inf))
        same.log_prob = log_add(same.log_prob, h.log_prob)
    return found.values()


def log_add(a: float, b: float) -> float:
    """Returns log(e^a + e^b)."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def modified_beam_search(
    model: Any,
    encoder_out: Tensor,
    encoder_out_lens: Tensor | None = None,
    beam: int = 4,
    temperature: float = 1.0,
    blank_penalty: float = 0.0,
    max_sym_per_frame: int | None = None,
) -> Decoded:
    """Returns the tokens of whole utterances from encoder_out (batch, frames, channels) and lengths (batch,). See
    :class:`ModifiedBeamSearch`."""
    search = ModifiedBeamSearch(model, beam, temperature, blank_penalty, max_sym_per_frame)
    return search.result(search.advance(search.start(encoder_out.shape[0]), encoder_out, encoder_out_lens))
