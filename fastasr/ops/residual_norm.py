# SPDX-License-Identifier: Apache-2.0
r"""The ends of MEGA's blocks (Ma et al., 2022, section 3.3): a residual, gated or not, and LayerNorm.

gated_residual_norm: y = LN(t), t = x + σ(update) ⊙ (a − x), a = act(candidate + hidden) ⊙ M;
residual_norm: y = LN(t), t = x + update;
with LN(t) = n ⊙ weight + bias, n = (t − mean t) / σ_t, σ_t = √(var t + eps), over the channels. M, optional, is the
mask of dropout. With d = grad ⊙ weight: dt = (d − mean d − n mean(d n)) / σ_t, dweight = Σ_rows grad ⊙ n, dbias =
Σ_rows grad; dx = dt (1 − σ), dupdate = dt (a − x) σ (1 − σ), dcandidate = dhidden = dt σ M act'; without the gate dx =
dupdate = dt.

Upstream: the last lines of ``MEGA.forward`` in ``espnet2.asr_transducer.decoder.blocks.mega`` and of
``NormalizedPositionwiseFeedForward.forward`` in ``espnet2.asr_transducer.decoder.modules.mega.feed_forward``.

Memory traffic per element: read the two or four inputs, write y forward; read them and grad, write three gradients (one
without the gate) backward. Nothing but the inputs is kept for the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _activation, _check, _layout
from fastasr.ops._dispatch import PLAIN, KernelFamily, direct, native_kernels, served, triton_kernels
from fastasr.ops._register import refuse_double_backward, register

FAMILY = KernelFamily(
    "residual_norm",
    ("gated_residual_norm", "residual_norm"),
    (native_kernels("residual_norm"), triton_kernels("residual_norm")),
)


# --------------------------------------------------------------------------- definition
def definition(
    x: Tensor,
    update: Tensor,
    candidate: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """gated_residual_norm in eager PyTorch."""
    proposal = _activation.function(activation)(candidate + hidden)
    if dropout_mask is not None:
        proposal = proposal * dropout_mask
    return _layer_norm(x + torch.sigmoid(update) * (proposal - x), weight, bias, eps)


def definition_residual(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """residual_norm in eager PyTorch."""
    return _layer_norm(x + update, weight, bias, eps)


def _layer_norm(t: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(t, t.shape[-1:], weight.to(t.dtype), bias.to(t.dtype), eps)


def definition_backward(
    grad: Tensor,
    x: Tensor,
    update: Tensor,
    candidate: Tensor | None,
    hidden: Tensor | None,
    mask: Tensor | None,
    weight: Tensor,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dupdate, dsum, dweight, dbias), computed in float32 or better; without a gate dx is that of both."""
    wide = torch.promote_types(x.dtype, torch.float32)
    g, v, u, w = (t.to(wide) for t in (grad, x, update, weight))
    if candidate is None:
        t = v + u
    else:
        total = candidate.to(wide) + hidden.to(wide)
        name = _activation.NAMES[activation]
        proposal, slope = _activation.function(name)(total), _activation.derivative(name, total)
        if mask is not None:
            proposal, slope = proposal * mask, slope * mask
        s = torch.sigmoid(u)
        t = v + s * (proposal - v)
    centred = t - t.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    n, d = centred * scale, g * w
    dt = (d - d.mean(-1, keepdim=True) - n * (d * n).mean(-1, keepdim=True)) * scale
    rows = tuple(range(x.dim() - 1))
    dweight, dbias = ((g * n).sum(rows), g.sum(rows)) if rows else (g * n, g)
    if candidate is None:
        nothing = x.new_empty(0)
        return dt.to(x.dtype), nothing, nothing.clone(), dweight, dbias
    r = torch.sigmoid(-u)
    dx, dupdate, dsum = dt * r, dt * (proposal - v) * s * r, dt * s * slope
    return dx.to(x.dtype), dupdate.to(x.dtype), dsum.to(x.dtype), dweight, dbias


# --------------------------------------------------------------------------- kernels
# From here on the inputs have one dtype, mask, weight and bias the dtype that is computed in, and the functions take
# (x, update, candidate, hidden, mask, weight, bias, eps, activation), as the kernels do.
def forward(x, update, candidate, hidden, mask, weight, bias, eps: float, activation: int) -> Tensor:
    """y without autograd, by the best kernel for x."""
    return _forward(x, update, candidate, hidden, mask, weight, bias, eps, activation, False)[0]


