# SPDX-License-Identifier: Apache-2.0
r"""Multi-head damped exponential moving average (Mega, Ma et al., 2022, section 3.1), as a scan linear in the length.

Per channel, with N states: p = σ(δ), q = 1 − p σ(α), b = p β, c = γ / √N,

    h_n(t) = q_n h_n(t−1) + b_n x_t          y_t = act(Σ_n c_n h_n(t) + ω x_t)

Backward, with z the argument of act and g = dy act'(z): λ_n(t) = c_n g_t + q_n λ_n(t+1), dx = Σ_n b_n λ_n + ω g,
db_n = Σ_t λ_n x_t, dc_n = Σ_t g_t h_n, dq_n = c_n Σ_t g_t v_n with v_n(t) = q_n v_n(t−1) + h_n(t−1), dω = Σ_t g x.
Upstream: ``MultiHeadDampedEMA`` in ``espnet2.asr_transducer.decoder.modules.mega``, a convolution by FFT.

Memory traffic per element: read x, write y forward; read dy and x twice or less, write dx backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check
from fastasr.ops._dispatch import PLAIN, KernelFamily, cuda_kernels, direct, native_kernels, served
from fastasr.ops._register import refuse_double_backward, register

FAMILY = KernelFamily("ema_scan", ("ema_scan",), (native_kernels("ema_scan"), cuda_kernels("ema_scan")))

LAYOUTS = {"LBD": 0, "BLD": 1, "BDL": 2}
DIRECTIONS = {"forward": 0, "reverse": 1, "bidirectional": 2}
ACTIVATIONS = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}
MOST_STATES = 64

_TO_BDL = ((1, 2, 0), (0, 2, 1), (0, 1, 2))
_FROM_BDL = ((2, 0, 1), (0, 2, 1), (0, 1, 2))
_TIME = (0, 1, 2)
_FUNCTIONS = (lambda z: z, F.silu, F.relu, torch.tanh, F.gelu)
_DERIVATIVES = (
    lambda g, z: g,
    torch.ops.aten.silu_backward,
    lambda g, z: torch.where(z > 0, g, 0.0),
    lambda g, z: g * (1 - torch.tanh(z) ** 2),
    torch.ops.aten.gelu_backward,
)


# --------------------------------------------------------------------------- definition
def definition(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    padding_mask: Tensor | None = None,
    truncation: int | None = None,
    direction: str = "forward",
    activation: str = "identity",
    layout: str = "LBD",
) -> Tensor | tuple[Tensor, Tensor]:
    """The formula in eager PyTorch, as a convolution (see :func:`convolution`)."""
    parameters = (p.reshape(p.shape[:2]) for p in (damping, decay, expansion, projection))
    options = (truncation or 0, DIRECTIONS[direction], ACTIVATIONS[activation], LAYOUTS[layout], return_state)
    y, final = _formula(x, *parameters, residual, state, padding_mask, *options)
    return (y, final) if return_state else y


def coefficients(damping: Tensor, decay: Tensor, expansion: Tensor, projection: Tensor):
    """(q, b, c), each (D, N)."""
    p = torch.sigmoid(damping)
    return 1 - p * torch.sigmoid(decay), p * expansion, projection * projection.shape[-1] ** -0.5


def recurrence(x: Tensor, q: Tensor, b: Tensor, c: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ c h for x (B, D, L), step by step, and the last h (B, D, N)."""
    h = x.new_zeros(*x.shape[:2], q.shape[-1]) if state is None else state
    y = []
    for t in range(x.shape[-1]):
        h = q * h + b * x[..., t, None]
        y.append((c * h).sum(-1))
    return torch.stack(y, -1) if y else torch.zeros_like(x), h


CHUNK = 16


