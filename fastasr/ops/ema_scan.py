# SPDX-License-Identifier: Apache-2.0
r"""Exponential moving averages with N states per channel, as scans linear in the length: Mega's and Megalodon's.

    h_n(t) = q_n h_n(t−1) + b_n x_t          y_t = act(Re Σ_n c_n h_n(t) + ω x_t)

    ema_scan           p = σ(δ), q = 1 − p σ(α), b = p β, c = γ / √N         (Mega, Ma et al., 2022, section 3.1)
    complex_ema_scan   p = σ(α), q_n = (1 − p_n σ(δ_n)) exp(i n σ(θ) 2π/N) for n = 1 … N, b = p, c = γ / √N with
                       complex γ                                             (Megalodon, Ma et al., 2024, section 3.1)

Backward, with z the argument of act, g = dy act'(z), and for complex numbers derivatives D for which d loss =
Re(D · change): λ_n(t) = c_n g_t + q_n λ_n(t+1), dx = Re Σ_n b_n λ_n + ω g, db_n = Re Σ_t λ_n x_t, dc_n = Σ_t g_t h_n,
dq_n = c_n Σ_t g_t v_n with v_n(t) = q_n v_n(t−1) + h_n(t−1), dω = Σ_t g x.
Upstream: ``MultiHeadDampedEMA`` in ``espnet2.asr_transducer.decoder.modules.mega`` and ``MultiHeadComplexEMA`` in
``megalodon.modules``, convolutions by FFT.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor

from fastasr.ops import _activation
from fastasr.ops._dispatch import widest
from fastasr.ops._linear_recurrence import Polar, convolution, real, window
from fastasr.ops._op import Arguments, Op, op

States = Annotated[Tensor, "R N | R N 1, N >= 1, N <= 64", "wide"]
Mask = Annotated[Tensor, "B L", bool]
Truncation = Annotated[int, ">= 1"]
Direction = Literal["forward", "reverse", "bidirectional"]
Activation = _activation.Activation
Layout = Literal["LBD", "BLD", "BDL"]
Y = Annotated[Tensor, "X Y Z", "x"]


# --------------------------------------------------------------------------- formula
def damped(
    damping: Tensor, decay: Tensor, expansion: Tensor, projection: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (q, b, c) of ema_scan, each (D, N)."""
    p = torch.sigmoid(damping)
    return 1 - p * torch.sigmoid(decay), p * expansion, projection * projection.shape[-1] ** -0.5


def rotating(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor) -> tuple[Polar, Tensor, Tensor]:
    """Returns (q, b, c) of complex_ema_scan, each (D, N), b real."""
    states = alpha.shape[-1]
    p = torch.sigmoid(alpha)
    wavelets = torch.arange(1, states + 1, device=theta.device, dtype=theta.dtype)
    angle = wavelets * (torch.sigmoid(theta) * (2 * math.pi / states)).unsqueeze(-1)
    return Polar(1 - p * torch.sigmoid(delta), angle), p, _complex(gamma) * states**-0.5


def _complex(parts: Tensor) -> Tensor:
    return torch.complex(parts[..., 0], parts[..., 1])


