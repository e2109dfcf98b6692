# SPDX-License-Identifier: Apache-2.0
"""What ema_scan and complex_ema_scan share: options, the formula from q, b and c on, kernels and autograd, checks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled

from fastasr.ops import _check
from fastasr.ops._dispatch import PLAIN, KernelFamily, cuda_kernels, direct, native_kernels, served
from fastasr.ops._register import refuse_double_backward, register

LAYOUTS = {"LBD": 0, "BLD": 1, "BDL": 2}
DIRECTIONS = {"forward": 0, "reverse": 1, "bidirectional": 2}
ACTIVATIONS = {"identity": 0, "silu": 1, "relu": 2, "tanh": 3, "gelu": 4}
MOST_STATES = 64

TO_BDL = ((1, 2, 0), (0, 2, 1), (0, 1, 2))
FROM_BDL = ((2, 0, 1), (0, 2, 1), (0, 1, 2))
FUNCTIONS = (lambda z: z, F.silu, F.relu, torch.tanh, F.gelu)
DERIVATIVES = (
    lambda g, z: g,
    torch.ops.aten.silu_backward,
    lambda g, z: torch.where(z > 0, g, 0.0),
    lambda g, z: g * (1 - torch.tanh(z) ** 2),
    torch.ops.aten.gelu_backward,
)


# --------------------------------------------------------------------------- the formula, from q, b and c on
def recurrence(x: Tensor, q: Tensor, b: Tensor, c: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ c h for x (B, D, L), step by step, and the last h (B, D, N); of its real part where q and c are complex."""
    decay = q**1.0
    h = decay.new_zeros(*x.shape[:2], decay.shape[-1]) if state is None else state
    y = []
    for t in range(x.shape[-1]):
        h = _plus_real(decay * h, b * x[..., t, None])
        y.append(_real((c * h).sum(-1)))
    return torch.stack(y, -1) if y else torch.zeros_like(x), h


def _real(t: Tensor) -> Tensor:
    return t.real if t.is_complex() else t


def _plus_real(t: Tensor, real: Tensor) -> Tensor:
    """t + real. torch multiplies a real summand by a complex 1, which makes infinities NaN in both parts."""
    return torch.complex(t.real + real, t.imag) if t.is_complex() else t + real


CHUNK = 16


