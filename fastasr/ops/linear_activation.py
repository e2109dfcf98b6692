# SPDX-License-Identifier: Apache-2.0
r"""A linear layer with its activation, as feed-forward blocks and gated MLPs begin; or with a gated one (Shazeer, "GLU
variants improve Transformer", 2020), of which SwiGLU is the one with SiLU.

For z = x Wᵀ + b with gradient dz, dx = dz W, dW = dzᵀ x and db = Σ_rows dz, and for y's gradient h:

    y = act(z)                        dz = h ⊙ act'(z)
    gated, z = (a, g)    y = a ⊙ act(g)      da = h ⊙ act(g), dg = h ⊙ a ⊙ act'(g)

Backward needs x and z. Without a gradient act(z) takes z's place.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _activation, _gemm
from fastasr.ops._activation import NUMBERS
from fastasr.ops._dispatch import Kernels, native_kernels, triton_kernels
from fastasr.ops._linear import LateFamily, fits, late
from fastasr.ops._op import Arguments, Needs, Op, Saved, op


def _check(op: Op, a: Arguments) -> None:
    if a.gated and len(a.weight) % 2:
        op.fail("weight", "an even number of rows if gated", len(a.weight))


# --------------------------------------------------------------------------- kernels
def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    z = _gemm.forward(a.x, a.weight, a.bias).contiguous()
    return kernels.forward(z, NUMBERS[a.activation], not keep, a.gated), z


def _fast(
    kernels: Kernels, keep: bool, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    if not fits(x, weight, bias):
        raise NotImplementedError
    z = _gemm.forward(x, weight, bias)
    return kernels.forward(z, NUMBERS[activation], not keep, gated), z  # unless z is kept, y takes its place


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor | None, ...]:
    (grad,) = grads
    arguments = grad.contiguous(), saved.z, NUMBERS[saved.activation], needs.bias, saved.gated
    later = late(kernels, saved.bias, grad) if needs.bias else None
    dz, dbias = kernels.backward(*arguments) if later is None else kernels.backward(*arguments, later)
    return (
        _gemm.input_grad(dz, saved.weight) if needs.x else None,
        _gemm.weight_grad(dz, saved.x) if needs.weight else None,
        dbias if needs.bias else None,
    )


_NATIVE, _TRITON = native_kernels("linear_activation"), triton_kernels("linear_activation")
FAMILY = LateFamily("linear_activation", ("linear_activation",), (_NATIVE, _TRITON))


# --------------------------------------------------------------------------- the op
@op(
    FAMILY,
    one_dtype="x weight bias",
    keeps={"z": Annotated[Tensor, "*S N", "y"]},
    check=_check,
    launch=_launch,
    gradients=_gradients,
    fast=_fast,
)
def linear_activation(
    x: Annotated[Tensor, "*S K"],
    weight: Annotated[Tensor, "N K"],
    bias: Annotated[Tensor, "N"] | None = None,
    activation: _activation.Activation = "silu",
    gated: bool = False,
) -> Annotated[Tensor, "*S N//(1+gated)", "x"]:
    """A linear layer and its activation: act(x weightᵀ + bias), or gated a · act(g) for (a, g) = x weightᵀ + bias.

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K); bias: (N,) or None; x's dtype, except under autocast, which casts all three.
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
        gated: the second half of the product is the activation's argument, whose value multiplies the first half.
    Returns:
        (..., N), or (..., N / 2) if gated.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; activation is not one of these; N is odd and gated is set.
    """
    z = F.linear(x, weight, bias)
    if not gated:
        return _activation.FUNCTIONS[activation](z)
    a, g = z.chunk(2, dim=-1) if z.shape[-1] else (z, z)
    return a * _activation.FUNCTIONS[activation](g)
