# SPDX-License-Identifier: Apache-2.0
r"""Linear layer: y = x Wᵀ + b, dx = g W, dW = gᵀ x, db = Σ_rows g.

``torch.nn.functional.linear`` with a measured choice of matrix product on CPU, see :mod:`fastasr.ops._gemm`. FLOPs:
2 M N K each for y, dx and dW.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from fastasr.ops import _check, _gemm
from fastasr.ops._dispatch import PLAIN, Implementation, KernelFamily, Kernels, direct, served
from fastasr.ops._register import autocast_dtype, cast, refuse_double_backward, register


# --------------------------------------------------------------------------- definition
def definition(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in eager PyTorch."""
    return F.linear(x, weight, bias)


# --------------------------------------------------------------------------- kernels
def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y without autograd."""
    return _gemm.forward(x, weight, bias)


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool] | tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) without autograd; None for each that ``needs`` does not ask for."""
    return (
        _gemm.input_grad(grad, weight) if needs[0] else None,
        _gemm.weight_grad(grad, x) if needs[1] else None,
        bias_grad(grad) if needs[2] else None,
    )


def bias_grad(grad: Tensor) -> Tensor:
    """The sum over rows; a copy where there is one row (an op's output may not be its input)."""
    return grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad.clone()


def backward(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gradients` as a registered op returns them: an empty tensor for None."""
    return tuple(grad.new_empty(0) if g is None else g for g in gradients(grad, x, weight, needs))


FAMILY = KernelFamily(
    "linear",
    ("linear",),
    (
        Implementation(
            "cpu",
            ("cpu",),
            (torch.float32,),
            _gemm.reason,
            lambda: Kernels("cpu", forward, backward),
        ),
    ),
    vendor=True,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return forward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward("linear")
        return gradients(grad, *ctx.saved_tensors, ctx.needs_input_grad)


# --------------------------------------------------------------------------- registration
def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


_BACKWARD_OP = register(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool[] needs) -> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _op_backward(ctx, grad: Tensor):
    needs = list(ctx.needs_input_grad)
    grads = _BACKWARD_OP(grad, *ctx.saved_tensors, needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


_OP = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_op_backward,
    autocast=lambda dtype, x, weight, bias: cast(dtype, x, weight, bias),
)


def check_affine(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, same_dtype: bool) -> None:
    """The checks that every op with a linear layer in it shares. Under autocast dtypes may differ: they are cast."""
    _check.floating_tensor(op, "x", x)
    _check.floating_tensor(op, "weight", weight)
    _check.shape(op, "weight", weight, "(N, K)", weight.dim() == 2)
    _check.shape(
        op, "x", x, f"(..., {weight.shape[1]}), K of weight", x.dim() >= 1 and x.shape[-1] == weight.shape[1]
    )
    _check.same_device(op, "weight", weight, x, "x")
    if same_dtype and weight.dtype != x.dtype:
        raise TypeError(f"fastasr.{op}: weight: expected dtype {x.dtype} (that of x), got {weight.dtype}")
    if bias is None:
        return
    _check.floating_tensor(op, "bias", bias)
    _check.shape(
        op, "bias", bias, f"({weight.shape[0]},)", bias.dim() == 1 and bias.shape[0] == weight.shape[0]
    )
    _check.same_device(op, "bias", bias, x, "x")
    if same_dtype and bias.dtype != x.dtype:
        raise TypeError(f"fastasr.{op}: bias: expected dtype {x.dtype} (that of x), got {bias.dtype}")


def plain_affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these need none of :func:`check_affine`: plain float32 CPU tensors, a right bias. K is left to the
    product itself, which raises RuntimeError."""
    return (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and x.is_cpu
        and weight.is_cpu
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.layout is weight.layout is torch.strided
        and weight.dim() == 2
        and (bias is None or (type(bias) in PLAIN and bias.is_cpu and bias.dtype is torch.float32))
        and (bias is None or (bias.shape == weight.shape[:1] and bias.layout is torch.strided))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias: ``torch.nn.functional.linear``, faster where another matrix product is.

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K); bias: (N,) or None; x's dtype, except under autocast, which casts all three.
    Returns:
        (..., N).
    Raises:
        TypeError: an argument is not a floating tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not match.
    """
    if (
        not is_compiling()
        and FAMILY.native is not None
        and plain_affine(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
    ):
        try:
            if is_grad_enabled() and (
                x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
            ):
                return _Linear.apply(x, weight, bias)
            return _gemm.forward(x, weight, bias)
        except RuntimeError:
            pass  # the checked path tells why
    dtype = autocast_dtype(x) if isinstance(x, Tensor) else None
    check_affine("linear", x, weight, bias, dtype is None)
    if not direct(x, weight, bias):
        return (_OP if served("linear", x) else F.linear)(x, weight, bias)
    if dtype is not None or FAMILY.kernels(x) is None:
        return F.linear(x, weight, bias)
    if is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return forward(x, weight, bias)
