# SPDX-License-Identifier: Apache-2.0
"""rnnt_joiner on CPU in chunks of rows: the logits of all rows exist at once only if they are kept for the backward.

A chunk's logits are a matrix product between two passes over it: the first gathers act(am + lm), the second takes L
and the two logits of each row or, in the backward pass, replaces the logits by their gradient. Rows outside the
boundary, and in the backward pass rows whose gradients are both 0, are in no chunk. Everything is computed in float32,
or in float64 for float64 tensors. The passes are in C++ (csrc/cpu/rnnt/rnnt_joiner.h); the products are torch's or
fastasr's own.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
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
    weight: Tensor
    bias: Tensor | None
    symbols: Tensor
    starts: Tensor
    boundary: Tensor | None
    s_range: int
    blank: int
    activation: int
    hat: bool

    @classmethod
    def of(cls, am, lm, weight, bias, symbols, starts, boundary, *rest) -> "Joiner":
        dtype = torch.promote_types(am.dtype, lm.dtype)
        wide = torch.promote_types(torch.promote_types(dtype, weight.dtype), torch.float32)
        if wide is torch.float64:
            dtype = wide
        am, lm, weight = am.to(dtype).contiguous(), lm.to(dtype).contiguous(), weight.to(wide).contiguous()
        bias = None if bias is None else bias.to(wide).contiguous()
        boundary = None if boundary is None else boundary.contiguous()
        return cls(am, lm, weight, bias, symbols.contiguous(), starts.contiguous(), boundary, *rest)

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
            yield chunk, hidden, _gemm.forward(hidden, self.weight, self.bias)
            del hidden  # frees it before the next chunk is made


def _without_autocast():
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def forward(*arguments) -> tuple[Tensor, Tensor, Tensor, list[Chunk] | None]:
    """Returns (symbol_logprobs, blank_logprobs, L, the chunks if they are kept)."""
    *operands, need_gradients, keep = arguments
    p = Joiner.of(*operands)
    shape = (*p.starts.shape, p.s_range)
    px, py = (p.weight.new_full(shape, -torch.inf) for _ in range(2))
    normaliser = torch.zeros(shape, dtype=torch.float64)
    kept = [] if keep and need_gradients else None
    with _without_autocast():
        for chunk in p.compute(p.rows()):
            rows, _, logits = chunk
            torch.ops.fastasr_cpu.rnnt_joiner_scores(logits, rows, p.blank, p.hat, px, py, normaliser)
            if kept is not None:
                kept.append(chunk)
            del chunk, logits, _
    return px, py, normaliser, kept


def backward(grad_symbol, grad_blank, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (dam, dlm, dweight, dbias), with zeros for those that are not needed."""
    *tensors, normaliser, s_range, blank, activation, hat, needs, kept = arguments
    p = Joiner.of(*tensors, s_range, blank, activation, hat)
    wide = p.weight.dtype
    gx, gy = grad_symbol.to(wide).contiguous(), grad_blank.to(wide).contiguous()
    dam, dlm = torch.zeros(p.am.shape, dtype=wide), torch.zeros(p.lm.shape, dtype=wide)
    dweight, dbias = torch.zeros_like(p.weight), torch.zeros(len(p.weight), dtype=torch.float64)
    with _without_autocast():
        rows = p.rows(gx, gy)
        room = None
        for chunk, hidden, logits in p.compute(rows) if kept is None else _left(kept, rows):
            d = logits
            if kept is not None:  # another backward may follow, so the logits stay
                if room is None or len(room) < len(logits):
                    room = torch.empty_like(logits)
                d = room[: len(logits)]
            torch.ops.fastasr_cpu.rnnt_joiner_logits_gradient(
                logits, chunk, normaliser, gx, gy, p.blank, p.hat, d, dbias
            )
            if needs[2]:
                dweight.addmm_(d.t(), hidden)
            if needs[0] or needs[1]:
                dhidden = _gemm.input_grad(d, p.weight)
                torch.ops.fastasr_cpu.rnnt_joiner_hidden_gradient(
                    dhidden, hidden, chunk, p.activation, dam, dlm
                )
                del dhidden
            del hidden, logits, d
    am, lm, weight, bias = tensors[:4]
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
