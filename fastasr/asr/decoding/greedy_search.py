# SPDX-License-Identifier: Apache-2.0
"""Greedy search of a transducer: it takes the likeliest token of a frame until that token is blank.

A token changes the output of the prediction network and blank does not, so the network runs only for rows that took a
token. On the CPU one native call does all of it (:mod:`fastasr.models.transducer.label_looping`).
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastasr import _left
from fastasr.asr.decoding.predictors import OnnxPredictor, require_predictor
from fastasr.asr.decoding.results import Decoded, frames_of
from fastasr.models.transducer.label_looping import END, FRAME, LabelLooping, Rules
from fastasr.models.transducer.predictors import RecurrentPredictor
from fastasr.ops import _dispatch


@dataclass
class GreedyState:
    """The state of a batch of streams: tokens with the context before them, their frames, scores, frames so far."""

    tokens: list[list[int]]
    timestamps: list[list[int]]
    scores: list[float]
    frames: list[int]
    states: Tensor = field(repr=False)  # the predictor's
    counters: Tensor = field(repr=False)  # (batch, 0); with label looping its counters


class GreedySearch:
    """Greedy search of ``model``: an AsrModel, an ONNX model, torchaudio's RNN-T, or transformers' ParakeetForRNNT or
    ParakeetForTDT, whose durations move the search. ``encoder_out`` is the output of the encoder, not projected.

    Args:
        max_sym_per_frame: the most tokens that one frame may give. None: 1, for Parakeet its ``max_symbols_per_step``,
            for torchaudio's RNN-T 10.
        blank_penalty: subtracted from blank's logit, so that fewer tokens are deleted.
        weights: "fp32", or "bf16", "fp16" or "int8", the storage of the matrices in the native call.

    ``reason`` says why the native call does not serve: "" if it does.

    Raises:
        TypeError: the model is no transducer that can be searched. ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: Any,
        max_sym_per_frame: int | None = None,
        blank_penalty: float = 0.0,
        weights: str = "fp32",
    ) -> None:
        if max_sym_per_frame is not None and max_sym_per_frame < 1:
            raise ValueError(f"GreedySearch: max_sym_per_frame must be at least 1, got {max_sym_per_frame}")
        self.predictor = require_predictor("GreedySearch", model)
        self.max_sym_per_frame = max_sym_per_frame or self.predictor.most_symbols
        self.blank_penalty = blank_penalty
        self.weights = weights
        self._find_search()

    def _find_search(self) -> LabelLooping | None:
        """Returns the search by label looping, or None if the networks are called token by token."""
        search, self.reason = self.predictor.find_search(self.weights)
        if isinstance(self.predictor, RecurrentPredictor):
            return search or self.predictor.require_search("GreedySearch", self.weights)
        if self.reason and self.weights != "fp32":
            raise ValueError(f"GreedySearch: weights {self.weights} need the native call: {self.reason}")
        return search if not self.reason or self._is_on_gpu() else None

    def _is_on_gpu(self) -> bool:
        return self.predictor.device.type == "cuda"

    @torch.inference_mode()
    def start(self, batch_size: int = 1) -> GreedyState:
        context, search = self.predictor.first_context, self._find_search()
        if search is None:
            states = self.predictor.step([context] * batch_size, [None] * batch_size)
            counters = torch.zeros(batch_size, 0, dtype=torch.int64, device="cpu")
        else:
            states, counters = search.start(batch_size, context)
        return GreedyState(
            tokens=[list(context) for _ in range(batch_size)],
            timestamps=[[] for _ in range(batch_size)],
            scores=[0.0] * batch_size,
            frames=[0] * batch_size,
            states=states,
            counters=counters,
        )

    @torch.inference_mode()
    def advance(self, state: GreedyState, encoder_out: Tensor, lengths: Tensor | None = None) -> GreedyState:
        """Updates ``state`` in place by encoder_out (batch, frames, channels), of which ``lengths`` (batch,) frames are
        valid, and returns it.
        """
        frames = frames_of("GreedySearch", encoder_out, lengths, len(state.tokens))
        if state.counters.shape[1]:
            self._loop(state, encoder_out, frames)
        else:
            self._leave(self.reason)
            projected = self.predictor.project(encoder_out)
            for t in range(max(frames, default=0)):
                rows = [n for n, count in enumerate(frames) if t < count]
                for _ in range(self.max_sym_per_frame):
                    rows = self._take(state, projected[rows, t], rows, t)
                    if not rows:
                        break
        state.frames = [before + more for before, more in zip(state.frames, frames, strict=True)]
        return state

    def _loop(self, state: GreedyState, encoder_out: Tensor, frames: list[int]) -> None:
        model = self.predictor
        search = model.require_search("GreedySearch", self.weights)
        if search.why_not and encoder_out.is_cpu:  # on a GPU the operations are recorded
            self._leave(search.why_not)
        rules = Rules(
            blank=model.blank_id,
            durations=model.durations,
            skipped=model.skipped,
            most_symbols=self.max_sym_per_frame,
            blank_penalty=self.blank_penalty,
            scored=True,
        )
        places = state.counters[:, FRAME].clone()
        lengths = torch.tensor(frames, device=places.device, dtype=torch.int64)
        steps = search.search(
            model.project(encoder_out),
            lengths,
            rules,
            state.states,
            state.counters,
            max(frames, default=0) * self.max_sym_per_frame,
        )
        # A jump of TDT behind these frames reaches into the next ones.
        state.counters[:, FRAME] -= lengths
        state.counters[:, END] = 0
        at = (places.unsqueeze(1) + steps.moves.cumsum(1) - steps.moves).tolist()
        found: Any = steps
        tokens, scores, counts = (t.tolist() for t in (found.tokens, found.scores, found.counts))
        for n, count in enumerate(counts):
            state.scores[n] += sum(scores[n][:count])
            for token, t in zip(tokens[n][:count], at[n], strict=False):
                if token not in (model.blank_id, model.skipped):
                    state.tokens[n].append(token)
                    state.timestamps[n].append(state.frames[n] + t)

    def _take(self, state: GreedyState, frames: Tensor, rows: list[int], t: int) -> list[int]:
        """Takes a token in each of ``rows``; returns those that took one."""
        predictor = self.predictor
        logits = predictor.join(frames, state.states[rows])
        if self.blank_penalty:
            logits[:, predictor.blank_id] -= self.blank_penalty
        best, tokens = logits.float().log_softmax(dim=-1).max(dim=-1)
        took = []
        for n, token, score in zip(rows, tokens.tolist(), best.tolist(), strict=True):
            state.scores[n] += score
            if token not in (predictor.blank_id, predictor.skipped):
                state.tokens[n].append(token)
                state.timestamps[n].append(state.frames[n] + t)
                took.append(n)
        if took:
            contexts = [state.tokens[n][-predictor.context_size :] for n in took]
            state.states[took] = predictor.step(contexts, state.states[took].unbind())
        return took

    def leaves(self) -> dict[str, str]:
        """Returns why ``advance`` does not make the native call as the model is now."""
        return {"advance": "" if self._is_on_gpu() else self.predictor.why_not_native()}

    def _leave(self, why_not: str) -> None:
        # an ONNX model has no modules, and a backend was asked for
        asked_for = isinstance(self.predictor, OnnxPredictor) or _dispatch.forced_backend() not in (
            "auto",
            "cpu",
        )
        _left.note(self, why_not, "advance", logging.INFO if asked_for else logging.WARNING)

    def result(self, state: GreedyState) -> Decoded:
        context = self.predictor.context_size
        return Decoded(
            [tokens[context:] for tokens in state.tokens],
            [list(stamps) for stamps in state.timestamps],
            list(state.scores),
        )


def greedy_search(
    model: Any,
    encoder_out: Tensor,
    encoder_out_lens: Tensor | None = None,
    max_sym_per_frame: int | None = None,
    blank_penalty: float = 0.0,
) -> Decoded:
    """Returns the tokens of whole utterances from encoder_out (batch, frames, channels) and lengths (batch,). See
    :class:`GreedySearch`."""
    search = GreedySearch(model, max_sym_per_frame, blank_penalty)
    return search.result(search.advance(search.start(encoder_out.shape[0]), encoder_out, encoder_out_lens))
