# SPDX-License-Identifier: Apache-2.0
r"""Linear layer: y = x Wᵀ + b, dx = g W, dW = gᵀ x, db = Σ_rows g.

``torch.nn.functional.linear`` with a measured choice of matrix product on CPU, see :mod:`fastasr.ops._gemm`. FLOPs:
2 M N K each for y, dx and dW.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _gemm
from fastasr.ops._dispatch import KernelFamily, Kernels, native_kernels
from fastasr.ops._op import op

_NATIVE = native_kernels("linear", "gemm", lambda: Kernels("cpu", _gemm.forward, None), (torch.float32,))
FAMILY = KernelFamily("linear", (), (_NATIVE,), vendor=True)

# These checks cover what the product itself does not refuse.
FITS = (
    "x.layout is weight.layout is _strided and len(_rows := weight.shape) == 2 and (bias is None or "
    "bias.layout is _strided and bias.dim() == 1 and bias.numel() == _rows[0])"
)


# --------------------------------------------------------------------------- kernels
def bias_grad(grad: Tensor) -> Tensor:
    """Returns the sum over rows, a copy where there is one row (an op's output may not be its input)."""
    return grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad.clone()


def _gradients(op, kernels, grads, saved, needs) -> tuple[Tensor | None, ...]:
    (grad,) = grads
    return (
        _gemm.input_grad(grad, saved.weight) if needs.x else None,
        _gemm.weight_grad(grad, saved.x) if needs.weight else None,
        bias_grad(grad) if needs.bias else None,
    )


def _torch_wins(x: Tensor, weight: Tensor) -> bool:
    """Says whether torch's product serves each pass of this call: torch's own node of autograd then costs less than one
    in Python.
    """
    (n, k), threads = weight.shape, torch.get_num_threads()
    rows = x.numel() // k
    passes = [("forward", rows.bit_length(), n, k, threads)]
    if x.requires_grad:
        passes.append(("input_grad", rows.bit_length(), k, n, threads))
    if weight.requires_grad:
        passes.append(("weight_grad", n.bit_length(), k, rows, threads))
    return n >= _gemm.CHAINS and all(_gemm.is_torch(key) for key in passes)


# --------------------------------------------------------------------------- the op
@op(
    FAMILY,
    one_dtype="x weight bias",
    autocast="one dtype",
    launch=lambda op, kernels, a, dtype, keep: kernels.forward(*a),
    gradients=_gradients,
    fast="_kernels.forward(x, weight, bias)",
    # Only float32 has a choice, and only float32 may be forced.
    fits=f"(_dtype is _float32 or _dtype in _FLOATING and _forced_backend() == 'auto') and {FITS}",
    by_torch="if _dtype is not _float32 or ((_size := x.numel() * _rows[0]) < _gemm.SMALL or _is_grad_enabled() and "
    "(x.requires_grad or weight.requires_grad) and (_size < 16 * _gemm.SMALL or _torch_wins(x, weight))) and "
    "(not _gemm._reduced_weights.copies or _gemm._reduced_weights.of(x, weight) is None):\n"
    "    return F.linear(x, weight, bias)",
    summary="a linear layer, by the matrix product that measured faster on this machine",
)
def linear(
    x: Annotated[Tensor, "*S K"],
    weight: Annotated[Tensor, "N K"],
    bias: Annotated[Tensor, "N"] | None = None,
) -> Annotated[Tensor, "*S N", "x"]:
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
    return F.linear(x, weight, bias)
