# SPDX-License-Identifier: Apache-2.0
"""Greedy search of CTC: it takes the likeliest token of each frame, merges repetitions and drops blanks.

A token's timestamp is the first of its frames. Between chunks the state remembers the last frame's token, blank
included: a repetition across the boundary is one token, the same token after a blank is another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastasr.asr.decoding.results import Decoded, check_blank, frames_of


@dataclass
class CtcGreedyState:
    """Tokens, their frames, scores, the token of the last frame and the number of frames, per stream."""

    tokens: list[list[int]]
    timestamps: list[list[int]]
    scores: list[float]
    last: list[int]
    frames: list[int]


class CtcGreedySearch:
    """Greedy search of log-probabilities (batch, frames, vocabulary): ``model.ctc_output``'s or an ONNX CTC model's."""

    def __init__(self, blank_id: int = 0) -> None:
        self.blank_id = blank_id

    def start(self, batch_size: int = 1) -> CtcGreedyState:
        tokens: list[list[int]] = [[] for _ in range(batch_size)]
        times: list[list[int]] = [[] for _ in range(batch_size)]
        return CtcGreedyState(
            tokens, times, [0.0] * batch_size, [self.blank_id] * batch_size, [0] * batch_size
        )

    @torch.inference_mode()
    def advance(
        self, state: CtcGreedyState, log_probs: Tensor, lengths: Tensor | None = None
    ) -> CtcGreedyState:
        """Updates ``state`` in place by these frames, of which ``lengths`` (batch,) are valid, and returns it."""
        frames = frames_of("CtcGreedySearch", log_probs, lengths, len(state.tokens))
        check_blank("CtcGreedySearch", self.blank_id, log_probs.shape[2])
        scores, best = (t.tolist() for t in log_probs.max(dim=-1))
        for n, count in enumerate(frames):
            last = state.last[n]
            for t, token in enumerate(best[n][:count]):
                if token not in (last, self.blank_id):
                    state.tokens[n].append(token)
                    state.timestamps[n].append(state.frames[n] + t)
                last = token
            state.last[n] = last
            state.scores[n] += sum(scores[n][:count])
            state.frames[n] += count
        return state

    def result(self, state: CtcGreedyState) -> Decoded:
        return Decoded(
            [list(x) for x in state.tokens], [list(x) for x in state.timestamps], list(state.scores)
        )


def ctc_greedy_search(log_probs: Tensor, lengths: Tensor | None = None, blank_id: int = 0) -> Decoded:
    """Returns the tokens of whole utterances from log_probs (batch, frames, vocabulary) and lengths (batch,)."""
    search = CtcGreedySearch(blank_id)
    return search.result(search.advance(search.start(log_probs.shape[0]), log_probs, lengths))
