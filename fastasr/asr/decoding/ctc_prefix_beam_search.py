# SPDX-License-Identifier: Apache-2.0
"""Prefix beam search of CTC.

The search keeps two probabilities for each of ``beam`` prefixes: b of all paths that end in blank, and n of those that
end in the prefix's last token. It adds logarithms. A frame with probabilities p turns a prefix y into

    y       b' = (b + n) p[blank],   n' += n p[last token]
    y c     n' += (b + n) p[c],      but b p[c] for c the last token: only a blank separates it from itself

Source: Graves, "Sequence transduction with recurrent neural networks" (2012). Only the ``beam`` likeliest tokens of
each frame are considered.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastasr.asr.decoding.modified_beam_search import log_add
from fastasr.asr.decoding.results import Decoded, check_beam, check_blank, frames_of

NEVER = -math.inf


@dataclass
class Prefix:
    """Tokens, their frames, and the log-probabilities of the paths that end in blank and of the others."""

    tokens: tuple[int, ...] = ()
    timestamps: tuple[int, ...] = ()
    blank: float = NEVER
    other: float = NEVER

    @property
    def log_prob(self) -> float:
        return log_add(self.blank, self.other)


@dataclass
class CtcBeamState:
    """The prefixes of every stream, the likeliest first, and how many frames it has seen."""

    beams: list[list[Prefix]]
    frames: list[int]


class CtcPrefixBeamSearch:
    """Beam search of log-probabilities (batch, frames, vocabulary). ``beam``: prefixes that remain after a frame, and
    tokens of a frame that are considered.
    """

    def __init__(self, beam: int = 4, blank_id: int = 0) -> None:
        check_beam("CtcPrefixBeamSearch", beam)
        self.beam = beam
        self.blank_id = blank_id

    def start(self, batch_size: int = 1) -> CtcBeamState:
        return CtcBeamState([[Prefix(blank=0.0)] for _ in range(batch_size)], [0] * batch_size)

    @torch.inference_mode()
    def advance(self, state: CtcBeamState, log_probs: Tensor, lengths: Tensor | None = None) -> CtcBeamState:
        """Updates ``state`` in place by these frames, of which ``lengths`` (batch,) are valid, and returns it."""
        frames = frames_of("CtcPrefixBeamSearch", log_probs, lengths, len(state.beams))
        check_blank("CtcPrefixBeamSearch", self.blank_id, log_probs.shape[2])
        found = log_probs.float().topk(min(self.beam, log_probs.shape[2]), dim=-1)
        best, tokens = (t.tolist() for t in found)
        for n, count in enumerate(frames):
            for t in range(count):
                choices = list(zip(tokens[n][t], best[n][t], strict=True))
                state.beams[n] = self._frame(state.beams[n], choices, state.frames[n])
                state.frames[n] += 1
        return state

    def _frame(self, beam: list[Prefix], choices: list[tuple[int, float]], frame: int) -> list[Prefix]:
        found: dict[tuple[int, ...], Prefix] = {}

        def reach(tokens: tuple[int, ...], timestamps: tuple[int, ...]) -> Prefix:
            return found.setdefault(tokens, Prefix(tokens, timestamps))

        for prefix in beam:
            for token, p in choices:
                if token == self.blank_id:
                    same = reach(prefix.tokens, prefix.timestamps)
                    same.blank = log_add(same.blank, prefix.log_prob + p)
                    continue
                repeated = bool(prefix.tokens) and prefix.tokens[-1] == token
                if repeated:
                    same = reach(prefix.tokens, prefix.timestamps)
                    same.other = log_add(same.other, prefix.other + p)
                longer = reach((*prefix.tokens, token), (*prefix.timestamps, frame))
                longer.other = log_add(longer.other, (prefix.blank if repeated else prefix.log_prob) + p)
        possible = [prefix for prefix in found.values() if prefix.log_prob > NEVER]
        possible.sort(key=lambda prefix: prefix.log_prob, reverse=True)
        # A frame of NaN, or in which nothing is possible, decides nothing.
        return possible[: self.beam] or beam

    def result(self, state: CtcBeamState) -> Decoded:
        best = [beam[0] for beam in state.beams]
        return Decoded(
            [list(prefix.tokens) for prefix in best],
            [list(prefix.timestamps) for prefix in best],
            [prefix.log_prob for prefix in best],
        )


def ctc_prefix_beam_search(
    log_probs: Tensor, lengths: Tensor | None = None, beam: int = 4, blank_id: int = 0
) -> Decoded:
    """Returns the tokens of whole utterances from log_probs (batch, frames, vocabulary) and lengths (batch,)."""
    search = CtcPrefixBeamSearch(beam, blank_id)
    return search.result(search.advance(search.start(log_probs.shape[0]), log_probs, lengths))
