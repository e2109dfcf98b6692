# SPDX-License-Identifier: Apache-2.0
r"""The complex exponential moving average of Megalodon (Ma et al., 2024, section 3.1), as a scan linear in the length.

Per channel, with N complex states: p = σ(α), q_n = (1 − p_n σ(δ_n)) exp(i n σ(θ) 2π/N) for n = 1 … N, c = γ / √N,

    h_n(t) = q_n h_n(t−1) + p_n x_t          y_t = act(Re Σ_n c_n h_n(t) + ω x_t)

Backward, with z the argument of act, g = dy act'(z), and derivatives D for which d loss = Re(D · change):
λ_n(t) = c_n g_t + q_n λ_n(t+1), dx = Re Σ_n p_n λ_n + ω g, dp_n = Re Σ_t λ_n x_t, dc_n = Σ_t g_t h_n,
dq_n = c_n Σ_t g_t v_n with v_n(t) = q_n v_n(t−1) + h_n(t−1), dω = Σ_t g x; as for real numbers, see ema_scan.
Upstream: ``MultiHeadComplexEMA`` in ``megalodon.modules``, a convolution by FFT.

Memory traffic per element: read x, write y forward; read dy and x twice or less, write dx backward.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check
from fastasr.ops._dispatch import PLAIN
from fastasr.ops._ema import (
    ACTIVATIONS,
    DIRECTIONS,
    LAYOUTS,
    MOST_STATES,
    TO_BDL,
    Scan,
    check_mask,
    check_return_state,
    check_truncation,
    compute_dtype,
    gradients_of_coefficients,
    option,
    plain_constants,
    scan_of_coefficients,
)


# --------------------------------------------------------------------------- definition
@dataclass(frozen=True)
class Polar:
    """Complex numbers by radius and angle: their powers are exact at radius 0 and 1."""

    radius: Tensor
    angle: Tensor

    def __pow__(self, exponent: float | Tensor) -> Tensor:
        radius, angle = self.radius**exponent, self.angle * exponent
        return torch.complex(
            radius * torch.cos(angle), radius * torch.sin(angle)
        )  # polar: no gradient at radius 0

    def __getitem__(self, rows: slice) -> "Polar":
        return Polar(self.radius[rows], self.angle[rows])

    def unsqueeze(self, dim: int) -> "Polar":
        return Polar(self.radius.unsqueeze(dim), self.angle.unsqueeze(dim))


def definition(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    padding_mask: Tensor | None = None,
    truncation: int | None = None,
    direction: str = "forward",
    activation: str = "identity",
    layout: str = "LBD",
) -> Tensor | tuple[Tensor, Tensor]:
    """The formula in eager PyTorch, as a convolution inside short chunks and a scan between them."""
    parameters = (alpha.reshape(alpha.shape[:2]), delta.reshape(delta.shape[:2]), theta.reshape(-1), gamma)
    omega = None if omega is None else omega.reshape(-1)
    options = (truncation or 0, DIRECTIONS[direction], ACTIVATIONS[activation], LAYOUTS[layout], return_state)
    y, final = _formula(x, *parameters, omega, _as_real(state), padding_mask, *options)
    return (y, _as_given(final, state)) if return_state else y


def coefficients(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor) -> tuple[Polar, Tensor, Tensor]:
    """(q, p, c), each (D, N), p real."""
    states = alpha.shape[-1]
    p = torch.sigmoid(alpha)
    wavelets = torch.arange(1, states + 1, device=theta.device, dtype=theta.dtype)
    angle = wavelets * (torch.sigmoid(theta) * (2 * math.pi / states)).unsqueeze(-1)
    c = torch.complex(gamma[..., 0], gamma[..., 1]) * states**-0.5
    return Polar(1 - p * torch.sigmoid(delta), angle), p, c


def _as_real(state: Tensor | None) -> Tensor | None:
    """(B, D, N, 2), from that or from complex (B, D, N)."""
    return torch.view_as_real(state.resolve_conj()) if state is not None and state.is_complex() else state


def _as_given(final: Tensor, state: Tensor | None) -> Tensor:
    """The final state in the form of the first; complex where there was none."""
    return torch.view_as_complex(final) if state is None or state.is_complex() else final


def _complex(t: Tensor) -> Tensor:
    return torch.complex(t[..., 0], t[..., 1])


def _formula(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor | None,
    state: Tensor | None,
    padding_mask: Tensor | None,
    truncation: int,
    direction: int,
    activation: int,
    layout: int,
    need_state: bool,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x, alpha, delta, theta, gamma, omega, state)
    qpc = coefficients(*(t.to(dtype) for t in (alpha, delta, theta, gamma)))
    start = None if state is None else _complex(state.to(dtype))
    options = (truncation, direction, activation, layout, need_state)
    y, final = scan_of_coefficients(x, *qpc, omega, start, padding_mask, *options)
    return y, torch.stack((final.real, final.imag), -1) if need_state else y.new_empty(0, dtype=dtype)


def definition_backward(
    grad: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor | None,
    state: Tensor | None,
    padding_mask: Tensor | None,
    truncation: int,
    direction: int,
    activation: int,
    layout: int,
) -> tuple[Tensor, ...]:
    """Gradients of x, the four parameters, omega and state (empty where absent), with every state in memory."""
    tensors = (x, alpha, delta, theta, gamma, omega, state)
    dtype = compute_dtype(*tensors)
    x, alpha, delta, theta, gamma, omega, state = (None if t is None else t.to(dtype) for t in tensors)
    q, p, c = coefficients(alpha, delta, theta, gamma)
    dx, dq, dp, dc, domega, dstate = gradients_of_coefficients(
        grad.to(dtype),
        None if grad_state is None else _complex(grad_state.to(dtype)).conj(),
        x,
        q,
        p,
        c,
        omega,
        None if state is None else _complex(state),
        padding_mask,
        truncation,
        direction,
        activation,
        layout,
    )
    states = alpha.shape[-1]
    a, s = torch.sigmoid(delta), torch.sigmoid(theta)
    dradius = (dq * torch.polar(torch.ones_like(q.angle), q.angle)).real
    wavelets = torch.arange(1, states + 1, device=x.device, dtype=dtype)
    dangle = -(wavelets * (dq * q**1.0).imag).sum(-1)
    grads = (
        dx,
        (dp - dradius * a) * p * (1 - p),
        -dradius * p * a * (1 - a),
        dangle * (2 * math.pi / states) * s * (1 - s),
        torch.view_as_real(dc.conj().resolve_conj() * states**-0.5),
        domega,
        None if dstate is None else torch.view_as_real(dstate.conj().resolve_conj()),
    )
    return tuple(
        grad.new_empty(0) if t is None else d.to(t.dtype) for d, t in zip(grads, tensors, strict=True)
    )


_SCAN = Scan("complex_ema_scan", "alpha delta theta gamma omega", _formula, definition_backward, (2,))


# --------------------------------------------------------------------------- public function
def complex_ema_scan(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor | None = None,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    padding_mask: Tensor | None = None,
    truncation: int | None = None,
    direction: str = "forward",
    activation: str = "identity",
    layout: str = "LBD",
) -> Tensor | tuple[Tensor, Tensor]:
    """The complex EMA of Megalodon: y = act(Re Σ_n c_n h_n + omega · x), h_n(t) = q_n h_n(t−1) + p_n x_t.

    Args:
        x: (L, B, D), (B, L, D) or (B, D, L) as ``layout`` says; float32, bfloat16, float16 or float64.
        alpha, delta: (D, N) or (D, N, 1), 1 ≤ N ≤ 64, before the sigmoid: p = σ(alpha), |q| = 1 − p σ(delta).
        theta: (D,), (D, 1) or (D, 1, 1), before the sigmoid: the angle of q_n is n σ(theta) 2π/N, n = 1 … N.
        gamma: (D, N, 2), real and imaginary part: c = gamma / √N. For ``direction="bidirectional"`` the four have 2D
            rows: the second half scans from the end, and the present step counts in both.
        omega: (D,) or (D, 1), or None for no residual term.
        state: complex (B, D, N), or its real and imaginary parts (B, D, N, 2): h before the first step; None: zeros.
            With ``direction="reverse"`` the first step is the last.
        return_state: return h after the last step too, in complex64 (complex128 when any argument is of 64 bits), or
            in real numbers where ``state`` is.
        padding_mask: (B, L), bool, True where x is padding: it does not enter the average; the residual term stays.
        truncation: keep the first so many taps of the convolution, None: all. Not together with a state.
        direction: "forward", "reverse" or "bidirectional".
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
    Returns:
        y of x's shape and dtype, contiguous, computed in float32 or better and rounded once; with ``return_state``
        (y, state).
    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not match, or options exclude each other.
    """
    if (
        not is_compiling()
        and _SCAN.family.native is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (truncation is None or (type(truncation) is int and truncation > 0))
        and type(return_state) is bool
        and plain_constants((alpha, delta, theta, gamma, omega, state, padding_mask))
        and not (x.requires_grad and is_grad_enabled())
    ):
        try:
            y, final = _SCAN.family.native.forward(
                x,
                alpha,
                delta,
                theta,
                gamma,
                omega,
                _as_real(state),
                padding_mask,
                truncation or 0,
                DIRECTIONS[direction],
                ACTIVATIONS[activation],
                LAYOUTS[layout],
                return_state,
            )
            return (y, _as_given(final, state)) if return_state else y
        except (RuntimeError, KeyError, TypeError):
            pass  # the checked path tells why, or does what the kernels do not
    op = "complex_ema_scan"
    _check.floating_tensor(op, "x", x)
    layout = option(op, "layout", layout, LAYOUTS)
    direction = option(op, "direction", direction, DIRECTIONS)
    activation = option(op, "activation", activation, ACTIVATIONS)
    _check.shape(op, "x", x, "of three dimensions", x.dim() == 3)
    batch, channels, length = (x.shape[d] for d in TO_BDL[layout])
    rows = 2 * channels if direction == DIRECTIONS["bidirectional"] else channels
    parameters = _parameters(op, x, rows, alpha, delta, theta, gamma)
    states = parameters[0].shape[1]
    if omega is not None:
        omega = _column(op, "omega", omega, x, channels, 2)
    given = state
    if state is not None:
        state = _checked_state(op, state, (batch, channels, states), x)
    check_return_state(op, return_state, state, direction)
    if padding_mask is not None:
        check_mask(op, padding_mask, (batch, length), x)
    truncation = check_truncation(op, truncation, state is not None or return_state)
    y, final = _SCAN(
        x, *parameters, omega, state, padding_mask, truncation, direction, activation, layout, return_state
    )
    return (y, _as_given(final, given)) if return_state else y


def _parameters(
    op: str, x: Tensor, rows: int, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor
) -> tuple[Tensor, ...]:
    """alpha and delta (rows, N), theta (rows,), gamma (rows, N, 2)."""
    states = "N"
    for name, value in (("alpha", alpha), ("delta", delta)):
        _check.floating_tensor(op, name, value)
        ok = value.dim() == 2 or (value.dim() == 3 and value.shape[2] == 1)
        ok = ok and value.shape[0] == rows and (name == "alpha" or value.shape[1] == states)
        _check.shape(op, name, value, f"({rows}, {states}) or ({rows}, {states}, 1)", ok)
        _check.same_device(op, name, value, x, "x")
        if name == "alpha":
            states = value.shape[1]
            if not 1 <= states <= MOST_STATES:
                raise ValueError(f"fastasr.{op}: alpha: expected 1 to {MOST_STATES} states, got {states}")
    theta = _column(op, "theta", theta, x, rows, 3)
    _check.floating_tensor(op, "gamma", gamma)
    _check.shape(op, "gamma", gamma, f"({rows}, {states}, 2)", gamma.shape == (rows, states, 2))
    _check.same_device(op, "gamma", gamma, x, "x")
    alpha, delta = (t if t.dim() == 2 else t.squeeze(2) for t in (alpha, delta))
    return alpha, delta, theta, gamma


def _column(op: str, name: str, value: Tensor, x: Tensor, rows: int, dims: int) -> Tensor:
    """(rows,), from that or with trailing dimensions of 1, up to ``dims``."""
    _check.floating_tensor(op, name, value)
    ok = 1 <= value.dim() <= dims and value.shape[0] == rows and all(n == 1 for n in value.shape[1:])
    _check.shape(op, name, value, f"({rows},) or ({rows}{', 1' * (dims - 1)})", ok)
    _check.same_device(op, name, value, x, "x")
    return value.flatten()


def _checked_state(op: str, state: Tensor, shape: tuple[int, int, int], x: Tensor) -> Tensor:
    if isinstance(state, Tensor) and state.dtype in (torch.complex64, torch.complex128):
        _check.shape(op, "state", state, f"{shape}", state.shape == shape)
        _check.same_device(op, "state", state, x, "x")
        return _as_real(state)
    _check.floating_tensor(op, "state", state)
    _check.shape(
        op, "state", state, f"{shape} of complex numbers or {(*shape, 2)}", state.shape == (*shape, 2)
    )
    _check.same_device(op, "state", state, x, "x")
    return state
