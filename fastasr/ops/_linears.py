# SPDX-License-Identifier: Apache-2.0
"""Linear layers of one input in a recorded pass: the products of the backward pass add up the input's gradient, which
autograd would add in a pass over memory for each layer but the first."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastasr._recording import recording
from fastasr._transforms import Function
from fastasr.ops import _gemm
from fastasr.ops._linear import bias_grad, fits, late
from fastasr.ops._op import OPS
from fastasr.ops._register import autocast_dtype, cast

Layer = tuple[Tensor, Tensor | None]  # weight (N, K), bias (N,) or None


def linears(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...] | None:
    """Returns x (..., K) through each layer, or None where ``ops.linear`` serves them one by one."""
    if recording() is None or len(layers) < 2 or not all(fits(x, *layer) for layer in layers):
        return None
    kernels = OPS["linear"].family.kernels(x)
    if kernels is None or kernels.backend != "triton":
        return None
    parameters: Any = [t for layer in layers for t in layer]
    if (dtype := autocast_dtype(x)) is not None:
        x, *parameters = cast(dtype, x, *parameters)
    if any(t is not None and t.dtype is not x.dtype for t in parameters):
        return None
    return _Linears.apply(kernels, x, *parameters)


class _Linears(Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, x: Tensor, *parameters: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *parameters)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        return tuple(_gemm.forward(x, *layer) for layer in _pairs(parameters))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        _, need_x, *needs = ctx.needs_input_grad
        dx: Tensor | None = None
        found: list[Tensor | None] = []
        for grad, (weight, bias), needed in zip(grads, _pairs(parameters), _pairs(needs), strict=True):
            dw, db = None, None
            if grad is not None:
                rows = grad.flatten(0, -2)
                if need_x:
                    dx = _gemm.input_grad(rows, weight) if dx is None else dx.addmm_(rows, weight)
                dw = _gemm.weight_grad(rows, x.flatten(0, -2)) if needed[0] else None
                db = bias_grad(rows, "triton", late(ctx.kernels, bias, rows)) if needed[1] else None
            found += [dw, db]
        return None, None if dx is None else dx.view(x.shape), *found


def _pairs(values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [*zip(values[::2], values[1::2], strict=True)]
