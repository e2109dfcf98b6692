# SPDX-License-Identifier: Apache-2.0
"""Beam search of a transducer with at most one token per frame.

After each frame the ``beam`` likeliest of all (hypothesis, token) pairs remain; pairs that lead to the same
tokens are one hypothesis, whose probability is the sum. All hypotheses of a batch go through the networks
together. The result is the hypothesis with the highest log-probability per token, where the context before the
first token counts as tokens too.
"""

import math
from dataclasses import dataclass

import torch

from fastasr.decoding.results import Decoded, check_beam, frames_of
from fastasr.decoding.transducers import as_transducer, first_context


@dataclass
class Hypothesis:
    """Tokens with the context before them, the frames of the tokens, and the log-probability of all its paths."""

    tokens: tuple[int, ...]
    timestamps: tuple[int, ...]
    log_prob: float


@dataclass
class BeamState:
    """The hypotheses of every stream, and how many frames it has seen."""

    beams: list[list[Hypothesis]]
    frames: list[int]


class ModifiedBeamSearch:
    """Beam search of ``model``.

    Args:
        beam: hypotheses that remain after a frame.
        temperature: divides the logits.
        blank_penalty: subtracted from blank's logit.
    """

    def __init__(self, model, beam=4, temperature=1.0, blank_penalty=0.0):
        check_beam("ModifiedBeamSearch", beam)
        if temperature <= 0:
            raise ValueError(f"ModifiedBeamSearch: temperature must be above 0, got {temperature}")
        self.transducer = as_transducer("ModifiedBeamSearch", model)
        self.beam = beam
        self.temperature = temperature
        self.blank_penalty = blank_penalty

    def start(self, batch_size=1):
        first = Hypothesis(tuple(first_context(self.transducer)), (), 0.0)
        return BeamState([[first] for _ in range(batch_size)], [0] * batch_size)

    @torch.inference_mode()
    def advance(self, state, encoder_out, lengths=None):
        """Updates ``state`` in place by encoder_out (batch, frames, channels), of which ``lengths`` (batch,) frames are
        valid, and returns it.
        """
        frames = frames_of("ModifiedBeamSearch", encoder_out, lengths, len(state.beams))
        projected = self.transducer.project(encoder_out)
        for t in range(max(frames, default=0)):
            self._frame(state, projected[:, t], [n for n, count in enumerate(frames) if t < count])
        return state

    def _frame(self, state, frame, rows):
        hypotheses = [hypothesis for n in rows for hypothesis in state.beams[n]]
        owners = [n for n in rows for _ in state.beams[n]]
        context = self.transducer.context_size
        predictions = self.transducer.predict([list(h.tokens[-context:]) for h in hypotheses])
        logits = self.transducer.join(frame[owners], predictions)
        if self.blank_penalty:
            logits[:, self.transducer.blank_id] -= self.blank_penalty
        log_probs = (logits.float() / self.temperature).log_softmax(dim=-1)
        log_probs += torch.tensor([h.log_prob for h in hypotheses], device=log_probs.device).unsqueeze(1)
        vocabulary = log_probs.shape[1]
        first = 0
        for n in rows:
            beam = state.beams[n]
            scores = log_probs[first : first + len(beam)].flatten()
            best, pairs = scores.topk(min(self.beam, scores.numel()))
            first += len(beam)
            choices = [
                (*divmod(pair, vocabulary), p) for pair, p in zip(pairs.tolist(), best.tolist(), strict=True)
            ]
            state.beams[n] = self._merged(beam, choices, state.frames[n])
            state.frames[n] += 1

    def _merged(self, beam, choices, frame):
        """Returns the hypotheses after (hypothesis, token, log-probability) ``choices``, the likeliest first."""
        found = {}
        for index, token, log_prob in choices:
            old = beam[index]
            if token in (self.transducer.blank_id, self.transducer.unk_id):
                new = Hypothesis(old.tokens, old.timestamps, log_prob)
            else:
                new = Hypothesis((*old.tokens, token), (*old.timestamps, frame), log_prob)
            same = found.setdefault(new.tokens, new)
            if same is not new:
                same.log_prob = log_add(same.log_prob, log_prob)
        return list(found.values())

    def result(self, state):
        best = [max(beam, key=lambda h: h.log_prob / len(h.tokens)) for beam in state.beams]
        context = self.transducer.context_size
        return Decoded(
            [list(h.tokens[context:]) for h in best],
            [list(h.timestamps) for h in best],
            [h.log_prob for h in best],
        )


def log_add(a, b):
    """Returns log(e^a + e^b)."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def modified_beam_search(
    model, encoder_out, encoder_out_lens=None, beam=4, temperature=1.0, blank_penalty=0.0
):
    """Returns the tokens of whole utterances from encoder_out (batch, frames, channels) and lengths (batch,)."""
    search = ModifiedBeamSearch(model, beam, temperature, blank_penalty)
    return search.result(search.advance(search.start(encoder_out.shape[0]), encoder_out, encoder_out_lens))
