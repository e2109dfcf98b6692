# SPDX-License-Identifier: Apache-2.0
"""rnnt_joiner and tdt_joiner on CPU in chunks of rows: the logits of all rows exist at once only if they are kept for
the backward.

A chunk's logits are a matrix product between two passes over it: the first gathers act(am + lm), the second takes L
and the two logits of each row or, in the backward pass, replaces the logits by their gradient. Rows outside the
boundary, and in the backward pass rows whose gradients are both 0, are in no chunk. Everything is computed in float32,
or in float64 for float64 tensors. The passes are in C++ (csrc/cpu/rnnt/rnnt_joiner.h); the products are torch's or
fastasr's own. The few duration logits of a row are a product of their own, from the same hidden values.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _gemm

# Bytes of a chunk's hidden values and logits: what one pass wrote is still in the cache when the next pass reads it.
CHUNK_BYTES = 6 << 20
CHUNK_ROWS = 528

Chunk = tuple[Tensor, Tensor, Tensor]  # rows, hidden, logits


@dataclass
class Joiner:
    """The operands, contiguous and in the dtypes the kernels take."""

    am: Tensor
    lm: Tensor
    weight: Tensor  # of the tokens, as the bias
    bias: Tensor | None
    symbols: Tensor
    starts: Tensor
    boundary: Tensor | None
    seed: Tensor | None
    s_range: int
    blank: int
    activation: int
    hat: bool
    durations: int  # the number of outputs behind the tokens
    dropout: float
    duration_weight: Tensor = None
    duration_bias: Tensor | None = None

    @classmethod
    def of(cls, am, lm, weight, bias, symbols, starts, boundary, seed, *rest) -> "Joiner":
        dtype = torch.promote_types(am.dtype, lm.dtype)
        wide = torch.promote_types(torch.promote_types(dtype, weight.dtype), torch.float32)
        if wide is torch.float64:
            dtype = wide
        am, lm, weight = am.to(dtype).contiguous(), lm.to(dtype).contiguous(), weight.to(wide).contiguous()
        bias = None if bias is None else bias.to(wide).contiguous()
        boundary = None if boundary is None else boundary.contiguous()
        made = cls(am, lm, weight, bias, symbols.contiguous(), starts.contiguous(), boundary, seed, *rest)
        if made.durations:
            tokens = len(weight) - made.durations
            made.weight, made.duration_weight = weight[:tokens], weight[tokens:]
            if bias is not None:
                made.bias, made.duration_bias = bias[:tokens], bias[tokens:]
        return made

    def rows(self, *grads: Tensor) -> Tensor:
        """Returns (rows, 4): place among the results, frame, context and symbol of every row to compute."""
        return torch.ops.fastasr_cpu.rnnt_joiner_rows(
            self.starts, self.symbols, self.boundary, self.s_range, len(self.weight), *grads or (None, None)
        )

    def compute(self, rows: Tensor) -> Iterator[Chunk]:
        """Yields hidden values and logits of the rows, a chunk at a time."""
        size = self.weight.element_size() * sum(self.weight.shape)
        step = max(16, min(CHUNK_ROWS, CHUNK_BYTES // size // 16 * 16))
        for first in range(0, len(rows), step):
            chunk = rows[first : first + step]
            hidden = self.weight.new_empty(len(chunk), self.weight.shape[1])
            torch.ops.fastasr_cpu.rnnt_joiner_hidden(self.am, self.lm, chunk, self.activation, hidden)
            self.drop(chunk, hidden)
            yield chunk, hidden, _gemm.forward(hidden, self.weight, self.bias)
            del hidden  # frees it before the next chunk is made

    def drop(self, rows: Tensor, x: Tensor) -> None:
        """Applies dropout to hidden values or to their gradient, in place."""
        if self.dropout:
            torch.ops.fastasr_cpu.rnnt_joiner_dropout(rows, self.seed, self.dropout, x)

    def duration_logprobs(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.duration_weight, self.duration_bias).log_softmax(1)


def _without_autocast():
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def forward(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Chunk] | None]:
    """Returns (symbol_logprobs, blank_logprobs, duration_logprobs, L, the chunks if they are kept)."""
    *operands, need_gradients, keep = arguments
    p = Joiner.of(*operands)
    shape = (*p.starts.shape, p.s_range)
    px, py = (p.weight.new_full(shape, -torch.inf) for _ in range(2))
    durations = p.weight.new_full((*shape, p.durations), -torch.inf)
    normaliser = torch.zeros(shape, dtype=torch.float64)
    kept = [] if keep and need_gradients else None
    with _without_autocast():
        for chunk in p.compute(p.rows()):
            rows, hidden, logits = chunk
            torch.ops.fastasr_cpu.rnnt_joiner_scores(logits, rows, p.blank, p.hat, px, py, normaliser)
            if p.durations:
                durations.view(-1, p.durations)[rows[:, 0]] = p.duration_logprobs(hidden)
            if kept is not None:
                kept.append(chunk)
            del chunk, logits, hidden
    return px, py, durations, normaliser, kept


def backward(grad_symbol, grad_blank, grad_durations, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (dam, dlm, dweight, dbias), with zeros for those that are not needed."""
    *operands, normaliser, needs, kept = arguments
    p = Joiner.of(*operands)
    wide = p.weight.dtype
    gx, gy = grad_symbol.to(wide).contiguous(), grad_blank.to(wide).contiguous()
    dam, dlm = torch.zeros(p.am.shape, dtype=wide), torch.zeros(p.lm.shape, dtype=wide)
    am, lm, weight, bias = operands[:4]
    dweight, dbias = torch.zeros(weight.shape, dtype=wide), torch.zeros(len(weight), dtype=torch.float64)
    tokens, active = len(p.weight), gy
    if p.durations:
        grad_durations = grad_durations.to(wide).reshape(-1, p.durations)
        active = gy.masked_fill((grad_durations != 0).any(1).view(gy.shape), 1.0)
    with _without_autocast():
        rows = p.rows(gx, active)
        room = None
        for chunk, hidden, logits in p.compute(rows) if kept is None else _left(kept, rows):
            d = logits
            if kept is not None:  # another backward may follow, so the logits stay
                if room is None or len(room) < len(logits):
                    room = torch.empty_like(logits)
                d = room[: len(logits)]
            torch.ops.fastasr_cpu.rnnt_joiner_logits_gradient(
                logits, chunk, normaliser, gx, gy, p.blank, p.hat, d, dbias[:tokens]
            )
            if needs[2]:
                dweight[:tokens].addmm_(d.t(), hidden)
            if p.durations:
                grad = grad_durations[chunk[:, 0]]
                grad = grad - p.duration_logprobs(hidden).exp() * grad.sum(1, keepdim=True)
                dweight[tokens:].addmm_(grad.t(), hidden)
                dbias[tokens:] += grad.sum(0, dtype=torch.float64)
            if needs[0] or needs[1]:
                dhidden = _gemm.input_grad(d, p.weight)
                if p.durations:
                    dhidden.addmm_(grad, p.duration_weight)
                if p.dropout:
                    p.drop(chunk, dhidden)
                    hidden = hidden * (1 - p.dropout)  # tanh' needs what was kept as it was
                torch.ops.fastasr_cpu.rnnt_joiner_hidden_gradient(
                    dhidden, hidden, chunk, p.activation, dam, dlm
                )
                del dhidden
            del hidden, logits, d
    dbias = weight.new_empty(0) if bias is None else dbias.to(bias.dtype)
    return dam.to(am.dtype), dlm.to(lm.dtype), dweight.to(weight.dtype), dbias


def _left(kept: list[Chunk], rows: Tensor) -> Iterator[Chunk]:
    """Returns the kept chunks reduced to the rows that are among ``rows``, which has the same order."""
    begin, places = 0, rows[:, 0].contiguous()
    for chunk, hidden, logits in kept:
        if not len(chunk):
            continue
        end = int(torch.searchsorted(places, chunk[-1, 0], right=True))
        if end - begin == len(chunk):
            yield chunk, hidden, logits
        elif end > begin:
            at = torch.searchsorted(chunk[:, 0].contiguous(), places[begin:end])
            yield rows[begin:end], hidden[at], logits[at]
        begin = end
