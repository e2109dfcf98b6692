# SPDX-License-Identifier: Apache-2.0
"""rnnt_joiner and tdt_joiner on CPU in chunks of rows: all logits exist at once only if the backward pass keeps them.

A chunk's logits are a matrix product between two passes over it: the first gathers act(am + lm), the second takes L
and the two logits of each row or, in the backward pass, replaces the logits by their gradient. A TDT joiner's durations
are outputs behind the tokens. Rows outside the boundary, and in the backward pass rows without a gradient, are in no
chunk. The passes are in C++ (csrc/cpu/rnnt/rnnt_joiner.h), in float32, or in float64 for float64 tensors; the products
are torch's or fastasr's own. Where the processor multiplies bfloat16, the factors of a product with such a weight are
rounded to it, as eager's are, and its result is float32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastasr.ops import _gemm, _reduced_weights
from fastasr.ops._op import Needs

# A chunk's hidden values and logits have this many bytes, so that the next pass still finds them in the cache.
CHUNK_BYTES = 6 << 20
CHUNK_ROWS = 528

Chunk = tuple[Tensor, Tensor, Tensor]  # rows, hidden, logits


@dataclass
class Joiner:
    """The operands, which become contiguous and get the dtypes that the kernels take."""

    am: Tensor
    lm: Tensor
    weight: Tensor
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
    wide: torch.dtype = field(init=False)  # the dtype of the results
    short: bool = field(init=False)  # whether products multiply bfloat16

    def __post_init__(self) -> None:
        dtype = torch.promote_types(self.am.dtype, self.lm.dtype)
        wide = torch.promote_types(torch.promote_types(dtype, self.weight.dtype), torch.float32)
        if wide is torch.float64:
            dtype = wide
        short = self.weight.dtype is torch.bfloat16 and wide is torch.float32 and self.weight.shape[1] > 0
        self.wide, self.short = wide, short and not _reduced_weights.why_not("bf16")
        self.am, self.lm = self.am.to(dtype).contiguous(), self.lm.to(dtype).contiguous()
        self.weight = (self.weight if self.short else self.weight.to(wide)).contiguous()
        self.bias = None if self.bias is None else self.bias.to(wide).contiguous()
        self.boundary = None if self.boundary is None else self.boundary.contiguous()
        self.symbols, self.starts = self.symbols.contiguous(), self.starts.contiguous()

    def rows(self, *grads: Tensor) -> Tensor:
        """Returns (rows, 4): place among the results, frame, context and symbol of every row to compute."""
        tokens = self.weight.shape[0] - self.durations
        find = torch.ops.fastasr_cpu.rnnt_joiner_rows.default
        return find(self.starts, self.symbols, self.boundary, self.s_range, tokens, *(grads or (None, None)))

    def compute(self, rows: Tensor) -> Iterator[Chunk]:
        """Yields hidden values and logits of the rows, a chunk at a time."""
        size = self.wide.itemsize * sum(self.weight.shape)
        step = max(16, min(CHUNK_ROWS, CHUNK_BYTES // size // 16 * 16))
        count = rows.shape[0]
        for chunk in rows.split(step) if count > step else (rows,) * (count > 0):
            hidden = self.hidden(chunk)
            self.drop(chunk, hidden)
            yield chunk, hidden, self.logits(hidden)
            del hidden  # frees it before the next chunk is made

    def hidden(self, rows: Tensor) -> Tensor:
        """Returns act(am + lm) of the rows, before dropout."""
        hidden = self.weight.new_empty(rows.shape[0], self.weight.shape[1], dtype=self.wide)
        torch.ops.fastasr_cpu.rnnt_joiner_hidden.default(self.am, self.lm, rows, self.activation, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        if self.short:
            return _gemm.product(hidden.bfloat16(), self.weight.t(), self.bias)
        return _gemm.forward(hidden, self.weight, self.bias)

    def product_gradients(self, d: Tensor, hidden: Tensor, dweight: Tensor, needs: Needs) -> Tensor | None:
        """Adds the weight's gradient to ``dweight`` and returns the gradient of ``hidden``, each if needed."""
        if self.short:
            d, hidden = d.bfloat16(), hidden.bfloat16()
        if needs[2]:
            if self.short:
                _gemm.add_product(dweight, d.t(), hidden)
            else:
                _gemm.add_weight_grad(dweight, d, hidden)
        if not (needs[0] or needs[1]):
            return None
        if self.short:
            return _gemm.product(d, self.weight)
        return _gemm.input_grad(d, self.weight)

    def drop(self, rows: Tensor, x: Tensor) -> None:
        """Applies dropout to hidden values or to their gradient, in place."""
        if self.dropout:
            torch.ops.fastasr_cpu.rnnt_joiner_dropout.default(rows, self.seed, self.dropout, x)