def _average(
    coefficients: Callable, parameters: tuple[Tensor, ...], x: Tensor, residual: Tensor | None,
    state: Tensor | None, return_state: bool, padding_mask: Tensor | None,
    truncation: int | None, direction: str, activation: str, layout: str,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y, or (y, last state); ``coefficients`` makes q, b and c from the parameters."""
    dtype = torch.promote_types(widest(x, (*parameters, residual, state)), torch.float32)
    q, b, c = coefficients(*(p.to(dtype) for p in parameters))
    start = None if state is None else state.to(dtype)
    if start is not None and c.is_complex():
        start = _complex(start)
    u = x.permute([layout.index(d) for d in "BDL"]).to(dtype)
    masked = u if padding_mask is None else u.masked_fill(padding_mask.unsqueeze(1), 0.0)
    channels, length = u.shape[1:]

    def scan(v: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        qs, bs, cs = q[rows], b[rows], c[rows]
        if truncation is not None and truncation < length:
            h = window(bs.unsqueeze(-1) * v.unsqueeze(2), qs, truncation)
            return real((cs.unsqueeze(-1) * h).sum(2)), None
        return convolution(v, qs, bs, cs, start, return_state)

    if direction == "reverse":
        z, last = scan(masked.flip(-1), slice(None))
        z = z.flip(-1)
    else:
        z, last = scan(masked, slice(0, channels))
        if direction == "bidirectional":
            z = z + scan(masked.flip(-1), slice(channels, None))[0].flip(-1)
    if residual is not None:
        z = z + residual.to(dtype).flatten().unsqueeze(-1) * u
    y = _activation.FUNCTIONS[activation](z).to(x.dtype)
    y = y.permute(["BDL".index(d) for d in layout]).contiguous()
    if last is None or not return_state:
        return y
    return y, torch.stack((last.real, last.imag), -1) if last.is_complex() else last


# --------------------------------------------------------------------------- the ops
def _sizes(a: Arguments) -> tuple[int, ...]:
    batch, channels, length = (a.x.shape[a.layout.index(d)] for d in "BDL")
    return batch, channels, length, channels * (2 if a.direction == "bidirectional" else 1)


def _check(op: Op, a: Arguments) -> None:
    if a.state is None and not a.return_state:
        return
    if a.direction == "bidirectional":
        op.fail("direction", "'forward' or 'reverse' with state or return_state", "'bidirectional'")
    if a.truncation is not None:
        op.fail("truncation", "None with state or return_state", a.truncation)


def _scan(parameters: str, strides: dict) -> Op:
    """Declares an average with these parameters; the residual's is the last."""
    return op(
        "cpu cuda",
        strides={"x": "any", "grad_y": "any", **strides},
        sizes={"B D L R": _sizes},
        forward=f"x {parameters} state padding_mask truncation direction activation layout return_state",
        check=_check,
    )


@_scan(
    "damping decay expansion projection residual",
    dict.fromkeys(("damping", "decay", "expansion", "projection"), "matrix"),
)
def ema_scan(
    x: Annotated[Tensor, "X Y Z"],
    damping: States,
    decay: States,
    expansion: States,
    projection: States,
    residual: Annotated[Tensor, "D", "wide"] | None = None,
    *,
    state: Annotated[Tensor, "B D N", "wide"] | None = None,
    return_state: bool = False,
    padding_mask: Mask | None = None,
    truncation: Truncation | None = None,
    direction: Direction = "forward",
    activation: Activation = "identity",
    layout: Layout = "LBD",
) -> (
    Y
    | tuple[
        Y,
        Annotated[
            Tensor, "last: B D N", "wide x + damping + decay + expansion + projection + residual + state"
        ],
    ]
):
    """Mega's multi-head damped moving average as a linear-time scan, with states.

    Computes y = act(Σ_n c_n h_n + residual · x), h_n(t) = q_n h_n(t−1) + b_n x_t.

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
        truncation: the number of taps of the convolution to keep, the first ones; None: all. Not together with a state.
        direction: "forward", "reverse" or "bidirectional".
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
    Returns:
        y of x's shape and dtype, contiguous, computed in float32 or better and rounded once; with ``return_state``
        (y, state (B, D, N)).
    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not match, or options exclude each other.
    """
    parameters = (p.flatten(1) for p in (damping, decay, expansion, projection))
    return _average(
        damped, (*parameters,), x, residual, state, return_state, padding_mask,
        truncation, direction, activation, layout,
    )  # fmt: skip


@_scan(
    "alpha delta theta gamma omega",
    {"alpha": "matrix", "delta": "matrix", "theta": "vector", "omega": "vector"},
)
def complex_ema_scan(
    x: Annotated[Tensor, "X Y Z"],
    alpha: States,
    delta: States,
    theta: Annotated[Tensor, "R | R 1 | R 1 1", "wide"],
    gamma: Annotated[Tensor, "R N 2", "wide"],
    omega: Annotated[Tensor, "D | D 1", "wide"] | None = None,
    *,
    state: Annotated[Tensor, "B D N 2", "wide"] | None = None,
    return_state: bool = False,
    padding_mask: Mask | None = None,
    truncation: Truncation | None = None,
    direction: Direction = "forward",
    activation: Activation = "identity",
    layout: Layout = "LBD",
) -> (
    Y | tuple[Y, Annotated[Tensor, "last: B D N 2", "wide x + alpha + delta + theta + gamma + omega + state"]]
):
    """Megalodon's complex moving average as a linear-time scan, with states.

    Computes y = act(Re Σ_n c_n h_n + omega · x), h_n(t) = q_n h_n(t−1) + p_n x_t.

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
        padding_mask, truncation, direction, activation: as for :func:`fastasr.ops.ema_scan`.
    Returns:
        y of x's shape and dtype, contiguous, computed in float32 or better and rounded once; with ``return_state``
        (y, state).
    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not match, or options exclude each other.
    """
    return _average(
        rotating, (alpha.flatten(1), delta.flatten(1), theta.flatten(), gamma), x, omega, state, return_state,
        padding_mask, truncation, direction, activation, layout,
    )  # fmt: skip
