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
    qbc = coefficients(*(p.to(dtype) for p in (damping, decay, expansion, projection)))
    start = None if state is None else state.to(dtype)
    options = (truncation, direction, activation, layout, need_state)
    return scan_of_coefficients(x, *qbc, residual, start, padding_mask, *options)


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
    dx, dq, db, dc, domega, dstate = gradients_of_coefficients(
        grad.to(x.dtype),
        grad_state,
        x,
        *coefficients(damping, decay, expansion, projection),
        omega,
        h0,
        padding_mask,
        truncation,
        direction,
        activation,
        layout,
    )
    p, a = torch.sigmoid(damping), torch.sigmoid(decay)
    ddamping, ddecay = (db * expansion - dq * a) * p * (1 - p), -dq * p * a * (1 - a)
    grads = (dx, ddamping, ddecay, db * p, dc * projection.shape[-1] ** -0.5, domega, dstate)
    return tuple(
        grad.new_empty(0) if t is None else d.to(t.dtype) for d, t in zip(grads, tensors, strict=True)
    )


_SCAN = Scan("ema_scan", "damping decay expansion projection residual", _formula, definition_backward)


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
        and _SCAN.family.native is not None
        and type(x) in PLAIN
        and x.is_cpu
        and (truncation is None or (type(truncation) is int and truncation > 0))
        and type(return_state) is bool
        and plain_constants((damping, decay, expansion, projection, residual, state, padding_mask))
        and not (x.requires_grad and is_grad_enabled())
    ):
        try:
            y, final = _SCAN.family.native.forward(
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
    layout = option(op, "layout", layout, LAYOUTS)
    direction = option(op, "direction", direction, DIRECTIONS)
    activation = option(op, "activation", activation, ACTIVATIONS)
    _check.shape(op, "x", x, "of three dimensions", x.dim() == 3)
    batch, channels, length = (x.shape[d] for d in TO_BDL[layout])
    rows = 2 * channels if direction == DIRECTIONS["bidirectional"] else channels
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
    if state is not None:
        _check.floating_tensor(op, "state", state)
        shape = (batch, channels, states)
        _check.shape(op, "state", state, f"{shape}", state.shape == shape)
        _check.same_device(op, "state", state, x, "x")
    check_return_state(op, return_state, state, direction)
    if padding_mask is not None:
        check_mask(op, padding_mask, (batch, length), x)
    truncation = check_truncation(op, truncation, state is not None or return_state)
    y, final = _SCAN(
        x, *parameters, residual, state, padding_mask, truncation, direction, activation, layout, return_state
    )
    return (y, final) if return_state else y


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