def convolution(
    x: Tensor, q: Tensor, b: Tensor, c: Tensor, state: Tensor | None, need_state: bool
) -> tuple[Tensor, Tensor]:
    """What :func:`recurrence` computes, in about 16 + log L steps over whole tensors: inside chunks of 16 a direct
    convolution, between chunks a scan by doubling. Powers are powers, not exp(j log q): q may be 0 or 1."""
    batch, channels, length = x.shape
    states = q.shape[-1]
    chunks = max(1, (length + CHUNK - 1) // CHUNK)
    before = x.new_zeros(batch, channels, 1, states) if state is None else state.unsqueeze(2)
    blocks = F.pad(x, (0, chunks * CHUNK - length)).reshape(batch, channels, chunks, CHUNK)
    powers = q.unsqueeze(-1) ** torch.arange(CHUNK + 1, device=x.device, dtype=q.dtype)  # (D, N, 17)

    taps = ((b * c).unsqueeze(-1) * powers[..., :CHUNK]).sum(1)  # (D, 16)
    padded = F.pad(blocks, (CHUNK - 1, 0))
    y = taps[:, 0, None, None] * blocks
    for j in range(1, CHUNK):
        y = y + taps[:, j, None, None] * padded[..., CHUNK - 1 - j : 2 * CHUNK - 1 - j]

    expanded = b.unsqueeze(-1) * powers[..., :CHUNK]
    ends = blocks[..., CHUNK - 1, None] * expanded[:, None, :, 0]  # (B, D, chunks, N): h from the chunk alone
    for j in range(1, CHUNK):
        ends = ends + blocks[..., CHUNK - 1 - j, None] * expanded[:, None, :, j]
    carry = torch.cat([before, ends[:, :, :-1]], 2)  # h before each chunk, once those before it are added
    step = 1
    while step < chunks:
        earlier = F.pad(carry[:, :, :-step], (0, 0, step, 0))
        carry = carry + earlier * (q ** float(CHUNK * step)).unsqueeze(1)
        step *= 2
    decayed = c.unsqueeze(-1) * powers[..., 1:]
    y = y + torch.stack([(carry * decayed[:, None, :, i]).sum(-1) for i in range(CHUNK)], -1)

    y = y.reshape(batch, channels, chunks * CHUNK)[..., :length]
    if not need_state or length == 0:
        return y, before.squeeze(2) + q[:0].sum()  # + 0: the gradients of what is not used are zeros
    rest = length - (chunks - 1) * CHUNK
    exponents = torch.arange(CHUNK, device=x.device, dtype=q.dtype)
    last = q**rest * carry[:, :, -1]
    tail = b.unsqueeze(-1) * q.unsqueeze(-1) ** (rest - 1 - exponents).clamp(min=0)  # the padding holds zeros
    return y, last + (blocks[:, :, -1, None] * tail).sum(-1)


def _window(inputs: Tensor, q: Tensor, taps: int) -> Tensor:
    """Σ_{j<taps} q^j inputs(t−j) of (B, D, N, L), by doubling: no tap is subtracted again."""

    def late(h: Tensor, steps: int) -> Tensor:
        return (q ** float(steps)).unsqueeze(-1) * F.pad(h, (steps, -steps))

    total, counted, block, size = 0.0 * q.unsqueeze(-1), 0, inputs, 1  # block: the sum of `size` taps
    while True:
        if taps & size:
            total = total + (late(block, counted) if counted else block)
            counted += size
        if 2 * size > taps:
            return total
        block = block + late(block, size)
        size *= 2


def _formula(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None,
    state: Tensor | None,
    padding_mask: Tensor | None,
    truncation: int,
    direction: int,
    activation: int,
    layout: int,
    need_state: bool,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x, damping, decay, expansion, projection, residual, state)
    u = x.permute(_TO_BDL[layout]).to(dtype)
    masked = u if padding_mask is None else u.masked_fill(padding_mask.unsqueeze(1), 0.0)
    q, b, c = coefficients(*(p.to(dtype) for p in (damping, decay, expansion, projection)))
    start = None if state is None else state.to(dtype)
    channels, length = u.shape[1:]

    def scan(v: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        qs, bs, cs = q[rows], b[rows], c[rows]
        if 0 < truncation < length:
            h = _window(bs.unsqueeze(-1) * v.unsqueeze(2), qs, truncation)
            return (cs.unsqueeze(-1) * h).sum(2), h.new_empty(0)
        return convolution(v, qs, bs, cs, start, need_state)

    if direction == DIRECTIONS["reverse"]:
        z, final = scan(masked.flip(-1), slice(None))
        z = z.flip(-1)
    else:
        z, final = scan(masked, slice(0, channels))
        if direction == DIRECTIONS["bidirectional"]:
            z = z + scan(masked.flip(-1), slice(channels, None))[0].flip(-1)
    if residual is not None:
        z = z + residual.to(dtype).unsqueeze(-1) * u
    y = _FUNCTIONS[activation](z).to(x.dtype).permute(_FROM_BDL[layout])
    return y.contiguous(), final if need_state else z.new_empty(0)


def definition_backward(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None,
    state: Tensor | None,
    padding_mask: Tensor | None,
    truncation: int,
    direction: int,
    activation: int,
    layout: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, the four parameters, residual and state (empty where absent), with every state in memory."""
    tensors = (x, damping, decay, expansion, projection, residual, state)
    x, damping, decay, expansion, projection, omega, h0 = (
        None if t is None else t.to(compute_dtype(*tensors)) for t in tensors
    )
    x, grad = x.permute(_TO_BDL[layout]), grad.to(x.dtype).permute(_TO_BDL[layout])
    u = x if padding_mask is None else x.masked_fill(padding_mask.unsqueeze(1), 0.0)
    q, b, c = coefficients(damping, decay, expansion, projection)
    channels, length = x.shape[1:]
    if not 0 < truncation < length:
        truncation = length
    passes = {0: ((0, False),), 1: ((0, True),), 2: ((0, False), (channels, True))}[direction]

    def ordered(t: Tensor, reverse: bool) -> Tensor:
        return t.flip(-1) if reverse else t

    def late(h: Tensor, weight: Tensor) -> Tensor:  # weight h(t - truncation)
        return weight.unsqueeze(-1) * F.pad(h[..., : length - truncation], (truncation, 0))

    def rows(t: Tensor, first: int) -> Tensor:
        return t[first : first + channels]

    states, z = [], 0 if omega is None else omega.unsqueeze(-1) * x
    for first, reverse in passes:
        qs, bs, cs = rows(q, first), rows(b, first), rows(c, first)
        h = _states(bs.unsqueeze(-1) * ordered(u, reverse).unsqueeze(2), qs, h0)
        kept = h - late(h, qs ** float(truncation)) if truncation < length else h
        states.append((h, kept))
        z = z + ordered((cs.unsqueeze(-1) * kept).sum(2), reverse)
    g = _DERIVATIVES[activation](grad, z)
    dx = g * 0
    dq, db, dc = torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(q)
    dstate = None
    for (first, reverse), (h, kept) in zip(passes, states, strict=True):
        qs, bs, cs = rows(q, first), rows(b, first), rows(c, first)
        gs = ordered(g, reverse).unsqueeze(2)  # (B, D, 1, L)
        e = cs.unsqueeze(-1) * gs  # the gradient of h(t) by y
        if truncation < length:
            rows(dq, first).sub_((e * late(h, truncation * qs ** float(truncation - 1))).sum((0, 3)))
            e = e - late(e.flip(-1), qs ** float(truncation)).flip(-1)
        e = _states(e.flip(-1), qs, grad_state, last=True).flip(-1)  # by everything
        before = torch.zeros_like(h[..., :1]) if h0 is None else h0.unsqueeze(-1)
        before = torch.cat([before, h], -1)[..., :-1]
        rows(dq, first).add_((e * before).sum((0, 3)))
        rows(db, first).add_((e * ordered(u, reverse).unsqueeze(2)).sum((0, 3)))
        rows(dc, first).add_((gs * kept).sum((0, 3)))
        dx = dx + ordered((bs.unsqueeze(-1) * e).sum(2), reverse)
        if h0 is not None:
            dstate = qs * e[..., 0] if length else torch.zeros_like(h0) if grad_state is None else grad_state
    if padding_mask is not None:
        dx = dx.masked_fill(padding_mask.unsqueeze(1), 0.0)
    domega = None if omega is None else (g * x).sum((0, 2))
    if omega is not None:
        dx = dx + omega.unsqueeze(-1) * g
    p, a = torch.sigmoid(damping), torch.sigmoid(decay)
    ddamping, ddecay = (db * expansion - dq * a) * p * (1 - p), -dq * p * a * (1 - a)
    grads = (
        dx.permute(_FROM_BDL[layout]).contiguous(),
        ddamping,
        ddecay,
        db * p,
        dc * projection.shape[-1] ** -0.5,
    )
    return tuple(
        grad.new_empty(0) if t is None else d.to(t.dtype)
        for d, t in zip((*grads, domega, dstate), tensors, strict=True)
    )


def _states(inputs: Tensor, q: Tensor, start: Tensor | None, last: bool = False) -> Tensor:
    """h(t) = q h(t−1) + inputs(t) of (B, D, N, L), by doubling. ``start`` (B, D, N) is h(−1), or with ``last`` what is
    added to the first input."""
    h, step = inputs, 1
    if start is not None and inputs.shape[-1]:
        h = torch.cat([h[..., :1] + (start if last else q * start).unsqueeze(-1), h[..., 1:]], -1)
    while step < h.shape[-1]:
        h = h + (q ** float(step)).unsqueeze(-1) * F.pad(h[..., :-step], (step, 0))
        step *= 2
    return h


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any of the tensors is, else float32: what is computed in, and the state's dtype."""
    wide = any(t is not None and t.dtype is torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


# --------------------------------------------------------------------------- kernels
def _operands(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """(x, damping, decay, expansion, projection, residual, state, padding_mask) as the kernels take them."""
    x, *parameters, mask = tensors
    dtype = compute_dtype(x, *parameters)
    return (
        x.to(dtype) if dtype is torch.float64 else x,
        *(None if p is None else p.to(dtype).contiguous() for p in parameters),
        None if mask is None else mask.contiguous(),
    )


def forward(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None,
    state: Tensor | None,
    padding_mask: Tensor | None,
    truncation: int,
    direction: int,
    activation: int,
    layout: int,
    need_state: bool,
) -> tuple[Tensor, Tensor]:
    """(y, final state) without autograd, by the best kernel for x; the state is empty unless needed."""
    tensors = (x, damping, decay, expansion, projection, residual, state, padding_mask)
    options = (truncation, direction, activation, layout, need_state)
    kernels = FAMILY.kernels(x, *_floating(tensors))
    if kernels is None:
        return _formula(*tensors, *options)
    y, final = kernels.forward(*_operands(tensors), *options)
    return y.to(x.dtype), final


def backward(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None,
    state: Tensor | None,
    padding_mask: Tensor | None,
    truncation: int,
    direction: int,
    activation: int,
    layout: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, damping, decay, expansion, projection, residual and state (empty where absent), without
    autograd, by the best kernel for x."""
    tensors = (x, damping, decay, expansion, projection, residual, state, padding_mask)
    options = (truncation, direction, activation, layout)
    kernels = FAMILY.kernels(x, *_floating(tensors))
    if kernels is None:
        return definition_backward(grad, grad_state, *tensors, *options)
    operands = _operands(tensors)
    if grad_state is not None:
        grad_state = grad_state.to(operands[1].dtype).contiguous()
    grads = kernels.backward(grad.to(operands[0].dtype), grad_state, *operands, *options)
    return tuple(
        g if t is None else g.to(t.dtype).reshape(t.shape) for g, t in zip(grads, tensors[:7], strict=True)
    )


def _floating(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(t for t in tensors[1:7] if t is not None)


class _EmaScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        y, final = forward(*arguments)
        _remember(ctx, arguments, (y, final))
        return (y, final) if arguments[-1] else y

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_state: Tensor | None = None):
        refuse_double_backward("ema_scan")
        return _gradients(backward, ctx, grad, grad_state)


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:12]
    ctx.need_state = inputs[12]


def _gradients(function, ctx, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = function(grad, grad_state if ctx.need_state else None, *tensors, *ctx.options)
    given = (None if t is None else g for g, t in zip(grads, tensors[:7], strict=True))
    return *given, None, None, None, None, None, None


# --------------------------------------------------------------------------- registration
def _fake_forward(*arguments) -> tuple[Tensor, Tensor]:
    x, damping = arguments[:2]
    if FAMILY.kernels(x, *_floating(arguments)) is None:
        return _formula(*arguments)
    layout, need_state = arguments[11:]
    dtype = compute_dtype(*arguments[:7])
    channels = x.permute(_TO_BDL[layout]).shape[1]
    batch = x.permute(_TO_BDL[layout]).shape[0]
    shape = (batch, channels, damping.shape[1]) if need_state else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=dtype)


def _fake_backward(grad: Tensor, grad_state: Tensor | None, *arguments) -> tuple[Tensor, ...]:
    return tuple(grad.new_empty(0) if t is None else t.new_empty(t.shape) for t in arguments[:7])


_TENSORS = (
    "Tensor x, Tensor damping, Tensor decay, Tensor expansion, Tensor projection, Tensor? residual, Tensor? state, "
    "Tensor? padding_mask, SymInt truncation, int direction, int activation, int layout"
)

_BACKWARD_OP = register(
    f"ema_scan_backward(Tensor grad, Tensor? grad_state, {_TENSORS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)

_OP = register(
    f"ema_scan({_TENSORS}, bool need_state) -> (Tensor, Tensor)",
    forward,
    _fake_forward,
    setup_context=_remember,
    backward=lambda ctx, grad, grad_state: _gradients(_BACKWARD_OP, ctx, grad, grad_state),
)


# --------------------------------------------------------------------------- public function
def ema_scan(
    x: Tensor,
    damping: Tensor,
    decay: Tensor,
    expansion: Tensor,
    projection: Tensor,
    residual: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    padding_mask: Tensor | None = None,
    truncation: int | None = None,
    direction: str = "forward",
    activation: str = "identity",
    layout: str = "LBD",
) -> Tensor | tuple[Tensor, Tensor]:
    """The multi-head damped EMA of Mega: y = act(Σ_n c_n h_n + residual · x), h_n(t) = q_n h_n(t−1) + b_n x_t.

    Args:
        x: (L, B, D), (B, L, D) or (B, D, L) as ``layout`` says; float32, bfloat16, float16 or float64.
        damping, decay: (D, N) or (D, N, 1), 1 ≤ N ≤ 64, before the sigmoid: p = σ(damping), q = 1 − p σ(decay).
        expansion, projection: the same shape: b = p · expansion, c = projection / √N. For
            ``direction="bidirectional"`` the four are (2D, N): the second half scans from the end, and the present
            step counts in both.
        residual: (D,), or None for no residual term.
        state: (B, D, N), h before the first step; None: zeros. With ``direction="reverse"`` the first step is the last.
        return_state: return h after the last step too, in float32 (float64 when any argument is).
        padding_mask: (B, L), bool, True where x is padding: it does not enter the average; the residual term stays.
        truncation: keep the first so many taps of the convolution, None: all. Not together with a state.
        direction: "forward", "reverse" or "bidirectional".
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
    Returns:
        y of x's shape and dtype, contiguous, computed in float32 or better and rounded once; with ``return_state``
        (y, state (B, D, N)).
    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not match, or options exclude each other.
    """
    if (
        not is_compiling()
        and FAMILY.native is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (truncation is None or (type(truncation) is int and truncation > 0))
        and type(return_state) is bool
        and _plain_constants((damping, decay, expansion, projection, residual, state, padding_mask))
        and not (x.requires_grad and is_grad_enabled())
    ):
        try:
            y, final = FAMILY.native.forward(
                x,
                damping,
                decay,
                expansion,
                projection,
                residual,
                state,
                padding_mask,
                truncation or 0,
                DIRECTIONS[direction],
                ACTIVATIONS[activation],
                LAYOUTS[layout],
                return_state,
            )
            return (y, final) if return_state else y
        except (RuntimeError, KeyError, TypeError):
            pass  # the checked path tells why, or does what the kernels do not
    op = "ema_scan"
    _check.floating_tensor(op, "x", x)
    layout = _option(op, "layout", layout, LAYOUTS)
    direction = _option(op, "direction", direction, DIRECTIONS)
    activation = _option(op, "activation", activation, ACTIVATIONS)
    _check.shape(op, "x", x, "of three dimensions", x.dim() == 3)
    batch, channels, length = (x.shape[d] for d in _TO_BDL[layout])
    bidirectional = direction == DIRECTIONS["bidirectional"]
    rows = 2 * channels if bidirectional else channels
    parameters = []
    for name, p in (
        ("damping", damping),
        ("decay", decay),
        ("expansion", expansion),
        ("projection", projection),
    ):
        parameters.append(_parameter(op, name, p, x, rows, parameters[0] if parameters else None))
    states = parameters[0].shape[1]
    if residual is not None:
        _check.floating_tensor(op, "residual", residual)
        _check.shape(op, "residual", residual, f"({channels},)", residual.shape == (channels,))
        _check.same_device(op, "residual", residual, x, "x")
    if not isinstance(return_state, bool):
        raise TypeError(f"fastasr.{op}: return_state: expected a bool, got {type(return_state).__name__}")
    if state is not None:
        _check.floating_tensor(op, "state", state)
        shape = (batch, channels, states)
        _check.shape(op, "state", state, f"{shape}", state.shape == shape)
        _check.same_device(op, "state", state, x, "x")
    if bidirectional and (state is not None or return_state):
        raise ValueError(
            f"fastasr.{op}: direction: expected 'forward' or 'reverse' with state or return_state, "
            "got 'bidirectional'"
        )
    if padding_mask is not None:
        _check_mask(op, padding_mask, (batch, length), x)
    truncation = _check_truncation(op, truncation, state is not None or return_state)
    tensors = (x, *parameters, residual, state, padding_mask)
    arguments = (*tensors, truncation, direction, activation, layout, return_state)
    floating = _floating(tensors)
    if not direct(*tensors):
        y, final = (_OP if served(op, x, *floating) else _formula)(*arguments)
    elif FAMILY.kernels(x, *floating) is None:
        y, final = _formula(*arguments)
    elif is_grad_enabled() and any(t.requires_grad for t in (x, *floating)):
        return _EmaScan.apply(*arguments)
    else:
        y, final = forward(*arguments)
    return (y, final) if return_state else y


def _plain_constants(tensors: tuple) -> bool:
    """Plain tensors (or None) that no gradient is wanted of."""
    wanted = is_grad_enabled()
    return all(t is None or (type(t) in PLAIN and not (wanted and t.requires_grad)) for t in tensors)


def _option(op: str, name: str, value: object, options: dict[str, int]) -> int:
    if not isinstance(value, str):
        raise TypeError(f"fastasr.{op}: {name}: expected one of {tuple(options)}, got {type(value).__name__}")
    if value not in options:
        raise ValueError(f"fastasr.{op}: {name}: expected one of {tuple(options)}, got {value!r}")
    return options[value]


def _parameter(op: str, name: str, value: Tensor, x: Tensor, rows: int, first: Tensor | None) -> Tensor:
    """(rows, N), from (rows, N) or (rows, N, 1)."""
    _check.floating_tensor(op, name, value)
    states = "N" if first is None else first.shape[1]
    ok = value.dim() == 2 or (value.dim() == 3 and value.shape[2] == 1)
    ok = ok and value.shape[0] == rows and (first is None or value.shape[1] == states)
    _check.shape(op, name, value, f"({rows}, {states}) or ({rows}, {states}, 1)", ok)
    if first is None and not 1 <= value.shape[1] <= MOST_STATES:
        raise ValueError(f"fastasr.{op}: {name}: expected 1 to {MOST_STATES} states, got {value.shape[1]}")
    _check.same_device(op, name, value, x, "x")
    return value if value.dim() == 2 else value.squeeze(2)


def _check_mask(op: str, mask: object, shape: tuple[int, int], x: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"fastasr.{op}: padding_mask: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype is not torch.bool or mask.layout is not torch.strided:
        raise TypeError(
            f"fastasr.{op}: padding_mask: expected a bool tensor, got {mask.dtype}, {mask.layout}"
        )
    _check.shape(op, "padding_mask", mask, f"{tuple(shape)}", mask.shape == shape)
    _check.same_device(op, "padding_mask", mask, x, "x")


def _check_truncation(op: str, truncation: object, with_state: bool) -> int:
    if truncation is None:
        return 0
    _check.integer(op, "truncation", truncation)
    if truncation < 1:
        raise ValueError(f"fastasr.{op}: truncation: expected at least 1, got {truncation}")
    if with_state:
        raise ValueError(
            f"fastasr.{op}: truncation: expected None with state or return_state, got {truncation}"
        )
    return truncation
