# SPDX-License-Identifier: Apache-2.0
"""Greedy search of a transducer: it takes the likeliest token of a frame until that token is blank.

A token changes the output of the prediction network and blank does not, so the network runs only for rows that took a
token. On the CPU one native call does all of it (:mod:`fastasr.models.transducer.label_looping`).
"""

import logging
from dataclasses import dataclass, field

import torch

from fastasr import _left
from fastasr.asr.decoding.results import Decoded, frames_of
from fastasr.asr.decoding.transducers import OnnxTransducer, as_transducer, first_context
from fastasr.models.transducer.label_looping import END, FRAME, Rules
from fastasr.models.transducer.looping_transducers import Stateless, Unserved, looping_transducer
from fastasr.ops import _dispatch

NOT_KNOWN = "the model is not made of modules of a known transducer"


@dataclass
class GreedyState:
    """The state of a batch of streams: tokens with the context before them, their frames, scores, frames so far."""

    tokens: list[list[int]]
    timestamps: list[list[int]]
    scores: list[float]
    frames: list[int]
    predictions: torch.Tensor = field(repr=False)  # (batch, joiner_dim); with label looping its state
    counters: torch.Tensor = field(repr=False)  # (batch, 0); with label looping its counters


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

    def __init__(self, model, max_sym_per_frame=None, blank_penalty=0.0, weights="fp32"):
        if max_sym_per_frame is not None and max_sym_per_frame < 1:
            raise ValueError(f"GreedySearch: max_sym_per_frame must be at least 1, got {max_sym_per_frame}")
        self.looping = looping_transducer(model)
        stateless = self.looping is None or isinstance(self.looping, Stateless)
        self.transducer = as_transducer("GreedySearch", model) if stateless else None
        own = 1 if self.looping is None else self.looping.most_symbols
        self.max_sym_per_frame = own if max_sym_per_frame is None else max_sym_per_frame
        self.blank_penalty = blank_penalty
        self.weights = weights
        self._search()

    def _search(self):
        """Returns the search by label looping, or None if the networks are called token by token."""
        self.reason = NOT_KNOWN
        try:
            found = None if self.looping is None else self.looping.looping(self.weights)
            self.reason = self.reason if found is None else found.reason
        except Unserved as reason:
            found, self.reason = None, str(reason)
        if self.transducer is not None:
            if self.reason and self.weights != "fp32":
                raise ValueError(f"GreedySearch: weights {self.weights} need the native call: {self.reason}")
            return found if not self.reason or (found and found.weights.embedding.is_cuda) else None
        if found is None:
            name = type(self.looping.model).__name__
            raise TypeError(f"GreedySearch: this {name} cannot be searched: {self.reason}")
        return found

    @torch.inference_mode()
    def start(self, batch_size=1):
        search = self._search()
        context = first_context(self.transducer or self.looping)
        if search is None:
            predictions = self.transducer.predict([context] * batch_size)
            counters = torch.zeros(batch_size, 0, dtype=torch.int64, device="cpu")
        else:
            predictions, counters = search.start(batch_size, context)
        return GreedyState(
            tokens=[list(context) for _ in range(batch_size)],
            timestamps=[[] for _ in range(batch_size)],
            scores=[0.0] * batch_size,
            frames=[0] * batch_size,
            predictions=predictions,
            counters=counters,
        )

    @torch.inference_mode()
    def advance(self, state, encoder_out, lengths=None):
        """Updates ``state`` in place by encoder_out (batch, frames, channels), of which ``lengths`` (batch,) frames are
        valid, and returns it.
        """
        frames = frames_of("GreedySearch", encoder_out, lengths, len(state.tokens))
        if state.counters.shape[1]:
            self._loop(state, encoder_out, frames)
        else:
            self._leave(self.reason)
            projected = self.transducer.project(encoder_out)
            for t in range(max(frames, default=0)):
                rows = [n for n, count in enumerate(frames) if t < count]
                for _ in range(self.max_sym_per_frame):
                    rows = self._take(state, projected[rows, t], rows, t)
                    if not rows:
                        break
        state.frames = [before + more for before, more in zip(state.frames, frames, strict=True)]
        return state

    def _loop(self, state, encoder_out, frames):
        search, model = self.looping.looping(self.weights), self.looping
        if search.reason and encoder_out.is_cpu:  # on a GPU the operations are recorded
            self._leave(search.reason)
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
            model.projected(encoder_out.to(state.predictions.device)),
            lengths,
            rules,
            state.predictions,
            state.counters,
            max(frames, default=0) * self.max_sym_per_frame,
        )
        # A jump of TDT behind these frames reaches into the next ones.
        state.counters[:, FRAME] -= lengths
        state.counters[:, END] = 0
        at = (places.unsqueeze(1) + steps.moves.cumsum(1) - steps.moves).tolist()
        tokens, scores, counts = steps.tokens.tolist(), steps.scores.tolist(), steps.counts.tolist()
        for n, count in enumerate(counts):
            state.scores[n] += sum(scores[n][:count])
            for token, t in zip(tokens[n][:count], at[n], strict=False):
                if token not in (model.blank_id, model.skipped):
                    state.tokens[n].append(token)
                    state.timestamps[n].append(state.frames[n] + t)

    def _take(self, state, frame, rows, t):
        """Takes a token in each of ``rows``; returns those that took one."""
        logits = self.transducer.join(frame, state.predictions[rows])
        if self.blank_penalty:
            logits[:, self.transducer.blank_id] -= self.blank_penalty
        best, tokens = logits.float().log_softmax(dim=-1).max(dim=-1)
        took = []
        for n, token, score in zip(rows, tokens.tolist(), best.tolist(), strict=True):
            state.scores[n] += score
            if token not in (self.transducer.blank_id, self.transducer.unk_id):
                state.tokens[n].append(token)
                state.timestamps[n].append(state.frames[n] + t)
                took.append(n)
        if took:
            contexts = [state.tokens[n][-self.transducer.context_size :] for n in took]
            state.predictions[took] = self.transducer.predict(contexts)
        return took

    def leaves(self):
        """Returns why ``advance`` does not make the native call as the model is now."""
        reason = NOT_KNOWN if self.looping is None else self.looping.why_not_native()
        return {"advance": "" if self._on_gpu() else reason}

    def _on_gpu(self):
        return self.looping is not None and any(
            p.is_cuda for part in self.looping.parts() for p in part.parameters()
        )

    def _leave(self, reason):
        # an ONNX model has no modules, and a backend was asked for
        asked_for = isinstance(self.transducer, OnnxTransducer) or _dispatch.forced_backend() not in (
            "auto",
            "cpu",
        )
        _left.note(self, reason, "advance", logging.INFO if asked_for else logging.WARNING)

    def result(self, state):
        context = (self.transducer or self.looping).context_size
        return Decoded(
            [tokens[context:] for tokens in state.tokens],
            [list(stamps) for stamps in state.timestamps],
            list(state.scores),
        )


def greedy_search(model, encoder_out, encoder_out_lens=None, max_sym_per_frame=None, blank_penalty=0.0):
    """Returns the tokens of whole utterances from encoder_out (batch, frames, channels) and lengths (batch,). See
    :class:`GreedySearch`."""
    search = GreedySearch(model, max_sym_per_frame, blank_penalty)
    return search.result(search.advance(search.start(encoder_out.shape[0]), encoder_out, encoder_out_lens))