def _without_autocast() -> AbstractContextManager[object]:
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Chunk] | None]:
    """Returns (symbol_logprobs, blank_logprobs, duration_logprobs, L, the chunks if they are kept)."""
    *operands, need_gradients, keep = arguments
    p = Joiner(*operands)
    shape = (*p.starts.shape, p.s_range)
    px, py = (torch.full(shape, -torch.inf, dtype=p.wide, device="cpu") for _ in range(2))
    durations = px.new_full((*shape, p.durations), -torch.inf) if p.durations else px.new_empty((*shape, 0))
    normaliser = torch.zeros(shape, dtype=torch.float64, device="cpu")
    kept: list[Chunk] | None = [] if keep and need_gradients else None
    with _without_autocast():
        for chunk in p.compute(p.rows()):
            rows, hidden, logits = chunk
            scores = px, py, durations, normaliser
            torch.ops.fastasr_cpu.rnnt_joiner_scores.default(logits, rows, p.blank, p.hat, *scores)
            if kept is not None:
                kept.append(chunk)
            del chunk, logits, hidden
    return px, py, durations, normaliser, kept


def backward(
    grad_symbol: Tensor, grad_blank: Tensor, grad_durations: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (dam, dlm, dweight, dbias), with zeros for those that are not needed."""
    *operands, normaliser, needs, kept = arguments
    p = Joiner(*operands)
    gx, gy = grad_symbol.to(p.wide).contiguous(), grad_blank.to(p.wide).contiguous()
    gz, active = gy.new_empty(*gy.shape, 0), gy
    if grad_durations is not None:
        gz = grad_durations.to(p.wide).contiguous()
        active = gy.masked_fill((gz != 0).any(-1), 1.0)
    dam = torch.zeros(p.am.shape, dtype=p.wide, device="cpu")
    dlm = torch.zeros(p.lm.shape, dtype=p.wide, device="cpu")
    am, lm, weight, bias = operands[:4]
    dweight = torch.zeros(weight.shape, dtype=p.wide, device="cpu")
    dbias = torch.zeros(len(weight), dtype=torch.float64, device="cpu")
    with _without_autocast():
        rows = p.rows(gx, active)
        room = None
        for chunk, hidden, logits in p.compute(rows) if kept is None else _left(kept, rows):
            d = logits
            if kept is not None:  # another backward may follow, so the logits stay
                if room is None or len(room) < len(logits):
                    room = torch.empty_like(logits)
                d = room[: len(logits)]
            torch.ops.fastasr_cpu.rnnt_joiner_logits_gradient.default(
                logits, chunk, normaliser, gx, gy, gz, p.blank, p.hat, d, dbias
            )
            dhidden = p.product_gradients(d, hidden, dweight, needs)
            if dhidden is not None:
                if p.dropout:
                    p.drop(chunk, dhidden)
                    # values that were scaled and divided again have other roundings, and near 1 tanh' shows them
                    hidden = p.hidden(chunk)
                torch.ops.fastasr_cpu.rnnt_joiner_hidden_gradient.default(
                    dhidden, hidden, chunk, p.activation, dam, dlm
                )
            del hidden, logits, d, dhidden
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
