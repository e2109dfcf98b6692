# SPDX-License-Identifier: Apache-2.0
r"""The joiner of a pruned transducer, and what a lattice reads of it (Kuang et al., 2022, section 3).

Row (b, t, r), with s = starts[b, t] + r, joins frame t and the context of s symbols:

h = m act(am[b, t] + lm[b, s]),  l = W h + bias,  L = log Σ_v exp(l_v),
blank_logprobs = l_blank − L,  symbol_logprobs = l_y − L for y = symbols[b, s], −∞ where s has no symbol.

m is 1, or under dropout 0 for the share p of all values and 1 / (1 − p) for the others: a hash of a seed and of the
value's place (:mod:`fastasr.ops._weights_dropout`), which the backward pass computes again.

HAT (Variani et al., 2020): blank_logprobs = log σ(l_blank), and with L over the other outputs alone
symbol_logprobs = l_y − L + log σ(−l_blank).

Backward, gx, gy being the gradients of the two (0 where the value is −∞), p = softmax(l), e_v the unit vector of v:
dl = gx e_y + gy e_blank − (gx + gy) p; HAT: dl_v = gx ([v = y] − p_v) with p over v ≠ blank, and
dl_blank = gy σ(−l_blank) − gx σ(l_blank). Then dW = Σ dl hᵀ, dbias = Σ dl, da = m Wᵀ dl ⊙ act', dam[b, t] = Σ_r da,
dlm[b, s] = Σ over the rows of that s.

Upstream: k2's ``do_rnnt_pruning``, the model's joiner, ``get_rnnt_logprobs_pruned``, ``get_hat_logprobs_pruned``.

For N = B T R rows, D channels, V outputs and e bytes per element: 2 N D V FLOPs forward and 4 N D V backward (6 N D V
where logits are computed again). Bytes read and written once: e (B T D + B (S + 1) D + V D) and 8 N forward; twice
the first and 8 N backward. Kept for the backward: 16 N bytes, and 4 N (V + D) where logits are kept. Eager needs about
N (20 V + 4 D) bytes at the peak of its backward.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _activation, _joiner_rows, _weights_dropout
from fastasr.ops._dispatch import KernelFamily, Kernels, native_kernels, triton_kernels
from fastasr.ops._lattice import check_boundary, values_are_checked, whole, within
from fastasr.ops._op import op
from fastasr.ops._register import autocast_dtype

ACTIVATIONS = {name: _activation.NAMES.index(name) for name in ("tanh", "relu")}
KEPT_BYTES = 1 << 28  # up to this size the logits of all rows are kept unless the caller decides

_CHUNKS = Kernels("cpu", _joiner_rows.forward, _joiner_rows.backward)
_NATIVE = native_kernels("rnnt_joiner", "rnnt_joiner_rows", lambda: _CHUNKS)
FAMILY = KernelFamily("rnnt_joiner", (), (_NATIVE, triton_kernels("rnnt_joiner")))


# --------------------------------------------------------------------------- parts
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


def check(op, a, starts: Tensor | None, outputs: int) -> None:
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
        s, t = (
            torch.arange(length, dtype=torch.int64, device="cpu"),
            torch.arange(frames, dtype=torch.int64, device="cpu"),
        )
        symbols = symbols[(s >= s_begin) & (s < s_end)]
        starts = None if starts is None else starts[(t >= t_begin) & (t < t_end)]
    for name, values, end in (("symbols", symbols, outputs), ("starts", starts, length + 1)):
        if values is None:
            continue
        least, most = (int(v) for v in values.aminmax()) if values.numel() else (0, 0)
        if least < 0 or most >= max(end, 1):
            op.fail(name, f"values in [0, {end})", least if least < 0 else most)


def _check(op, a) -> None:
    if a.hat and a.weight.shape[0] < 2:
        op.fail("weight", "at least 2 outputs with hat", a.weight.shape[0])
    check(op, a, a.starts, a.weight.shape[0])


def operands(a, starts: Tensor, s_range: int, hat: bool, durations: int) -> tuple:
    """Returns a joiner's operands for kernels in both directions: the tensors, then the options."""
    indices = (None if t is None else t.long() for t in (a.symbols, starts, a.boundary, a.dropout_seed))
    options = s_range, a.termination_symbol, ACTIVATIONS[a.activation], hat, durations, a.dropout_p
    return (a.am, a.lm, a.weight, a.bias, *indices, *options)


def _operands(a) -> tuple:
    return operands(a, a.starts, a.s_range, a.hat, 0)


def launched(kernels, a, operands: tuple, rows: int, keep: bool) -> tuple[Tensor, ...]:
    """Returns a joiner's outputs and what is kept."""
    kept = a.keep_logits
    if kept is None:
        kept = rows * sum(a.weight.shape) * max(4, a.weight.dtype.itemsize) <= KEPT_BYTES
    *outputs, normaliser, chunks = kernels.forward(*operands, keep, kept)
    normaliser.chunks = chunks  # they live until the backward has run
    return *outputs, normaliser


