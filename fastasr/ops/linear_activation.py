# SPDX-License-Identifier: Apache-2.0
r"""A linear layer with its activation: y = act(x Wᵀ + b), as feed-forward blocks and gated MLPs begin.

With z = x Wᵀ + b and gradient g: dz = g ⊙ act'(z), dx = dz W, dW = dzᵀ x, db = Σ_rows dz. Saved for backward: x and z.
Without a gradient act(z) takes z's place.

Memory traffic per element of y besides the products: read z, write y forward (in place without a gradient); read g and
z, write dz backward, with db in the same pass.
"""

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _activation, _gemm
from fastasr.ops._dispatch import KernelFamily, Kernels, direct, native_kernels, served, triton_kernels
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register
from fastasr.ops.linear import bias_grad, check_affine, plain_affine

OP = "linear_activation"
FAMILY = KernelFamily(OP, (OP,), (native_kernels(OP), triton_kernels(OP)))


# --------------------------------------------------------------------------- definition
def definition(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu") -> Tensor:
    """The formula in eager PyTorch."""
    return _activation.function(activation)(torch.nn.functional.linear(x, weight, bias))


def definition_backward(
    grad: Tensor, z: Tensor, activation: int, need_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """(dz, db), computed in float32 or better."""
    wide = torch.promote_types(z.dtype, torch.float32)
    dz = grad.to(wide) * _activation.derivative(_activation.NAMES[activation], z.to(wide))
    return dz.to(z.dtype), bias_grad(dz).to(z.dtype) if need_bias else None


# --------------------------------------------------------------------------- kernels
# From here on the activation is its number.
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """(y, z) without autograd; without ``keep`` z is what y is."""
    z = _gemm.forward(x, weight, bias)
    kernels = FAMILY.kernels(z)
    if kernels is None:
        y = _activation.function(_activation.NAMES[activation])(z)
        return y.clone() if activation == 0 and keep else y, z
    z = z.contiguous()
    return kernels.forward(z, activation, not keep), z


def _gradient_of_product(
    kernels: Kernels | None, grad: Tensor, z: Tensor, activation: int, need_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """(dz, db), the latter None where not needed."""
    if kernels is None:
        return definition_backward(grad, z, activation, need_bias)
    dz, dbias = kernels.backward(grad.contiguous(), z.contiguous(), activation, need_bias)
    return dz, dbias if need_bias else None


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    activation: int,
    needs: list[bool] | tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) without autograd; None for each that ``needs`` does not ask for."""
    dz, dbias = _gradient_of_product(FAMILY.kernels(z), grad, z, activation, bool(needs[2]))
    return (
        _gemm.input_grad(dz, weight) if needs[0] else None,
        _gemm.weight_grad(dz, x) if needs[1] else None,
        dbias,
    )


class _LinearActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
        y, z = forward(x, weight, bias, activation, True)
        ctx.save_for_backward(x, weight, z)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward(OP)
        return *gradients(grad, *ctx.saved_tensors, ctx.activation, ctx.needs_input_grad[:3]), None


# --------------------------------------------------------------------------- registration
def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> tuple[Tensor, Tensor]:
    y = weight.new_empty(*x.shape[:-1], weight.shape[0])
    return y, torch.empty_like(y)


def _fake_backward(grad, x, weight, z, activation, needs):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def _backward(grad: Tensor, x: Tensor, weight: Tensor, z: Tensor, activation: int, needs: list[bool]):
    """:func:`gradients` as a registered op returns them: an empty tensor for None."""
    found = gradients(grad, x, weight, z, activation, needs)
    return tuple(grad.new_empty(0) if g is None else g for g in found)


_BACKWARD_OP = register(
    "linear_activation_backward(Tensor grad, Tensor x, Tensor weight, Tensor z, int activation, bool[] needs) -> "
    "(Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _op_backward(ctx, grad: Tensor, _):
    needs = list(ctx.needs_input_grad[:3])
    grads = _BACKWARD_OP(grad, *ctx.saved_tensors, ctx.activation, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


_OP = register(  # y, and z for the backward pass
    "linear_activation(Tensor x, Tensor weight, Tensor? bias, int activation) -> (Tensor, Tensor)",
    lambda x, weight, bias, activation: forward(x, weight, bias, activation, True),
    _fake_forward,
    setup_context=_setup_context,
    backward=_op_backward,
    autocast=lambda dtype, x, weight, bias, activation: (*cast(dtype, x, weight, bias), activation),
)


# --------------------------------------------------------------------------- public function
def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """act(x weightᵀ + bias).

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K); bias: (N,) or None; x's dtype, except under autocast, which casts all three.
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
    Returns:
        (..., N).
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; activation is not one of these.
    """
    if (
        not is_compiling()
        and FAMILY.native is not None
        and plain_affine(x, weight, bias)
        and activation in _activation.NAMES
        and not torch.is_autocast_enabled("cpu")
    ):
        number = _activation.NAMES.index(activation)
        try:
            if is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return _LinearActivation.apply(x, weight, bias, number)
            return FAMILY.native.forward(_gemm.forward(x, weight, bias), number, True)
        except RuntimeError:
            pass  # the checked path tells why
    dtype = autocast_dtype(x) if isinstance(x, Tensor) else None
    check_affine(OP, x, weight, bias, dtype is None)
    number = _activation.number(OP, activation)
    if not direct(x, weight, bias):
        if not served(OP, x):
            return definition(x, weight, bias, activation)
        return _OP(x, weight, bias, number)[0]
    if FAMILY.kernels(x) is None:
        return definition(x, weight, bias, activation)
    if dtype is not None:
        x, weight, bias = cast(dtype, x, weight, bias)
    if is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _LinearActivation.apply(x, weight, bias, number)
    return forward(x, weight, bias, number, False)[0]
