# SPDX-License-Identifier: Apache-2.0
"""Greedy search of a transducer: it takes the likeliest token of a frame until that token is blank.

It takes at most ``max_sym_per_frame`` tokens from a frame. A token changes what the prediction network says of the
following ones and blank does not, so the network runs only for rows that took a token.
"""

from dataclasses import dataclass, field

import torch

from fastasr.decoding.results import Decoded, frames_of
from fastasr.decoding.transducers import as_transducer, first_context


@dataclass
class GreedyState:
    """Where a batch of streams stands: tokens with the context before them, their frames, scores, frames so far."""

    tokens: list[list[int]]
    timestamps: list[list[int]]
    scores: list[float]
    frames: list[int]
    predictions: torch.Tensor = field(repr=False)  # (batch, joiner_dim)


class GreedySearch:
    """Greedy search of ``model``.

    Args:
        max_sym_per_frame: the most tokens that one frame may give.
        blank_penalty: subtracted from blank's logit, so that fewer tokens are deleted.
    """

    def __init__(self, model, max_sym_per_frame=1, blank_penalty=0.0):
        if max_sym_per_frame < 1:
            raise ValueError(f"GreedySearch: max_sym_per_frame must be at least 1, got {max_sym_per_frame}")
        self.transducer = as_transducer("GreedySearch", model)
        self.max_sym_per_frame = max_sym_per_frame
        self.blank_penalty = blank_penalty

    @torch.inference_mode()
    def start(self, batch_size=1):
        context = first_context(self.transducer)
        return GreedyState(
            tokens=[list(context) for _ in range(batch_size)],
            timestamps=[[] for _ in range(batch_size)],
            scores=[0.0] * batch_size,
            frames=[0] * batch_size,
            predictions=self.transducer.predict([context] * batch_size),
        )

    @torch.inference_mode()
    def advance(self, state, encoder_out, lengths=None):
        """Updates ``state`` in place by encoder_out (batch, frames, channels), of which ``lengths`` (batch,) frames are
        valid, and returns it.
        """
        frames = frames_of("GreedySearch", encoder_out, lengths, len(state.tokens))
        projected = self.transducer.project(encoder_out)
        for t in range(max(frames, default=0)):
            rows = [n for n, count in enumerate(frames) if t < count]
            for _ in range(self.max_sym_per_frame):
                rows = self._take(state, projected[rows, t], rows, t)
                if not rows:
                    break
        state.frames = [before + more for before, more in zip(state.frames, frames, strict=True)]
        return state

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

    def result(self, state):
        context = self.transducer.context_size
        return Decoded(
            [tokens[context:] for tokens in state.tokens],
            [list(stamps) for stamps in state.timestamps],
            list(state.scores),
        )


def greedy_search(model, encoder_out, encoder_out_lens=None, max_sym_per_frame=1, blank_penalty=0.0):
    """Returns the tokens of whole utterances from encoder_out (batch, frames, channels) and lengths (batch,)."""
    search = GreedySearch(model, max_sym_per_frame, blank_penalty)
    return search.result(search.advance(search.start(encoder_out.shape[0]), encoder_out, encoder_out_lens))
