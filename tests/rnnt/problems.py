# SPDX-License-Identifier: Apache-2.0
"""Transducer problems: scores, symbols and boundaries of random ragged batches, and sums over all paths."""

import itertools
import math
from dataclasses import dataclass

import torch
from steps import numbers
from torch import Tensor

TYPES = ("regular", "modified", "constrained")


@dataclass
class Problem:
    lm: Tensor  # (B, S + 1, C)
    am: Tensor  # (B, T, C)
    symbols: Tensor  # (B, S)
    blank: int
    boundary: Tensor | None

    @property
    def full(self) -> Tensor:
        """Returns logits (B, T, S + 1, C) of a joiner that is not additive."""
        return torch.tanh(self.am.unsqueeze(2) + self.lm.unsqueeze(1)) * 2

    def whole(self) -> Tensor:
        (batch, frames), length = self.am.shape[:2], self.symbols.shape[1]
        return torch.tensor([[0, 0, length, frames]] * batch) if self.boundary is None else self.boundary


def random_problem(seed: int, *, ragged: bool = True, dtype=torch.float64) -> Problem:
    """Returns up to 4 sequences, 7 symbols, 14 frames, 9 classes; T_b >= S_b, as upstream needs for all types."""
    g = numbers(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    batch, length, classes = draw(1, 4), draw(1, 7), draw(2, 9)
    frames = length + draw(0, 7)
    boundary = None
    if ragged:
        rows = []
        for _ in range(batch):
            symbols = draw(1, length)
            rows.append([0, 0, symbols, draw(symbols, frames)])
        boundary = torch.tensor(rows)
    return Problem(
        2.0 * torch.randn(batch, length + 1, classes, generator=g, dtype=dtype),
        2.0 * torch.randn(batch, frames, classes, generator=g, dtype=dtype),
        torch.randint(0, classes, (batch, length), generator=g),
        draw(0, classes - 1),
        boundary,
    )


def logits_loss(logits: Tensor, symbols, blank: int, rnnt_type: str, hat: bool = False) -> float:
    """Returns −log of the sum over all paths of one sequence's probabilities, path by path; logits (T, S + 1, C)."""
    frames, positions, _ = logits.shape
    length = positions - 1
    if hat:
        blanks = torch.nn.functional.logsigmoid(logits[..., blank])
        others = logits.clone()
        others[..., blank] = -math.inf
        emit = others - others.logsumexp(-1, keepdim=True) + (blanks - logits[..., blank]).unsqueeze(-1)
    else:
        emit = logits.log_softmax(-1)
        blanks = emit[..., blank]
    total = []
    steps = frames + length if rnnt_type == "regular" else frames
    for emitting in itertools.combinations(range(steps), length):
        s = t = 0
        score = 0.0
        for step in range(steps):
            if t >= frames:  # a symbol after the last frame
                score = -math.inf
                break
            if step in emitting:
                score += float(emit[t, s, symbols[s]])
                s += 1
                if rnnt_type == "constrained":
                    score += float(blanks[t, s])
                t += rnnt_type != "regular"
            else:
                score += float(blanks[t, s])
                t += 1
        total.append(score)
    return -torch.tensor(total, dtype=torch.float64).logsumexp(0).item() if total else math.inf