def convolution(
    x: Tensor, q: Tensor, b: Tensor, c: Tensor, state: Tensor | None, need_state: bool
) -> tuple[Tensor, Tensor]:
    """What :func:`recurrence` computes, in about 16 + log L steps over whole tensors: inside chunks of 16 a direct
    convolution, between chunks a scan by doubling. Powers are powers, not exp(j log q): q may be 0 or 1. ``q`` is a
    tensor, or whatever has its ``**``: complex numbers by radius and angle."""
    batch, channels, length = x.shape
    chunks = max(1, (length + CHUNK - 1) // CHUNK)
    blocks = F.pad(x, (0, chunks * CHUNK - length)).reshape(batch, channels, chunks, CHUNK)
    powers = q.unsqueeze(-1) ** torch.arange(CHUNK + 1, device=x.device, dtype=x.dtype)  # (D, N, 17)
    states = powers.shape[1]
    before = powers.new_zeros(batch, channels, 1, states) if state is None else state.unsqueeze(2)

    taps = _real(((b * c).unsqueeze(-1) * powers[..., :CHUNK]).sum(1))  # (D, 16)
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
    y = y + torch.stack([_real((carry * decayed[:, None, :, i]).sum(-1)) for i in range(CHUNK)], -1)

    y = y.reshape(batch, channels, chunks * CHUNK)[..., :length]
    if not need_state or length == 0:
        return y, before.squeeze(2) + powers[:0].sum()  # + 0: the gradients of what is not used are zeros
    rest = length - (chunks - 1) * CHUNK
    last = q**rest * carry[:, :, -1]
    # What enters at the last step enters as it is: an infinity times the complex q^0 would be NaN in the imaginary
    # part, which this step leaves as it was.
    newest, earlier = blocks[:, :, -1, rest - 1, None] * b, blocks[:, :, -1, None, : rest - 1]
    tail = b.unsqueeze(-1) * powers[..., 1:rest].flip(-1)
    return y, _plus_real(last + (earlier * tail).sum(-1), newest)


def _window(inputs: Tensor, q: Tensor, taps: int) -> Tensor:
    """Σ_{j<taps} q^j inputs(t−j) of (B, D, N, L), by doubling: no tap is subtracted again."""

    def late(h: Tensor, power: Tensor, steps: int) -> Tensor:
        return power.unsqueeze(-1) * F.pad(h, (steps, -steps))

    # q to powers of two alone: their angle is exact, that of q^36 would be rounded before its cosine is taken
    total, counted, shift = 0.0 * (q**1.0).unsqueeze(-1), 0, q**0.0
    block, size = inputs, 1  # the sum of `size` taps
    while True:
        power = q ** float(size)
        if taps & size:
            total = total + (late(block, shift, counted) if counted else block)
            shift = power if counted == 0 else shift * power
            counted += size
        if 2 * size > taps:
            return total
        block = block + late(block, power, size)
        size *= 2


def scan_of_coefficients(
    x: Tensor,
    q: Tensor,
    b: Tensor,
    c: Tensor,
    residual: Tensor | None,
    start: Tensor | None,
    padding_mask: Tensor | None,
    truncation: int,
    direction: int,
    activation: int,
    layout: int,
    need_state: bool,
) -> tuple[Tensor, Tensor]:
    """(y, final state) from q, b and c (D, N), which are of the dtype that is computed in."""
    dtype = b.dtype
    u = x.permute(TO_BDL[layout]).to(dtype)
    masked = u if padding_mask is None else u.masked_fill(padding_mask.unsqueeze(1), 0.0)
    channels, length = u.shape[1:]

    def scan(v: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        qs, bs, cs = q[rows], b[rows], c[rows]
        if 0 < truncation < length:
            h = _window(bs.unsqueeze(-1) * v.unsqueeze(2), qs, truncation)
            return _real((cs.unsqueeze(-1) * h).sum(2)), h.new_empty(0)
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
    y = FUNCTIONS[activation](z).to(x.dtype).permute(FROM_BDL[layout])
    return y.contiguous(), final if need_state else z.new_empty(0)


def gradients_of_coefficients(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    q: Tensor,
    b: Tensor,
    c: Tensor,
    omega: Tensor | None,
    h0: Tensor | None,
    padding_mask: Tensor | None,
    truncation: int,
    direction: int,
    activation: int,
    layout: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, q, b, c, omega and h0. For complex numbers they are derivatives: d loss = Re(dq · change of q),
    and so is ``grad_state``."""
    x, grad = x.permute(TO_BDL[layout]), grad.permute(TO_BDL[layout])
    u = x if padding_mask is None else x.masked_fill(padding_mask.unsqueeze(1), 0.0)
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
        z = z + ordered(_real((cs.unsqueeze(-1) * kept).sum(2)), reverse)
    g = DERIVATIVES[activation](grad, z)
    dx = g * 0
    dq, db, dc = torch.zeros_like(q**1.0), torch.zeros_like(b), torch.zeros_like(c)
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
        rows(db, first).add_(_real((e * ordered(u, reverse).unsqueeze(2)).sum((0, 3))))
        rows(dc, first).add_((gs * kept).sum((0, 3)))
        dx = dx + ordered(_real((bs.unsqueeze(-1) * e).sum(2)), reverse)
        if h0 is not None:
            dstate = (
                qs**1.0 * e[..., 0] if length else torch.zeros_like(h0) if grad_state is None else grad_state
            )
    if padding_mask is not None:
        dx = dx.masked_fill(padding_mask.unsqueeze(1), 0.0)
    domega = None if omega is None else (g * x).sum((0, 2))
    if omega is not None:
        dx = dx + omega.unsqueeze(-1) * g
    return dx.permute(FROM_BDL[layout]).contiguous(), dq, db, dc, domega, dstate


def _states(inputs: Tensor, q: Tensor, start: Tensor | None, last: bool = False) -> Tensor:
    """h(t) = q h(t−1) + inputs(t) of (B, D, N, L), by doubling. ``start`` (B, D, N) is h(−1), or with ``last`` what is
    added to the first input."""
    h, step = inputs, 1
    if start is not None and inputs.shape[-1]:
        h = torch.cat([h[..., :1] + (start if last else q**1.0 * start).unsqueeze(-1), h[..., 1:]], -1)
    while step < h.shape[-1]:
        h = h + (q ** float(step)).unsqueeze(-1) * F.pad(h[..., :-step], (step, 0))
        step *= 2
    return h


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any of the tensors is, else float32: what is computed in, and the state's dtype."""
    wide = any(t is not None and t.dtype is torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


# --------------------------------------------------------------------------- kernels and autograd
class Scan:
    """Kernels, autograd and registration of one scan.

    Its arguments are x, the four ``parameters``, the residual's weights, state, padding_mask, truncation, direction,
    activation, layout and need_state. ``formula(*arguments)`` -> (y, final state, empty unless needed) and
    ``gradients(grad, grad_state, *arguments without need_state)`` -> gradients of the first seven (empty where absent)
    compute in eager. ``parts`` is the shape of one state: (), or (2,) for a complex number.
    """

    def __init__(
        self, name: str, parameters: str, formula: Callable, gradients: Callable, parts: tuple[int, ...] = ()
    ) -> None:
        self.name, self.parts = name, parts
        self.formula, self.gradients = formula, gradients
        self.family = KernelFamily(name, (name,), (native_kernels(name), cuda_kernels(name)))
        *tensors, residual = (f"Tensor {p}" for p in parameters.split())
        optional = residual.replace("Tensor", "Tensor?"), "Tensor? state", "Tensor? padding_mask"
        options = "SymInt truncation", "int direction", "int activation", "int layout"
        arguments = ", ".join(("Tensor x", *tensors, *optional, *options))
        self._backward_op = register(
            f"{name}_backward(Tensor grad, Tensor? grad_state, {arguments}) -> ({', '.join(['Tensor'] * 7)})",
            self.backward,
            self._fake_backward,
        )
        self._op = register(
            f"{name}({arguments}, bool need_state) -> (Tensor, Tensor)",
            self.forward,
            self._fake_forward,
            setup_context=_remember,
            backward=lambda ctx, grad, grad_state: _gradients(self._backward_op, ctx, grad, grad_state),
        )

    def __call__(self, *arguments) -> tuple[Tensor, Tensor]:
        """(y, final state) of checked arguments, by the best path; the state is empty unless needed."""
        x, floating = arguments[0], _floating_of(arguments)
        if not direct(*arguments[:8]):
            return (self._op if served(self.name, x, *floating) else self.formula)(*arguments)
        if self.family.kernels(x, *floating) is None:
            return self.formula(*arguments)
        if is_grad_enabled() and any(t.requires_grad for t in (x, *floating)):
            return _Scan.apply(self, *arguments)
        return self.forward(*arguments)

    def forward(self, *arguments) -> tuple[Tensor, Tensor]:
        """(y, final state) without autograd, by the best kernel for x."""
        x = arguments[0]
        kernels = self.family.kernels(x, *_floating_of(arguments))
        if kernels is None:
            return self.formula(*arguments)
        y, final = kernels.forward(*_kernel_operands(arguments[:8]), *arguments[8:])
        return y.to(x.dtype), final

    def backward(self, grad: Tensor, grad_state: Tensor | None, *arguments) -> tuple[Tensor, ...]:
        """Gradients of the first seven arguments (empty where absent) without autograd, by the best kernel for x."""
        kernels = self.family.kernels(arguments[0], *_floating_of(arguments))
        if kernels is None:
            return self.gradients(grad, grad_state, *arguments)
        operands = _kernel_operands(arguments[:8])
        if grad_state is not None:
            grad_state = grad_state.to(operands[1].dtype).contiguous()
        grads = kernels.backward(grad.to(operands[0].dtype), grad_state, *operands, *arguments[8:])
        return tuple(
            g if t is None else g.to(t.dtype).reshape(t.shape)
            for g, t in zip(grads, arguments[:7], strict=True)
        )

    def _fake_forward(self, *arguments) -> tuple[Tensor, Tensor]:
        x, first = arguments[:2]
        if self.family.kernels(x, *_floating_of(arguments)) is None:
            return self.formula(*arguments)
        layout, need_state = arguments[11:]
        batch, channels, _ = x.permute(TO_BDL[layout]).shape
        shape = (batch, channels, first.shape[1], *self.parts) if need_state else (0,)
        return x.new_empty(x.shape), x.new_empty(shape, dtype=compute_dtype(*arguments[:7]))

    @staticmethod
    def _fake_backward(grad: Tensor, grad_state: Tensor | None, *arguments) -> tuple[Tensor, ...]:
        return tuple(grad.new_empty(0) if t is None else t.new_empty(t.shape) for t in arguments[:7])


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scan: Scan, *arguments):
        found = scan.forward(*arguments)
        ctx.scan = scan
        _remember(ctx, arguments, found)
        if not ctx.need_state:
            ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_state: Tensor | None):
        refuse_double_backward(ctx.scan.name)
        return None, *_gradients(ctx.scan.backward, ctx, grad, grad_state)


def _kernel_operands(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """x, the parameters, residual, state and padding_mask as the kernels take them."""
    x, *parameters, mask = tensors
    dtype = compute_dtype(x, *parameters)
    return (
        x.to(dtype) if dtype is torch.float64 else x,
        *(None if p is None else p.to(dtype).contiguous() for p in parameters),
        None if mask is None else mask.contiguous(),
    )


def _floating_of(arguments: tuple) -> tuple[Tensor, ...]:
    return tuple(t for t in arguments[1:7] if t is not None)


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:12]
    ctx.need_state = inputs[12]


def _gradients(function: Callable, ctx, grad: Tensor, grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = function(grad, grad_state if ctx.need_state else None, *tensors, *ctx.options)
    given = (None if t is None else g for g, t in zip(grads, tensors[:7], strict=True))
    return *given, None, None, None, None, None, None


# --------------------------------------------------------------------------- checks
def plain_constants(tensors: tuple) -> bool:
    """Plain tensors (or None) that no gradient is wanted of."""
    wanted = is_grad_enabled()
    return all(t is None or (type(t) in PLAIN and not (wanted and t.requires_grad)) for t in tensors)


def option(op: str, name: str, value: object, options: dict[str, int]) -> int:
    if not isinstance(value, str):
        raise TypeError(f"fastasr.{op}: {name}: expected one of {tuple(options)}, got {type(value).__name__}")
    if value not in options:
        raise ValueError(f"fastasr.{op}: {name}: expected one of {tuple(options)}, got {value!r}")
    return options[value]


def check_mask(op: str, mask: object, shape: tuple[int, int], x: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"fastasr.{op}: padding_mask: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype is not torch.bool or mask.layout is not torch.strided:
        raise TypeError(
            f"fastasr.{op}: padding_mask: expected a bool tensor, got {mask.dtype}, {mask.layout}"
        )
    _check.shape(op, "padding_mask", mask, f"{tuple(shape)}", mask.shape == shape)
    _check.same_device(op, "padding_mask", mask, x, "x")


def check_return_state(op: str, return_state: object, state: Tensor | None, direction: int) -> None:
    if not isinstance(return_state, bool):
        raise TypeError(f"fastasr.{op}: return_state: expected a bool, got {type(return_state).__name__}")
    if direction == DIRECTIONS["bidirectional"] and (state is not None or return_state):
        raise ValueError(
            f"fastasr.{op}: direction: expected 'forward' or 'reverse' with state or return_state, "
            "got 'bidirectional'"
        )


def check_truncation(op: str, truncation: object, with_state: bool) -> int:
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
