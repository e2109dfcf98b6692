# SPDX-License-Identifier: Apache-2.0
r"""Swoosh activations of Zipformer (Yao et al., "Zipformer", 2023, section 3.5).

SwooshL(x) = log(1 + e^(x-4)) − 0.08 x − 0.035, SwooshR(x) = log(1 + e^(x-1)) − 0.08 x − 0.313261687,
derivative sigmoid(x − a) − 0.08 with a = 4, 1. Upstream: ``SwooshL``, ``SwooshR`` in ``zipformer.modules.scaling``.
"""

from functools import partial
from typing import Annotated

from torch import Tensor

from fastasr.ops import _layout
from fastasr.ops._op import op
from fastasr.ops._swoosh import FAMILY, KINDS, definition


# --------------------------------------------------------------------------- kernels
def _launch(swoosh_r: bool, op, kernels, a, dtype, keep: bool) -> Tensor:
    return _layout.elementwise(lambda t: kernels.forward(t, swoosh_r, None, -1), a.x)


def _gradients(swoosh_r: bool, op, kernels, grads, saved, needs) -> tuple[Tensor]:
    return (
        _layout.elementwise(
            lambda t, g: kernels.backward(g, t, swoosh_r, None, -1, False)[0], saved.x, *grads
        ),
    )


def _op(kind: str):
    swoosh_r = KINDS[kind]
    return op(
        FAMILY,
        like="x",
        fast_strides="x",
        forward=f"x {swoosh_r} None -1",
        backward=f"grad x {swoosh_r} None -1 False -> x _",
        launch=partial(_launch, swoosh_r),
        gradients=partial(_gradients, swoosh_r),
        summary="log(1 + e^(x−a)) − 0.08 x − b",
    )


# --------------------------------------------------------------------------- the ops
@_op("SwooshL")
def swoosh_l(x: Annotated[Tensor, "*S"]) -> Annotated[Tensor, "*S", "x"]:
    """SwooshL(x) = log(1 + e^(x-4)) − 0.08 x − 0.035, elementwise.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
    Returns:
        A tensor of x's shape and dtype; computed in float32 (float64 for float64) and rounded once. SwooshL(+inf) is
        NaN, as in the formula.
    Raises:
        TypeError: x is not a floating tensor.
    """
    return definition(x, "SwooshL")


@_op("SwooshR")
def swoosh_r(x: Annotated[Tensor, "*S"]) -> Annotated[Tensor, "*S", "x"]:
    """SwooshR(x) = log(1 + e^(x-1)) − 0.08 x − 0.313261687, elementwise. See :func:`swoosh_l`."""
    return definition(x, "SwooshR")