def _forward(
    x, update, candidate, hidden, mask, weight, bias, eps: float, activation: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """y and, where they are kept for the backward pass, each row's mean in two parts and 1 / deviation."""
    kernels = FAMILY.kernels(x)
    if kernels is not None:
        tensors = *_rows(x, update, candidate, hidden), *_dense(mask, weight, bias)
        y, statistics = kernels.forward(*tensors, eps, activation, keep)
        return y, statistics if keep else None
    if candidate is None:
        return definition_residual(x, update, weight, bias, eps), None
    name = _activation.NAMES[activation]
    y = definition(
        x, update, candidate, hidden, weight, bias, eps, activation=name, dropout_mask=_as(mask, x)
    )
    return y.contiguous(), None


def backward(
    grad, x, update, candidate, hidden, mask, weight, bias, eps: float, activation: int, statistics=None
):
    """(dx, dupdate, dsum, dweight, dbias) without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x)
    if kernels is None:
        return definition_backward(grad, x, update, candidate, hidden, mask, weight, eps, activation)
    inputs = _rows(x, update, candidate, hidden)
    operands = grad.contiguous(), *inputs, *_dense(mask, weight, bias)
    return kernels.backward(*operands, statistics, eps, activation)


def _rows(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else _layout.rows(t) for t in tensors)


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


def _as(t: Tensor | None, x: Tensor) -> Tensor | None:
    return t if t is None else t.to(x.dtype)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, update, candidate, hidden, mask, weight, bias, eps: float, activation: int) -> Tensor:
        arguments = x, update, candidate, hidden, mask, weight, bias
        y, statistics = _forward(*arguments, eps, activation, True)
        ctx.save_for_backward(*arguments, statistics)
        ctx.rest = eps, activation
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        *inputs, statistics = ctx.saved_tensors
        gated = inputs[2] is not None
        refuse_double_backward("gated_residual_norm" if gated else "residual_norm")
        return _gradients(backward(grad, *inputs, *ctx.rest, statistics), gated)


def _gradients(found: tuple[Tensor, ...], gated: bool) -> tuple[Tensor | None, ...]:
    """Gradients of (x, update, candidate, hidden, mask, weight, bias, eps, activation)."""
    dx, dupdate, dsum, dweight, dbias = found
    if gated:
        return dx, dupdate, dsum, dsum, None, dweight, dbias, None, None
    return dx, dx, None, None, None, dweight, dbias, None, None


# --------------------------------------------------------------------------- registration
def _fake_forward(x, update, candidate, hidden, mask, weight, bias, eps, activation) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_backward(grad, x, update, candidate, hidden, mask, weight, bias, eps, activation):
    def like_x(there: bool) -> Tensor:
        return torch.empty(x.shape if there else (0,), dtype=x.dtype, device=x.device)

    gated = candidate is not None
    return like_x(True), like_x(gated), like_x(gated), torch.empty_like(weight), torch.empty_like(bias)


_BACKWARD_OP = register(
    "residual_norm_backward(Tensor grad, Tensor x, Tensor update, Tensor? candidate, Tensor? hidden, Tensor? mask, "
    "Tensor weight, Tensor bias, float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_gated(ctx, inputs, output) -> None:
    *tensors, eps, activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.rest = eps, activation


def _setup_plain(ctx, inputs, output) -> None:
    x, update, weight, bias, eps = inputs
    ctx.save_for_backward(x, update, None, None, None, weight, bias)
    ctx.rest = eps, 0


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    gated = ctx.saved_tensors[2] is not None
    found = _gradients(_BACKWARD_OP(grad, *ctx.saved_tensors, *ctx.rest), gated)
    return found if gated else (found[0], found[1], found[5], found[6], None)


_GATED_OP = register(
    "gated_residual_norm(Tensor x, Tensor update, Tensor candidate, Tensor hidden, Tensor? mask, Tensor weight, "
    "Tensor bias, float eps, int activation) -> Tensor",
    forward,
    _fake_forward,
    setup_context=_setup_gated,
    backward=_backward,
)

_PLAIN_OP = register(
    "residual_norm(Tensor x, Tensor update, Tensor weight, Tensor bias, float eps) -> Tensor",
    lambda x, update, weight, bias, eps: forward(x, update, None, None, None, weight, bias, eps, 0),
    lambda x, update, weight, bias, eps: _fake_forward(x, update, None, None, None, weight, bias, eps, 0),
    setup_context=_setup_plain,
    backward=_backward,
)


# --------------------------------------------------------------------------- public functions
def gated_residual_norm(
    x: Tensor,
    update: Tensor,
    candidate: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x + σ(update) · (act(candidate + hidden) · dropout_mask − x)) over the last dimension.

    Args:
        x, update, candidate, hidden: (..., D), one shape; slices of a wider projection need no copy. float32, bfloat16,
            float16 or float64.
        weight, bias: (D,).
        eps: added to the variance.
        activation: "identity", "silu", "relu", "tanh" or "gelu".
        dropout_mask: x's shape, bool or floating, multiplied on the activated sum; it gets no gradient.
    Returns:
        A tensor of x's shape in the promoted dtype of the four inputs, computed in float32 or better, rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    tensors = (x, update, candidate, hidden, dropout_mask, weight, bias)
    constants = (
        candidate is not None and hidden is not None and not getattr(dropout_mask, "requires_grad", False)
    )
    if constants and activation in _activation.NAMES and _plain(eps, tensors):
        try:
            return FAMILY.native.forward(*tensors, eps, _activation.NAMES.index(activation), False)[0]
        except RuntimeError:
            pass  # the checked path tells why, or does what the kernels do not
    op = "gated_residual_norm"
    inputs = (x, update, candidate, hidden)
    for name, t in zip(("x", "update", "candidate", "hidden"), inputs, strict=True):
        _check_input(op, name, t, x)
    _check_parameters(op, x, weight, bias)
    eps, number = _check.number(op, "eps", eps), _activation.number(op, activation)
    if dropout_mask is not None:
        _check.constant_mask(op, "dropout_mask", dropout_mask, x, "x")
        _check.shape(
            op, "dropout_mask", dropout_mask, f"{tuple(x.shape)} (that of x)", dropout_mask.shape == x.shape
        )
    if (
        FAMILY.kernels(*inputs, weight, bias) is None
        if direct(*inputs, weight, bias)
        else not served(FAMILY.name, *inputs, weight, bias)
    ):
        return definition(
            x, update, candidate, hidden, weight, bias, eps, activation=activation, dropout_mask=dropout_mask
        )
    return _dispatch(_GATED_OP, inputs, dropout_mask, weight, bias, eps, number)


def residual_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm(x + update) over the last dimension.

    Args:
        x, update: (..., D), one shape. float32, bfloat16, float16 or float64.
        weight, bias: (D,).
        eps: added to the variance.
    Returns:
        A tensor of x's shape in the promoted dtype of x and update, computed in float32 or better, rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    tensors = (x, update, None, None, None, weight, bias)
    if _plain(eps, tensors):
        try:
            return FAMILY.native.forward(*tensors, eps, 0, False)[0]
        except RuntimeError:
            pass  # the checked path tells why, or does what the kernels do not
    op = "residual_norm"
    for name, t in (("x", x), ("update", update)):
        _check_input(op, name, t, x)
    _check_parameters(op, x, weight, bias)
    eps = _check.number(op, "eps", eps)
    if (
        FAMILY.kernels(x, update, weight, bias) is None
        if direct(x, update, weight, bias)
        else not served(FAMILY.name, x, update, weight, bias)
    ):
        return definition_residual(x, update, weight, bias, eps)
    return _dispatch(_PLAIN_OP, (x, update), None, weight, bias, eps, 0)


def _plain(eps: object, tensors: tuple) -> bool:
    """Whether the native kernels may be tried on the arguments as they are, with no gradient wanted: they check the
    rest themselves."""
    if is_compiling() or FAMILY.native is None or type(eps) is not float:
        return False
    wanted = is_grad_enabled()
    return all(
        t is None or (type(t) in PLAIN and t.is_cpu and not (wanted and t.requires_grad)) for t in tensors
    )


def _dispatch(
    op, inputs: tuple[Tensor, ...], mask: Tensor | None, weight: Tensor, bias: Tensor, eps: float, number: int
) -> Tensor:
    dtype = inputs[0].dtype
    for t in inputs[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    work = torch.float64 if torch.float64 in (weight.dtype, bias.dtype) else dtype
    wide = torch.promote_types(work, torch.float32)
    inputs = tuple(t.to(work) for t in inputs)
    mask, weight, bias = None if mask is None else mask.to(wide), weight.to(wide), bias.to(wide)
    if not direct(*inputs, mask, weight, bias):
        rest = (weight, bias, eps) if op is _PLAIN_OP else (mask, weight, bias, eps, number)
        return op(*inputs, *rest).to(dtype)
    arguments = (*(inputs if len(inputs) == 4 else (*inputs, None, None)), mask, weight, bias, eps, number)
    if is_grad_enabled() and any(t.requires_grad for t in (*inputs, weight, bias)):
        return _ResidualNorm.apply(*arguments).to(dtype)
    return forward(*arguments).to(dtype)


def _check_input(op: str, name: str, t: object, x: Tensor) -> None:
    _check.floating_tensor(op, name, t)
    if t is x:
        _check.shape(
            op,
            name,
            t,
            "with at least one dimension and at least one channel",
            t.dim() > 0 and t.shape[-1] > 0,
        )
    else:
        _check.shape(op, name, t, f"{tuple(x.shape)} (that of x)", t.shape == x.shape)
        _check.same_device(op, name, t, x, "x")


def _check_parameters(op: str, x: Tensor, weight: object, bias: object) -> None:
    channels = x.shape[-1]
    for name, t in (("weight", weight), ("bias", bias)):
        _check.floating_tensor(op, name, t)
        _check.shape(op, name, t, f"({channels},)", t.dim() == 1 and t.shape[0] == channels)
        _check.same_device(op, name, t, x, "x")
