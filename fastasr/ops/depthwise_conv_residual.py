# SPDX-License-Identifier: Apache-2.0
r"""A depthwise convolution over time added to its input: the merge of E-Branchformer (Kim et al., 2022).

For x (B, T, C), K taps, K odd, P = K // 2, and x = 0 outside the sequence:

    y[t] = x[t] + bias + Σ_k weight[k] x[t + k − P]

Upstream: ``EBranchformerEncoderLayer.forward`` of ``espnet2.asr.encoder.e_branchformer_encoder`` and ``Merge`` of
``returnn.frontend.encoder.e_branchformer``, between the concatenation and the projection.

With gradient g: dx[t] = g[t] + Σ_k weight[k] g[t − k + P], dweight[k] = Σ g[t] x[t + k − P], dbias = Σ g.

Memory traffic per element: read x, write y forward; read g and x, write dx backward. 2 K FLOPs each for y, dx, dweight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check, _layout
from fastasr.ops._dispatch import PLAIN, KernelFamily, direct, native_kernels, served, triton_kernels
from fastasr.ops._register import refuse_double_backward, register

OP = "depthwise_conv_residual"
FAMILY = KernelFamily(OP, (OP,), (native_kernels(OP), triton_kernels(OP)))


# --------------------------------------------------------------------------- definition
def definition(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in eager PyTorch."""
    channels, taps, frames = weight.shape[0], weight.shape[-1], x.shape[1]
    padded = F.pad(  # a convolution to no frames is an error
        x.transpose(1, 2), (taps // 2, taps // 2 + (frames == 0))
    )
    bias = bias if bias is None else bias.to(x.dtype)
    z = F.conv1d(padded, weight.reshape(channels, 1, taps).to(x.dtype), bias, groups=channels)
    return x + z[..., :frames].transpose(1, 2)


def definition_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), computed in float32 or better; dbias whether or not there is a bias."""
    channels, taps = weight.shape[0], weight.shape[-1]
    if not grad.numel():
        return torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(channels)
    wide = torch.promote_types(x.dtype, torch.float32)
    g, rows = grad.to(wide).transpose(1, 2), x.to(wide).transpose(1, 2)
    kernel, padding = weight.reshape(channels, 1, taps), taps // 2
    dx = g + torch.nn.grad.conv1d_input(rows.shape, kernel, g, padding=padding, groups=channels)
    dweight = torch.nn.grad.conv1d_weight(rows, kernel.shape, g, padding=padding, groups=channels)
    return dx.transpose(1, 2).to(x.dtype).contiguous(), dweight.reshape(weight.shape), g.sum((0, 2))


# --------------------------------------------------------------------------- kernels
# From here on weight and bias have the dtype that is computed in.
def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x)
    if kernels is None:
        return definition(x, weight, bias).contiguous()
    bias = bias if bias is None else bias.contiguous()
    return kernels.forward(_layout.dense_channels(x), weight.contiguous(), bias)


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) without autograd, by the best kernel for x."""
    kernels = FAMILY.kernels(x)
    if kernels is None:
        return definition_backward(grad, x, weight)
    return kernels.backward(grad.contiguous(), _layout.dense_channels(x), weight.contiguous())


class _DepthwiseConvResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return forward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward(OP)
        return _gradients(backward, ctx, grad)


def _gradients(function, ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments by ``function``; none of a bias that is absent."""
    dx, dweight, dbias = function(grad, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None


# --------------------------------------------------------------------------- registration
def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


_BACKWARD_OP = register(
    "depthwise_conv_residual_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


_OP = register(
    "depthwise_conv_residual(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=lambda ctx, grad: _gradients(_BACKWARD_OP, ctx, grad),
)


# --------------------------------------------------------------------------- public function
def depthwise_conv_residual(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x plus its depthwise convolution over time, of the same length.

    Args:
        x: (B, T, C); float32, bfloat16, float16 or float64. Contiguous channels are read where they lie, whatever the
            other strides.
        weight: (C, 1, K), that of a ``torch.nn.Conv1d`` with C groups, or (C, K), K odd: the taps, padded with zeros to
            the same length.
        bias: (C,) or None.
    Returns:
        y (B, T, C), contiguous, in x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match.
    """
    parameters = (weight,) if bias is None else (weight, bias)
    if (
        not is_compiling()
        and FAMILY.native is not None
        and type(x) in PLAIN
        and x.is_cpu
        and all(type(t) in PLAIN and t.is_cpu for t in parameters)
        and not (is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)))
    ):
        try:
            return FAMILY.native.forward(x, weight, bias)
        except RuntimeError:
            pass  # the checked path tells why, or does what the kernels do not
    _check_call(x, weight, bias)
    if (
        FAMILY.kernels(x, *parameters) is None
        if direct(x, *parameters)
        else not served(FAMILY.name, x, *parameters)
    ):
        return definition(x, weight, bias)
    dtype = x.dtype
    work = torch.float64 if any(t.dtype is torch.float64 for t in parameters) else dtype
    wide = torch.promote_types(work, torch.float32)
    arguments = x.to(work), weight.to(wide), bias if bias is None else bias.to(wide)
    if not direct(x, *parameters):
        return _OP(*arguments).to(dtype)
    if is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        return _DepthwiseConvResidual.apply(*arguments).to(dtype)
    return forward(*arguments).to(dtype)


def _check_call(x, weight, bias) -> None:
    _check.floating_tensor(OP, "x", x)
    _check.shape(OP, "x", x, "(B, T, C), C at least 1", x.dim() == 3 and x.shape[2] >= 1)
    channels = x.shape[2]
    _check.floating_tensor(OP, "weight", weight)
    shape = tuple(weight.shape)
    ok = len(shape) in (2, 3) and shape[:-1] in ((channels,), (channels, 1)) and shape[-1] % 2 == 1
    _check.shape(OP, "weight", weight, f"({channels}, 1, K) or ({channels}, K), K odd", ok)
    _check.same_device(OP, "weight", weight, x, "x")
    if bias is not None:
        _check.floating_tensor(OP, "bias", bias)
        _check.shape(OP, "bias", bias, f"({channels},)", tuple(bias.shape) == (channels,))
        _check.same_device(OP, "bias", bias, x, "x")
