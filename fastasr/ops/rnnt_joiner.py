# SPDX-License-Identifier: Apache-2.0
r"""The joiner of a pruned transducer, and what a lattice reads of it (Kuang et al., 2022, section 3).

Row (b, t, r), with s = starts[b, t] + r, joins frame t and the context of s symbols:

h = act(am[b, t] + lm[b, s]),  l = W h + bias,  L = log Σ_v exp(l_v),
blank_logprobs = l_blank − L,  symbol_logprobs = l_y − L for y = symbols[b, s], −∞ where s has no symbol.

HAT (Variani et al., 2020): blank_logprobs = log σ(l_blank), and with L over the other outputs alone
symbol_logprobs = l_y − L + log σ(−l_blank).

Backward, gx, gy being the gradients of the two (0 where the value is −∞), p = softmax(l), e_v the unit vector of v:
dl = gx e_y + gy e_blank − (gx + gy) p; HAT: dl_v = gx ([v = y] − p_v) with p over v ≠ blank, and
dl_blank = gy σ(−l_blank) − gx σ(l_blank). Then dW = Σ dl hᵀ, dbias = Σ dl, da = Wᵀ dl ⊙ act', dam[b, t] = Σ_r da,
dlm[b, s] = Σ over the rows of that s.

Upstream: k2's ``do_rnnt_pruning``, the model's joiner, ``get_rnnt_logprobs_pruned``, ``get_hat_logprobs_pruned``.

For N = B T R rows, D channels, V outputs and e bytes per element: 2 N D V FLOPs forward and 4 N D V backward (6 N D V
where logits are computed again). Bytes read and written once: e (B T D + B (S + 1) D + V D) and 8 N forward; twice
the first and 8 N backward. Kept for the backward: 16 N bytes, and 4 N (V + D) where logits are kept. Eager needs about
N (20 V + 4 D) bytes at the peak of its backward.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled

from fastasr.ops import _activation, _check, _joiner_rows
from fastasr.ops._dispatch import (
    FLOATING,
    Implementation,
    KernelFamily,
    Kernels,
    direct,
    reason_cpu,
    served,
    triton_kernels,
)
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register

ACTIVATIONS = ("tanh", "relu")


def _load_cpu() -> Kernels:
    return Kernels("cpu", _joiner_rows.forward, _joiner_rows.backward)


FAMILY = KernelFamily(
    "rnnt_joiner",
    ("rnnt_joiner",),
    (
        Implementation("cpu", ("cpu",), FLOATING, partial(reason_cpu, "rnnt_joiner_rows"), _load_cpu),
        triton_kernels("rnnt_joiner"),
    ),
)


# --------------------------------------------------------------------------- definition
def definition(
    am: Tensor,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: Tensor,
    starts: Tensor,
    *,
    s_range: int,
    termination_symbol: int,
    boundary: Tensor | None = None,
    activation: str = "tanh",
    hat: bool = False,
    keep_logits: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in eager PyTorch; ``keep_logits`` makes no difference here."""
    s, inside, has_symbol = band(symbols, starts, boundary, s_range)
    batch, frames, channels = am.shape
    index = s.reshape(batch, frames * s_range)
    context = lm.gather(1, index.unsqueeze(-1).expand(-1, -1, channels)).view(
        batch, frames, s_range, channels
    )
    logits = F.linear(_activation.function(activation)(am.unsqueeze(2) + context), weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = targets(symbols, index, weight.shape[0]).view(batch, frames, s_range, 1)
    if hat:
        outputs = torch.arange(weight.shape[0], device=am.device)
        others = logits.masked_fill(outputs == termination_symbol, -math.inf)
        blank = logits[..., termination_symbol]
        px = torch.log_softmax(others, -1).gather(-1, target).squeeze(-1) + F.logsigmoid(-blank)
        py = F.logsigmoid(blank)
    else:
        logprobs = torch.log_softmax(logits, -1)
        px, py = logprobs.gather(-1, target).squeeze(-1), logprobs[..., termination_symbol]
    return px.masked_fill(~has_symbol, -math.inf), py.masked_fill(~inside, -math.inf)


def band(
    symbols: Tensor, starts: Tensor, boundary: Tensor | None, s_range: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(s within [0, S], whether the row is inside, whether it has a symbol), each (B, T, R).

    A row is inside where s_begin <= s <= s_end and t_begin <= t < t_end, and has a symbol where also s < s_end.
    """
    frames, length = starts.shape[1], symbols.shape[1]
    s = starts.unsqueeze(-1) + torch.arange(s_range, device=starts.device)  # (B, T, R)
    if boundary is None:
        inside, has_symbol = (s >= 0) & (s <= length), (s >= 0) & (s < length)
    else:
        s_begin, t_begin, s_end, t_end = (boundary[:, i].view(-1, 1, 1) for i in range(4))
        t = torch.arange(frames, device=starts.device).view(1, -1, 1)
        within = (t >= t_begin) & (t < t_end) & (s >= s_begin) & (s >= 0)
        inside = within & (s <= s_end) & (s <= length)
        has_symbol = within & (s < s_end) & (s < length)
    return s.clamp(0, length), inside, has_symbol


def targets(symbols: Tensor, index: Tensor, outputs: int) -> Tensor:
    """symbols[b, index] within [0, V), 0 at s = S."""
    return F.pad(symbols, (0, 1)).clamp(0, outputs - 1).gather(1, index)


_CHUNK_ELEMENTS = 1 << 20


def definition_backward(
    grad_symbol: Tensor,
    grad_blank: Tensor,
    am: Tensor,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: Tensor,
    starts: Tensor,
    boundary: Tensor | None,
    s_range: int,
    termination_symbol: int,
    activation: int,
    hat: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dam, dlm, dweight, dbias), computed in float32 or better, some frames at a time."""
    name = _activation.NAMES[activation]
    act = _activation.function(name)
    wide = torch.promote_types(torch.promote_types(am.dtype, weight.dtype), torch.float32)
    batch, frames, _ = am.shape
    outputs, contexts = weight.shape[0], lm.shape[1]
    s, inside, has_symbol = band(symbols, starts, boundary, s_range)
    target = targets(symbols, s.reshape(batch, -1), outputs).view(-1, s_range, 1)
    gx = torch.where(has_symbol, grad_symbol.to(wide), 0.0).view(-1, s_range, 1)
    gy = torch.where(inside, grad_blank.to(wide), 0.0).view(-1, s_range, 1)
    row = (s + torch.arange(batch, device=am.device).view(-1, 1, 1) * contexts).view(-1, s_range)
    left, right, w = am.to(wide).flatten(0, 1), lm.to(wide).flatten(0, 1), weight.to(wide)
    dam, dlm, dw = torch.zeros_like(left), torch.zeros_like(right), torch.zeros_like(w)
    db = w.new_zeros(outputs)
    step = max(1, _CHUNK_ELEMENTS // max(1, s_range * outputs))
    for first in range(0, batch * frames, step):
        chunk = slice(first, first + step)
        a = left[chunk].unsqueeze(1) + right[row[chunk]]  # (frames, R, D)
        h = act(a)
        logits = F.linear(h, w, None if bias is None else bias.to(wide))
        x, y = gx[chunk], gy[chunk]
        if hat:
            z = logits[..., termination_symbol : termination_symbol + 1].clone()
            logits[..., termination_symbol] = -math.inf
            d = torch.softmax(logits, -1).mul_(-x).scatter_add_(-1, target[chunk], x)
            d[..., termination_symbol] = (y * torch.sigmoid(-z) - x * torch.sigmoid(z)).squeeze(-1)
        else:
            d = torch.softmax(logits, -1).mul_(-(x + y)).scatter_add_(-1, target[chunk], x)
            d[..., termination_symbol] += y.squeeze(-1)
        flat = d.view(-1, outputs)
        dw.addmm_(flat.t(), h.flatten(0, 1))
        db += flat.sum(0)
        da = torch.matmul(d, w) * _activation.derivative(name, a)
        dam[chunk] = da.sum(1)
        dlm.index_add_(0, row[chunk].reshape(-1), da.flatten(0, 1))
    db = weight.new_empty(0) if bias is None else db.to(bias.dtype)
    return dam.view_as(am).to(am.dtype), dlm.view_as(lm).to(lm.dtype), dw.to(weight.dtype), db


# --------------------------------------------------------------------------- kernels
# From here on symbols, starts and boundary are int64; the functions take the arguments of the registered operators.
def forward(
    am, lm, weight, bias, symbols, starts, boundary,
    s_range: int, termination_symbol: int, activation: int, hat: bool, need_gradients: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, object]:  # fmt: skip
    """(symbol_logprobs, blank_logprobs, what the backward needs of each row, what is kept besides) without autograd."""
    tensors = am, lm, weight, bias, symbols, starts, boundary
    kernels = FAMILY.kernels(am, weight)
    if kernels is not None:
        return kernels.forward(*tensors, s_range, termination_symbol, activation, hat, need_gradients, keep)
    px, py = definition(
        am.to(weight.dtype),
        lm.to(weight.dtype),
        *tensors[2:6],
        s_range=s_range,
        termination_symbol=termination_symbol,
        boundary=boundary,
        activation=_activation.NAMES[activation],
        hat=hat,
    )
    return px, py, px.new_empty(statistics_shape(am, s_range), dtype=torch.float64), None


def statistics_shape(am: Tensor, s_range: int) -> tuple[int, ...]:
    """Of L, which the backward pass needs per row."""
    return am.shape[0], am.shape[1], s_range


def backward(
    grad_symbol, grad_blank, am, lm, weight, bias, symbols, starts, boundary, normaliser,
    s_range: int, termination_symbol: int, activation: int, hat: bool, needs, kept: object = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dam, dlm, dweight, dbias) without autograd; those that ``needs`` does not ask for may have no elements."""
    tensors = am, lm, weight, bias, symbols, starts, boundary
    rest = s_range, termination_symbol, activation, hat
    kernels = FAMILY.kernels(am, weight)
    if kernels is None:
        return definition_backward(grad_symbol, grad_blank, *tensors, *rest)
    return kernels.backward(grad_symbol, grad_blank, *tensors, normaliser, *rest, needs, kept)


class _RnntJoiner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep: bool, *arguments) -> tuple[Tensor, Tensor]:
        px, py, normaliser, ctx.kept = forward(*arguments, True, keep)
        ctx.save_for_backward(*arguments[:7], normaliser)
        ctx.rest = arguments[7:]
        ctx.set_materialize_grads(True)
        return px, py

    @staticmethod
    def backward(ctx, grad_symbol: Tensor, grad_blank: Tensor):
        refuse_double_backward("rnnt_joiner")
        needs = ctx.needs_input_grad[1:5]
        found = backward(grad_symbol, grad_blank, *ctx.saved_tensors, *ctx.rest, needs, ctx.kept)
        return None, *(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * 7


# --------------------------------------------------------------------------- registration
_TENSORS = (
    "Tensor am, Tensor lm, Tensor weight, Tensor? bias, Tensor symbols, Tensor starts, Tensor? boundary"
)
_OPTIONS = "SymInt s_range, SymInt termination_symbol, int activation, bool hat"


def _fake_forward(am, lm, weight, bias, symbols, starts, boundary, s_range, *options):
    shape = statistics_shape(am, s_range)
    wide = torch.promote_types(weight.dtype, torch.float32)
    px = torch.empty(shape, dtype=wide, device=am.device)
    return px, torch.empty_like(px), torch.empty(shape, dtype=torch.float64, device=am.device)


def _fake_backward(grad_symbol, grad_blank, am, lm, weight, bias, *rest):
    found = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (am, lm, weight))
    return *found, weight.new_empty(0) if bias is None else torch.empty_like(bias)


def _op_backward(*arguments) -> tuple[Tensor, ...]:
    *arguments, needs = arguments
    found = backward(*arguments, needs)
    like = arguments[2], arguments[3], arguments[4], arguments[5]
    return tuple(
        g if need or t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        for g, t, need in zip(found, like, needs, strict=True)
    )


_BACKWARD_OP = register(
    f"rnnt_joiner_backward(Tensor grad_symbol, Tensor grad_blank, {_TENSORS}, Tensor normaliser, {_OPTIONS}, "
    "bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)


def _setup_training(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7], output[2])
    ctx.rest = inputs[7:]
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx, grad_symbol, grad_blank, tensors, normaliser):
    needs = list(ctx.needs_input_grad[:4])
    found = _BACKWARD_OP(grad_symbol, grad_blank, *tensors, normaliser, *ctx.rest, needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * 7


def _training_backward(ctx, grad_symbol, grad_blank, _):
    *tensors, normaliser = ctx.saved_tensors
    return _gradients(ctx, grad_symbol, grad_blank, tensors, normaliser)


def _autocast(dtype: torch.dtype, am, lm, weight, bias, *rest):
    # the product alone is autocast's: the activation is computed in the dtype its operands come in
    return am, lm, *cast(dtype, weight, bias), *rest


# What tracing records for training: it hands on what the backward needs.
_TRAINING_OP = register(
    f"rnnt_joiner_training({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    lambda *arguments: forward(*arguments, True, False)[:3],
    _fake_forward,
    setup_context=_setup_training,
    backward=_training_backward,
    autocast=_autocast,
)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]


def _backward(ctx, grad_symbol, grad_blank):
    tensors = ctx.saved_tensors
    with torch.no_grad():
        normaliser = _TRAINING_OP(*tensors, *ctx.rest)[2]
    return _gradients(ctx, grad_symbol, grad_blank, tensors, normaliser)


_OP = register(
    f"rnnt_joiner({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    lambda *arguments: forward(*arguments, False, False)[:2],
    lambda *arguments: _fake_forward(*arguments)[:2],
    setup_context=_setup,
    backward=_backward,
    autocast=_autocast,
)


# --------------------------------------------------------------------------- public function
def rnnt_joiner(
    am: Tensor,
    lm: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: Tensor,
    starts: Tensor,
    *,
    s_range: int,
    termination_symbol: int,
    boundary: Tensor | None = None,
    activation: str = "tanh",
    hat: bool = False,
    keep_logits: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(symbol_logprobs, blank_logprobs) of a pruned transducer's joiner, without a tensor of B × T × R × V.

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
    op = "rnnt_joiner"
    dtype = _check_tensors(op, am, lm, weight, bias)
    symbols, starts, boundary = _check_indices(op, am, lm, symbols, starts, boundary)
    _check.integer(op, "s_range", s_range)
    if not s_range >= 1:
        raise ValueError(f"fastasr.{op}: s_range: expected at least 1, got {s_range}")
    _check.integer(op, "termination_symbol", termination_symbol)
    outputs = weight.shape[0]
    if not 0 <= termination_symbol < outputs:
        raise ValueError(
            f"fastasr.{op}: termination_symbol: expected a number in [0, {outputs}), got {termination_symbol}"
        )
    number = _activation.number(op, activation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"fastasr.{op}: activation: expected one of {ACTIVATIONS}, got {activation!r}")
    _check.flag(op, "hat", hat)
    if hat and outputs < 2:
        raise ValueError(f"fastasr.{op}: weight: expected at least 2 outputs with hat, got {outputs}")
    if keep_logits is not None:
        _check.flag(op, "keep_logits", keep_logits)
    tensors = am, lm, weight, bias
    plain = direct(*tensors, symbols, starts, boundary)
    if plain and am.is_cpu:
        _check_values(op, symbols, starts, boundary, am.shape[1], outputs)
    if FAMILY.kernels(am, weight) is None if plain else not served(FAMILY.name, am, weight):
        return definition(
            *tensors,
            symbols,
            starts,
            s_range=s_range,
            termination_symbol=termination_symbol,
            boundary=boundary,
            activation=activation,
            hat=hat,
        )
    if dtype is not None:
        weight, bias = cast(dtype, weight, bias)
    rest = symbols, starts, boundary, s_range, termination_symbol, number, hat
    training = is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not plain:
        return _TRAINING_OP(am, lm, weight, bias, *rest)[:2] if training else _OP(am, lm, weight, bias, *rest)
    if training:
        keep = _affordable(am, weight, s_range) if keep_logits is None else keep_logits
        return _RnntJoiner.apply(keep, am, lm, weight, bias, *rest)
    return forward(am, lm, weight, bias, *rest, False, False)[:2]


KEPT_BYTES = 1 << 28  # logits of all rows, kept by themselves up to this


def _affordable(am: Tensor, weight: Tensor, s_range: int) -> bool:
    wide = max(4, weight.dtype.itemsize)
    return am.shape[0] * am.shape[1] * s_range * sum(weight.shape) * wide <= KEPT_BYTES


def _check_tensors(op: str, am, lm, weight, bias) -> torch.dtype | None:
    """The checks of the floating tensors; autocast's dtype, if it is on."""
    _check.floating_tensor(op, "am", am)
    _check.shape(op, "am", am, "(B, T, D)", am.dim() == 3)
    batch, _, channels = am.shape
    _check.floating_tensor(op, "lm", lm)
    ok = lm.dim() == 3 and lm.shape[0] == batch and lm.shape[1] >= 1 and lm.shape[2] == channels
    if not ok:  # a number in a message would make a traced size a constant, hence not before
        _check.shape(op, "lm", lm, f"({batch}, S + 1, {channels}) like am", ok)
    _check.floating_tensor(op, "weight", weight)
    ok = weight.dim() == 2 and weight.shape[0] >= 1 and weight.shape[1] == channels
    if not ok:
        _check.shape(op, "weight", weight, f"(V, {channels}) with V of at least 1", ok)
    affine = {"weight": weight}
    if bias is not None:
        _check.floating_tensor(op, "bias", bias)
        ok = bias.dim() == 1 and bias.shape[0] == weight.shape[0]
        if not ok:
            _check.shape(op, "bias", bias, f"({weight.shape[0]},)", ok)
        affine["bias"] = bias
    for name, t in {"lm": lm, **affine}.items():
        _check.same_device(op, name, t, am, "am")
    dtype = autocast_dtype(am)
    joined = torch.promote_types(am.dtype, lm.dtype)
    for name, t in affine.items():
        if dtype is None and t.dtype != joined:
            raise TypeError(f"fastasr.{op}: {name}: expected dtype {joined} (that of am + lm), got {t.dtype}")
    return dtype


def _check_indices(op: str, am, lm, symbols, starts, boundary) -> tuple[Tensor, Tensor, Tensor | None]:
    """symbols, starts and boundary as int64."""
    batch, frames, length = am.shape[0], am.shape[1], lm.shape[1] - 1
    shapes = {"symbols": (batch, length), "starts": (batch, frames), "boundary": (batch, 4)}
    found = []
    for name, t in (("symbols", symbols), ("starts", starts), ("boundary", boundary)):
        if t is None and name == "boundary":
            found.append(None)
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"fastasr.{op}: {name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in (torch.int64, torch.int32) or t.layout is not torch.strided:
            raise TypeError(
                f"fastasr.{op}: {name}: expected a strided int64 tensor, got {t.dtype}, {t.layout}"
            )
        rows, columns = shapes[name]
        ok = t.dim() == 2 and t.shape[0] == rows and t.shape[1] == columns
        if not ok:
            _check.shape(op, name, t, f"({rows}, {columns})", ok)
        _check.same_device(op, name, t, am, "am")
        found.append(t.to(torch.int64))
    return tuple(found)


def _check_values(op: str, symbols, starts, boundary, frames: int, outputs: int) -> None:
    length = symbols.shape[1]
    if boundary is not None and boundary.numel():
        s_begin, t_begin, s_end, t_end = boundary.unbind(1)
        right = (s_begin >= 0) & (s_begin <= s_end) & (s_end <= length)
        right &= (t_begin >= 0) & (t_begin <= t_end) & (t_end <= frames)
        if not right.all():
            first = boundary[~right][0].tolist()
            raise ValueError(
                f"fastasr.{op}: boundary: expected 0 <= s_begin <= s_end <= {length} and 0 <= t_begin <= t_end <= "
                f"{frames}, got {first}"
            )
        s, t = torch.arange(length), torch.arange(frames)
        symbols = symbols[(s >= s_begin.unsqueeze(1)) & (s < s_end.unsqueeze(1))]
        starts = starts[(t >= t_begin.unsqueeze(1)) & (t < t_end.unsqueeze(1))]
    for name, values, end in (("symbols", symbols, outputs), ("starts", starts, length + 1)):
        if not values.numel():
            continue
        least, most = (int(v) for v in values.aminmax())
        if least < 0 or most >= end:
            raise ValueError(
                f"fastasr.{op}: {name}: expected values in [0, {end}), got {least if least < 0 else most}"
            )
