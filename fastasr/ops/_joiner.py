# SPDX-License-Identifier: Apache-2.0
"""Code that rnnt_joiner and tdt_joiner share: their kernels, the formula of a row, checks and operands."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _activation, _joiner_rows, _weights_dropout
from fastasr.ops._dispatch import KernelFamily, Kernels, native_kernels, triton_kernels
from fastasr.ops._lattice import check_boundary, values_are_checked, whole, within
from fastasr.ops._op import Arguments, Op
from fastasr.ops._register import autocast_dtype

Activation = Literal["tanh", "relu"]
ACTIVATIONS = {name: _activation.NAMES.index(name) for name in ("tanh", "relu")}
KEPT_BYTES = 1 << 28  # up to this size the logits of all rows are kept unless the caller decides

_CHUNKS = Kernels("cpu", _joiner_rows.forward, _joiner_rows.backward)
_NATIVE = native_kernels("rnnt_joiner", "rnnt_joiner_rows", lambda: _CHUNKS)
FAMILY = KernelFamily("rnnt_joiner", (), (_NATIVE, triton_kernels("rnnt_joiner")))


def _band(
    symbols: Tensor, starts: Tensor, boundary: Tensor | None, s_range: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (s within [0, S], whether the row is inside, whether it has a symbol), each (B, T, R)."""
    (batch, length), frames = symbols.shape, starts.shape[1]
    s = starts.unsqueeze(-1) + torch.arange(s_range, device=starts.device, dtype=torch.int64)
    if boundary is None:
        boundary = whole(torch.full((batch,), length, device=starts.device, dtype=torch.int64), frames)
    t = torch.arange(frames, device=starts.device, dtype=torch.int64).unsqueeze(1)
    has_symbol, inside = within(boundary, s, t, False)
    has_symbol, inside = has_symbol & (s >= 0) & (s < length), inside & (s >= 0) & (s <= length)
    return s.clamp(0, length), inside, has_symbol


def log_probabilities(
    am: Tensor, lm: Tensor, weight: Tensor, bias: Tensor | None, symbols: Tensor, starts: Tensor, s_range: int,
    termination_symbol: int, boundary: Tensor | None, activation: str, hat: bool, dropout_p: float,
    dropout_seed: Tensor | None, durations: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (symbol_logprobs, blank_logprobs, duration_logprobs), the formula of a joiner in eager PyTorch."""
    symbols, starts = symbols.long(), starts.long()
    s, inside, has_symbol = _band(symbols, starts, boundary, s_range)
    index = s.flatten(1)
    context = lm.gather(1, index.unsqueeze(-1).expand(-1, -1, lm.shape[2])).view(*s.shape, lm.shape[2])
    hidden = _activation.FUNCTIONS[activation](am.unsqueeze(2) + context)
    if dropout_p and dropout_seed is not None:
        hidden = hidden * _weights_dropout.kept(dropout_seed, dropout_p, *hidden.shape) / (1 - dropout_p)
    outputs = F.linear(hidden, weight, bias)
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    logits, of_durations = outputs.split((len(weight) - durations, durations), -1)
    pd = of_durations.log_softmax(-1).masked_fill(~inside.unsqueeze(-1), -math.inf)
    # The symbol at s = S is 0.
    target = F.pad(symbols, (0, 1)).clamp(0, logits.shape[-1] - 1).gather(1, index).view(*s.shape, 1)
    blank = logits[..., termination_symbol]
    if hat:
        classes = torch.arange(logits.shape[-1], device=am.device, dtype=torch.int64)
        others = logits.masked_fill(classes == termination_symbol, -math.inf)
        px = torch.log_softmax(others, -1).gather(-1, target).squeeze(-1) + F.logsigmoid(-blank)
        py = F.logsigmoid(blank)
    else:
        logprobs = torch.log_softmax(logits, -1)
        px, py = logprobs.gather(-1, target).squeeze(-1), logprobs[..., termination_symbol]
    return px.masked_fill(~has_symbol, -math.inf), py.masked_fill(~inside, -math.inf), pd


def check(op: Op, a: Arguments, starts: Tensor, outputs: int) -> None:
    """Checks what the signature of a joiner does not say; ``outputs`` are the tokens."""
    frames, length = a.am.shape[1], a.symbols.shape[1]
    joined = torch.promote_types(a.am.dtype, a.lm.dtype)
    if autocast_dtype(a.am) is None:
        for name, t in (("weight", a.weight), ("bias", a.bias)):
            if t is not None and t.dtype != joined:
                op.fail(name, f"dtype {joined} (that of am + lm)", t.dtype, TypeError)
    if not 0 <= a.termination_symbol < outputs:
        op.fail("termination_symbol", f"a number in [0, {outputs})", a.termination_symbol)
    if a.dropout_p and a.dropout_seed is None:
        op.fail("dropout_seed", "a Tensor where dropout_p is more than 0", None)
    check_boundary(op, a.boundary, length, frames)
    if not values_are_checked(a.am):
        return
    symbols = a.symbols
    if a.boundary is not None:
        s_begin, t_begin, s_end, t_end = (column.unsqueeze(1) for column in a.boundary.unbind(1))
        s = torch.arange(length, dtype=torch.int64, device="cpu")
        t = torch.arange(frames, dtype=torch.int64, device="cpu")
        symbols = symbols[(s >= s_begin) & (s < s_end)]
        starts = starts[(t >= t_begin) & (t < t_end)]
    for name, values, end in (("symbols", symbols, outputs), ("starts", starts, length + 1)):
        least, most = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
        if least < 0 or most >= max(end, 1):
            op.fail(name, f"values in [0, {end})", least if least < 0 else most)


def operands(a: Arguments, starts: Tensor, s_range: int, hat: bool, durations: int) -> tuple:
    """Returns a joiner's operands for kernels in both directions: the tensors, then the options."""
    indices = (None if t is None else t.long() for t in (a.symbols, starts, a.boundary, a.dropout_seed))
    options = s_range, a.termination_symbol, ACTIVATIONS[a.activation], hat, durations, a.dropout_p
    return (a.am, a.lm, a.weight, a.bias, *indices, *options)


def launch(kernels: Kernels, a: Arguments, operands: tuple, rows: int, keep: bool) -> tuple[Tensor, ...]:
    """Returns a joiner's outputs and the tensors kept for its backward pass."""
    kept = a.keep_logits
    if kept is None:  # Triton's kernels keep hidden rows alone, at most a chunk.
        size = rows * sum(a.weight.shape) * max(4, a.weight.dtype.itemsize)
        kept = kernels.backend == "triton" or size <= KEPT_BYTES
    *outputs, normaliser, chunks = kernels.forward(*operands, keep, kept)
    normaliser.chunks = chunks  # The chunks live until the backward has run.
    return *outputs, normaliser
