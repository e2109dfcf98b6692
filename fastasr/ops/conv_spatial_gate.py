# SPDX-License-Identifier: Apache-2.0
r"""The convolutional spatial gating unit of cgMLP (Sakuma et al., 2022), as Branchformer and E-Branchformer use it.

For x = (r, g) of shape (B, T, 2C), per frame n = (g − mean g) / √(var g + eps) and u = n ⊙ norm_weight + norm_bias, 0
at padding and outside the sequence; per channel, with K taps and P = K // 2:

    z[t] = bias + Σ_k weight[k] u[t + k − P]        y = r ⊙ act(z)

Upstream: ``ConvolutionalSpatialGatingUnit`` in ``espnet2.asr.layers.cgmlp`` (between its split and its dropout, without
``linear_after_conv``), ``FeedForwardConvGated`` in ``returnn.frontend.encoder.e_branchformer``.

With q = dy ⊙ r ⊙ act'(z): dr = dy ⊙ act(z), du[t] = Σ_k weight[k] q[t − k + P] (0 at padding), dweight[k] = Σ q[t]
u[t + k − P], dbias = Σ q; with d = du ⊙ norm_weight: dg = (d − mean d − n mean(d n)) / √(var g + eps), dnorm_weight =
Σ du ⊙ n, dnorm_bias = Σ du. Only x is saved: backward computes the rows' statistics, u and z again.

Memory traffic per element of g: read r and g, write y forward; read r, g and dy, write dr and dg backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _activation, _check
from fastasr.ops._dispatch import PLAIN, KernelFamily, direct, native_kernels, served, triton_kernels
from fastasr.ops._register import refuse_double_backward, register

FAMILY = KernelFamily(
    "conv_spatial_gate",
    ("conv_spatial_gate",),
    (native_kernels("conv_spatial_gate"), triton_kernels("conv_spatial_gate")),
)


# --------------------------------------------------------------------------- definition
def definition(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    padding_mask: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """The formula in eager PyTorch."""
    r, g = x.chunk(2, dim=-1)
    channels, taps = weight.shape[0], weight.shape[-1]
    u = F.layer_norm(g, (channels,), norm_weight.to(g.dtype), norm_bias.to(g.dtype), eps)
    if padding_mask is not None:
        u = u.masked_fill(padding_mask.unsqueeze(-1), 0.0)
    frames = u.shape[1]
    u = F.pad(
        u.transpose(1, 2), (taps // 2, taps // 2 + (frames == 0))
    )  # a convolution to no frames is an error
    bias = bias if bias is None else bias.to(u.dtype)
    z = F.conv1d(u, weight.reshape(channels, 1, taps).to(u.dtype), bias, groups=channels)
    return r * _activation.function(activation)(z[..., :frames].transpose(1, 2))


def definition_backward(grad, x, norm_weight, norm_bias, weight, bias, mask, eps: float, activation: int):
    """(dx, dnorm_weight, dnorm_bias, dweight, dbias), computed in float32 or better; dbias whether or not there is a
    bias."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not grad.numel():
        return torch.zeros_like(x), *(
            torch.zeros_like(t) for t in (norm_weight, norm_bias, weight, norm_bias)
        )
    r, g = x.to(wide).chunk(2, dim=-1)
    grad = grad.to(wide)
    channels, taps = weight.shape[0], weight.shape[-1]
    centred = g - g.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    n = centred * scale
    u = n * norm_weight + norm_bias
    if mask is not None:
        u = u.masked_fill(mask.unsqueeze(-1), 0.0)
    kernel = weight.reshape(channels, 1, taps)
    u = F.pad(u.transpose(1, 2), (taps // 2, taps // 2))
    z = F.conv1d(u, kernel, bias, groups=channels).transpose(1, 2)
    name = _activation.NAMES[activation]
    dr = grad * _activation.function(name)(z)
    q = (grad * r * _activation.derivative(name, z)).transpose(1, 2)
    du = torch.nn.grad.conv1d_input(u.shape, kernel, q, groups=channels)
    dweight = torch.nn.grad.conv1d_weight(u, kernel.shape, q, groups=channels).reshape(weight.shape)
    du = du[..., taps // 2 : du.shape[2] - taps // 2].transpose(1, 2)
    if mask is not None:
        du = du.masked_fill(mask.unsqueeze(-1), 0.0)
    d = du * norm_weight
    dg = (d - d.mean(-1, keepdim=True) - n * (d * n).mean(-1, keepdim=True)) * scale
    dx = torch.cat([dr, dg], dim=-1).to(x.dtype)
    return dx, (du * n).sum((0, 1)), du.sum((0, 1)), dweight, q.sum((0, 2))


# --------------------------------------------------------------------------- kernels
# From here on the parameters have the dtype that is computed in, and the functions take (x, norm_weight, norm_bias,
# weight, bias, padding_mask, eps, activation), as the kernels do.
def forward(x, norm_weight, norm_bias, weight, bias, mask, eps: float, activation: int) -> Tensor:
    """y without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x)
    if kernels is not None:
        return kernels.forward(*_operands(x, norm_weight, norm_bias, weight, bias, mask), eps, activation)
    y = definition(
        x,
        norm_weight,
        norm_bias,
        weight,
        bias,
        eps,
        padding_mask=mask,
        activation=_activation.NAMES[activation],
    )
    return y.contiguous()


def backward(grad, x, norm_weight, norm_bias, weight, bias, mask, eps: float, activation: int):
    """(dx, dnorm_weight, dnorm_bias, dweight, dbias) without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x)
    if kernels is None:
        return definition_backward(grad, x, norm_weight, norm_bias, weight, bias, mask, eps, activation)
    operands = _operands(x, norm_weight, norm_bias, weight, bias, mask)
    return kernels.backward(grad.contiguous(), *operands, eps, activation)


def _operands(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """x with its channels contiguous, all else contiguous."""
    x = x if x.stride(2) == 1 else x.contiguous()
    return x, *(t if t is None else t.contiguous() for t in others)


class _ConvSpatialGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:6])
        ctx.rest = arguments[6:]
        return forward(*arguments)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward("conv_spatial_gate")
        return _gradients(backward, ctx, grad)


def _gradients(function, ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments by ``function``; none of a bias that is absent."""
    tensors = ctx.saved_tensors  # once: a checkpoint may be asked for them one time only
    *found, dbias = function(grad, *tensors, *ctx.rest)
    return *found, None if tensors[4] is None else dbias, None, None, None


# --------------------------------------------------------------------------- registration
_ARGUMENTS = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, Tensor? padding_mask, float eps, "
    "int activation"
)


def _fake_forward(x, *_) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[2] // 2)


def _fake_backward(grad, x, norm_weight, norm_bias, weight, *_):
    new = (t.new_empty(t.shape) for t in (x, norm_weight, norm_bias, weight, norm_bias))
    return tuple(new)


_BACKWARD_OP = register(
    f"conv_spatial_gate_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]


_OP = register(
    f"conv_spatial_gate({_ARGUMENTS}) -> Tensor",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=lambda ctx, grad: _gradients(_BACKWARD_OP, ctx, grad),
)


# --------------------------------------------------------------------------- public function
def conv_spatial_gate(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    padding_mask: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """r · act(depthwise convolution over time of LayerNorm(g)) for x = (r, g).

    Args:
        x: (B, T, 2C), the factor and the gate; float32, bfloat16, float16 or float64. Its channels are read where they
            lie if they are contiguous, whatever the other strides.
        norm_weight, norm_bias: (C,), of the LayerNorm.
        weight: (C, 1, K) or (C, K), K odd: the taps, padded with zeros to the same length.
        bias: (C,), of the convolution.
        eps: added to the variance.
        padding_mask: (B, T), bool; True: the frame is padding, and its normalised gate counts as 0.
        activation: of the gate: "identity", "silu", "relu", "tanh" or "gelu".
    Returns:
        y (B, T, C), contiguous, in x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    tensors = (x, norm_weight, norm_bias, weight, bias, padding_mask)
    if activation in _activation.NAMES and _plain(eps, tensors):
        try:
            return FAMILY.native.forward(*tensors, eps, _activation.NAMES.index(activation))
        except RuntimeError:
            pass  # the checked path tells why, or does what the kernels do not
    _check_call(*tensors)
    eps, number = (
        _check.number("conv_spatial_gate", "eps", eps),
        _activation.number("conv_spatial_gate", activation),
    )
    parameters = [t for t in tensors[1:5] if t is not None]
    if (
        FAMILY.kernels(x, *parameters) is None
        if direct(x, *parameters)
        else not served(FAMILY.name, x, *parameters)
    ):
        return definition(*tensors[:5], eps, padding_mask=padding_mask, activation=activation)
    dtype = x.dtype
    work = torch.float64 if any(t.dtype is torch.float64 for t in parameters) else dtype
    wide = torch.promote_types(work, torch.float32)
    arguments = (
        x.to(work),
        *(t if t is None else t.to(wide) for t in tensors[1:5]),
        padding_mask,
        eps,
        number,
    )
    if not direct(*tensors):
        return _OP(*arguments).to(dtype)
    if is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        return _ConvSpatialGate.apply(*arguments).to(dtype)
    return forward(*arguments).to(dtype)


def _plain(eps: object, tensors: tuple) -> bool:
    """Whether the native kernels may be tried on the arguments as they are, with no gradient wanted: they check the
    rest themselves."""
    if is_compiling() or FAMILY.native is None or type(eps) is not float:
        return False
    wanted = is_grad_enabled()
    return all(
        (t is None and i > 3) or (type(t) in PLAIN and t.is_cpu and not (wanted and t.requires_grad))
        for i, t in enumerate(tensors)
    )


def _check_call(x, norm_weight, norm_bias, weight, bias, mask) -> None:
    op = "conv_spatial_gate"
    _check.floating_tensor(op, "x", x)
    ok = x.dim() == 3 and x.shape[2] >= 2 and x.shape[2] % 2 == 0
    _check.shape(op, "x", x, "(B, T, 2 C), C at least 1", ok)
    channels = x.shape[2] // 2
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("bias", bias)):
        if t is None and name == "bias":
            continue
        _check.floating_tensor(op, name, t)
        _check.shape(op, name, t, f"({channels},)", tuple(t.shape) == (channels,))
        _check.same_device(op, name, t, x, "x")
    _check.floating_tensor(op, "weight", weight)
    shape = tuple(weight.shape)
    ok = len(shape) in (2, 3) and shape[:-1] in ((channels,), (channels, 1)) and shape[-1] % 2 == 1
    _check.shape(op, "weight", weight, f"({channels}, 1, K) or ({channels}, K), K odd", ok)
    _check.same_device(op, "weight", weight, x, "x")
    if mask is not None:
        _check.bool_tensor(op, "padding_mask", mask)
        if mask.layout is not torch.strided:
            raise TypeError(
                f"fastasr.{op}: padding_mask: expected a strided tensor, got layout {mask.layout}"
            )
        _check.shape(op, "padding_mask", mask, f"{tuple(x.shape[:2])}", mask.shape == x.shape[:2])
        _check.same_device(op, "padding_mask", mask, x, "x")
