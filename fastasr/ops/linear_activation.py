# SPDX-License-Identifier: Apache-2.0
r"""A linear layer with its activation, as feed-forward blocks and gated MLPs begin; or with a gated one (Shazeer, "GLU
variants improve Transformer", 2020), of which SwiGLU is the one with SiLU.

For z = x Wᵀ + b with gradient dz, dx = dz W, dW = dzᵀ x and db = Σ_rows dz, and for y's gradient h:

    y = act(z)                        dz = h ⊙ act'(z)
    gated, z = (a, g)    y = a ⊙ act(g)      da = h ⊙ act(g), dg = h ⊙ a ⊙ act'(g)

Under dropout y has the factor m, and h is m ⊙ the gradient: m is 0 for the share p of y's elements and 1 / (1 − p) for
the others, by a hash of a seed, of the row of y and of its column (:mod:`fastasr.ops._weights_dropout`), which no pass
keeps.

Backward needs x and z. Without a gradient act(z) takes z's place.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from fastasr.ops import _activation, _gemm, _weights_dropout
from fastasr.ops._activation import NUMBERS
from fastasr.ops._dispatch import Kernels, native_kernels, triton_kernels
from fastasr.ops._linear import LateFamily, fits, late
from fastasr.ops._op import Arguments, Needs, Op, Saved, op


def _check(op: Op, a: Arguments) -> None:
    if a.gated and len(a.weight) % 2:
        op.fail("weight", "an even number of rows if gated", len(a.weight))
    if a.dropout_p and a.dropout_seed is None:
        op.fail("dropout_seed", "a Tensor where dropout_p is more than 0", None)


# --------------------------------------------------------------------------- kernels
def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    z = _gemm.forward(a.x, a.weight, a.bias).contiguous()
    return kernels.forward(z, NUMBERS[a.activation], not keep, a.gated, a.dropout_p, a.dropout_seed), z


def _fast(
    kernels: Kernels, keep: bool, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gated: bool,
    dropout_p: float, dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not fits(x, weight, bias):
        raise NotImplementedError
    if not (keep or gated or dropout_p) and _gemm.leaves_bias(x, weight, bias):
        z = F.linear(x, weight)
        return kernels.forward(z, NUMBERS[activation], True, False, 0.0, None, None, bias), z
    z = _gemm.forward(x, weight, bias)
    # unless z is kept, y takes its place
    return kernels.forward(z, NUMBERS[activation], not keep, gated, dropout_p, dropout_seed), z


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor | None, ...]:
    (grad,) = grads
    options = saved.gated, saved.dropout_p, saved.dropout_seed
    arguments = grad.contiguous(), saved.z, NUMBERS[saved.activation], needs.bias, *options
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
    *,
    dropout_p: Annotated[float, ">= 0 and < 1"] = 0.0,
    dropout_seed: Annotated[Tensor, "1", torch.int64] | None = None,
) -> Annotated[Tensor, "*S N//(1+gated)", "x"]:
    """A linear layer and its activation: act(x weightᵀ + bias), or gated a · act(g) for (a, g) = x weightᵀ + bias.

    Args:
        x: (..., K); float32, bfloat16, float16 or float64.
        weight: (N, K); bias: (N,) or None; x's dtype, except under autocast, which casts all three.
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
        gated: the second half of the product is the activation's argument, whose value multiplies the first half.
        dropout_p: the share of the result that is set to 0; the rest is divided by 1 − dropout_p.
        dropout_seed: int64 (1,), which chooses these elements; needed where dropout_p is more than 0. One seed and
            shape give the same elements on every backend.
    Returns:
        (..., N), or (..., N / 2) if gated.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; activation is not one of these; N is odd and gated is set; dropout_p
            is out of range, or has no seed.
    """
    z, act = F.linear(x, weight, bias), _activation.FUNCTIONS[activation]
    a, g = z.chunk(2, dim=-1) if gated and z.shape[-1] else (z, z)
    y = a * act(g) if gated else act(z)
    if dropout_p and dropout_seed is not None:
        y = y * _weights_dropout.kept(dropout_seed, dropout_p, *y.shape) / (1 - dropout_p)
    return y