def _launch(op, kernels, a, dtype, keep: bool):
    px, py, _, normaliser = launched(kernels, a, _operands(a), a.starts.numel() * a.s_range, keep)
    return px, py, normaliser


def _gradients(op, kernels, grads, s, needs):
    chunks = getattr(s.normaliser, "chunks", None)
    return kernels.backward(*grads, None, *_operands(s), s.normaliser, needs, chunks)


# --------------------------------------------------------------------------- the op
@op(
    FAMILY,
    returns="symbol_logprobs blank_logprobs",
    autocast="weight bias",  # the activation is computed in the dtype that its operands have
    keeps={"normaliser": Annotated[Tensor, "B T s_range", torch.float64]},
    launch=_launch,
    gradients=_gradients,
    check=_check,
    fast=False,  # the kernels do not check values
)
def rnnt_joiner(
    am: Annotated[Tensor, "B T D"],
    lm: Annotated[Tensor, "B S+1 D"],
    weight: Annotated[Tensor, "V D, V >= 1"],
    bias: Annotated[Tensor, "V"] | None,
    symbols: Annotated[Tensor, "B S", int],
    starts: Annotated[Tensor, "B T", int],
    *,
    s_range: Annotated[int, ">= 1"],
    termination_symbol: int,
    boundary: Annotated[Tensor, "B 4", int] | None = None,
    activation: Annotated[Literal["tanh", "relu"], ACTIVATIONS] = "tanh",
    hat: bool = False,
    keep_logits: bool | None = None,
    dropout_p: Annotated[float, ">= 0 and < 1"] = 0.0,
    dropout_seed: Annotated[Tensor, "1", torch.int64] | None = None,
) -> tuple[
    Annotated[Tensor, "B T s_range", "wide am + lm + weight"],
    Annotated[Tensor, "B T s_range", "wide am + lm + weight"],
]:
    """Returns (symbol_logprobs, blank_logprobs) of a pruned transducer's joiner, without a tensor of B × T × R × V.

    Args:
        am: (B, T, D), the projected frames; lm: (B, S + 1, D), the projected contexts. float32, bfloat16, float16 or
            float64.
        weight: (V, D); bias: (V,) or None: the output layer, in the dtype of am + lm, except under autocast, which
            casts them.
        symbols: int64 (B, S), values in [0, V) within the boundary; what lies behind it is not read.
        starts: int64 (B, T), the first s of each frame's window (``ranges[:, :, 0]`` of k2), in [0, S].
        s_range: R, the size of the window; S + 1 with starts of 0 is the full lattice. Rows with s > S are outside.
        termination_symbol: the output of blank.
        boundary: int64 (B, 4) of s_begin, t_begin, s_end, t_end; None: all of every sequence.
        activation: "tanh" or "relu".
        hat: factor blank out as a Bernoulli variable (HAT).
        keep_logits: keep logits for the backward (4 N (V + D) bytes) or compute them again; None: by their size.
        dropout_p: the share of h that is set to 0; the others are divided by 1 − dropout_p.
        dropout_seed: int64 (1,), which chooses these values; needed where dropout_p is more than 0.
    Returns:
        Both (B, T, R), float32 (float64 for float64). symbol_logprobs is -inf where s has no symbol before s_end, both
        are -inf outside the boundary. Rows outside it, and in the backward pass rows whose gradients are both 0, are
        not computed.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match; symbols, starts or boundary out of range, for CPU tensors
            outside ``torch.compile``. On a GPU that check would wait for the device: there a symbol outside the
            vocabulary gives NaN, and a row whose s is outside [0, S] is -inf.
    """
    symbols, starts = symbols.long(), starts.long()
    s, inside, has_symbol = _band(symbols, starts, boundary, s_range)
    index = s.flatten(1)
    context = lm.gather(1, index.unsqueeze(-1).expand(-1, -1, lm.shape[2])).view(*s.shape, lm.shape[2])
    hidden = _activation.FUNCTIONS[activation](am.unsqueeze(2) + context)
    if dropout_p and dropout_seed is not None:
        hidden = hidden * _weights_dropout.kept(dropout_seed, dropout_p, *hidden.shape) / (1 - dropout_p)
    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # 0 at s = S
    target = F.pad(symbols, (0, 1)).clamp(0, weight.shape[0] - 1).gather(1, index).view(*s.shape, 1)
    blank = logits[..., termination_symbol]
    if hat:
        outputs = torch.arange(weight.shape[0], device=am.device, dtype=torch.int64)
        others = logits.masked_fill(outputs == termination_symbol, -math.inf)
        px = torch.log_softmax(others, -1).gather(-1, target).squeeze(-1) + F.logsigmoid(-blank)
        py = F.logsigmoid(blank)
    else:
        logprobs = torch.log_softmax(logits, -1)
        px, py = logprobs.gather(-1, target).squeeze(-1), logprobs[..., termination_symbol]
    return px.masked_fill(~has_symbol, -math.inf), py.masked_fill(~inside, -math.inf)
