# SPDX-License-Identifier: Apache-2.0
"""CTC prefix scores, with which ESPnet's and SpeechBrain's searches combine those of a decoder, on a CPU.

The score of a hypothesis h = g c is the logarithm of ψ(h), the probability that CTC's output begins with h (Algorithm 2
of Watanabe et al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", 2017):

    ψ(g c) = Σ_t φ_t−1(g, c) p_t(c),        φ_t(g, c) = γⁿ_t(g) + γᵇ_t(g), without γⁿ if c is g's last token,

where frames up to t give g and end with its last token (γⁿ) or with a blank (γᵇ). Upstream computes γ of all
candidates, frame by frame. But ψ needs γ of g alone, and so it is a product of matrices for all tokens; γ is computed
for the candidates alone that a search chooses. Numbers are of float64, because a product has no logarithms.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 12  # tokens of which logarithms are added at a time
_SMALL = -690.0  # Below e to this power float64 loses digits.


class Hypotheses(NamedTuple):
    """log γⁿ and log γᵇ (n, T), log ψ (n), and the last tokens (n)."""

    token: Tensor
    blank: Tensor
    score: Tensor
    last: Tensor


@dataclass
class Scores:
    """Scores of all continuations of some hypotheses: log ψ (n, V). ``length``: how many tokens the latter have.
    ``candidates``: the tokens (n, S) that have scores, if not all."""

    of: Hypotheses
    length: int
    table: Tensor
    candidates: Tensor | None


class PrefixScores:
    """``x``: log-probabilities (B, T, V) of recordings, where upstream has masked padding. ``ends``: their last frames
    (B). ``lowest``: what upstream has for the logarithm of 0. ``column``: the place of the candidate whose γ upstream
    gives a token that is none of them."""

    def __init__(self, x: Tensor, ends: Tensor, blank: int, end: int, lowest: float, column: int) -> None:
        self._x = x.transpose(1, 2).contiguous()
        self._ends, self._blank, self._end, self._lowest, self._column = ends, blank, end, lowest, column

    @functools.cached_property
    def _probabilities(self) -> Tensor:
        return self._x.double().exp_()

    def start(self, last: Tensor) -> Hypotheses:
        """Returns hypotheses without tokens but the first one, which is none of CTC's."""
        blank = self._x[:, self._blank].double().cumsum(1).repeat_interleave(len(last) // len(self._x), 0)
        return Hypotheses(torch.full_like(blank, self._lowest), blank, torch.zeros_like(blank[:, 0]), last)

    def scores(self, of: Hypotheses, length: int, candidates: Tensor | None) -> Scores:
        """Returns the scores of the continuations of ``of`` by all tokens, or by ``candidates`` (n, S)."""
        rows, start = len(of.last), max(1, length)
        recordings, last = self._recordings(rows), of.last[:, None]
        both = torch.logaddexp(of.token, of.blank)
        before = both[:, start - 1 : -1]
        after_blank = torch.logsumexp(of.blank[:, start - 1 : -1] + self._of_tokens(of.last)[:, start:], 1)
        if candidates is None:
            found = self._of_all(before, start).scatter_(1, last, after_blank[:, None])
        else:
            places = candidates + recordings[:, None] * self._x.shape[1]
            x = self._x.flatten(0, 1)[places][..., start:]
            found = torch.logsumexp(before[:, None] + x, 2)
            found = torch.where(candidates == last, after_blank[:, None], found)
        if length == 0:
            first = self._x[..., 0].double()[recordings]
            found = torch.logaddexp(found, first if candidates is None else first.gather(1, candidates))
        if candidates is not None:
            found = found.new_full((rows, self._x.shape[1]), self._lowest).scatter_(1, candidates, found)
        found[:, self._end] = both.gather(1, self._ends[recordings, None]).squeeze(1)
        if self._end != self._blank:
            found[:, self._blank] = self._lowest
        return Scores(of, length, found.clamp_(min=self._lowest), candidates)

    def chosen(self, scores: Scores, rows: Tensor, tokens: Tensor) -> Hypotheses:
        """Returns the hypotheses ``rows`` (n) of ``scores``, continued by ``tokens`` (n)."""
        token, blank, _, last = (t.index_select(0, rows) for t in scores.of)
        scored = tokens
        if scores.candidates is not None:
            candidates = scores.candidates.index_select(0, rows)
            is_one = (candidates == tokens[:, None]).any(1)
            scored = torch.where(is_one, tokens, candidates[:, self._column])
        repeated = (scored == last)[:, None]
        before = torch.where(repeated, blank, torch.logaddexp(token, blank))
        recordings = torch.div(rows * len(self._x), len(scores.of.last), rounding_mode="floor")
        x, empty = self._x[recordings, scored].double(), self._x[recordings, self._blank].double()
        start, first = max(1, scores.length), scores.length == 0
        found = torch.ops.fastasr_cpu.ctc_prefix_forward.default(x, empty, before, start, first, self._lowest)
        return Hypotheses(found[0], found[1], scores.table[rows, tokens], tokens)

    def _recordings(self, rows: int) -> Tensor:
        """Returns the recording of each hypothesis."""
        each = torch.arange(len(self._x), dtype=torch.int64, device="cpu")
        return each.repeat_interleave(rows // len(self._x))

    def _of_tokens(self, tokens: Tensor) -> Tensor:
        """Returns the log-probabilities (n, T) of a token of each hypothesis."""
        return self._x[self._recordings(len(tokens)), tokens].double()

    def _of_all(self, before: Tensor, start: int) -> Tensor:
        """Returns Σ_t φ_t−1 p_t (n, V) of all tokens, as logarithms, without regard to repeated ones. ``before``: log φ
        of the frames from ``start`` - 1 on (n, T)."""
        if not before.shape[1]:
            return before.new_full((len(before), self._x.shape[1]), -torch.inf)
        top = before.amax(1, keepdim=True).clamp_(min=self._lowest)  # -inf would make NaN of its difference
        share = (before - top).exp_().unflatten(0, (len(self._x), -1))
        found = (share @ self._probabilities[..., start:].mT).flatten(0, 1).log_()
        recordings = self._recordings(len(found))
        small = (found < _SMALL) & (start <= self._ends[recordings])[:, None]  # and frames are left
        found += top
        for rows, tokens in zip(*(t.split(_CHUNK) for t in small.nonzero(as_tuple=True)), strict=True):
            x = self._x[recordings[rows], tokens, start:]
            found[rows, tokens] = torch.logsumexp(before[rows] + x, 1)
        return found
