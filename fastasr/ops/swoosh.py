# SPDX-License-Identifier: Apache-2.0
r"""Swoosh activations of Zipformer (Yao et al., "Zipformer", 2023, section 3.5).

SwooshL(x) = log(1 + e^(x-4)) − 0.08 x − 0.035, SwooshR(x) = log(1 + e^(x-1)) − 0.08 x − 0.313261687,
derivative sigmoid(x − a) − 0.08 with a = 4, 1. Upstream: ``SwooshL``, ``SwooshR`` in ``zipformer.modules.scaling``.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from fastasr.ops import _layout
from fastasr.ops._dispatch import Kernels
from fastasr.ops._op import Arguments, Needs, Op, Saved, op
from fastasr.ops._swoosh import FAMILY, KINDS, definition


# --------------------------------------------------------------------------- kernels
def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> Tensor:
    swoosh_r = op.name == "swoosh_r"
    return _layout.elementwise(lambda t: kernels.forward(t, swoosh_r, None, -1, None), a.x)


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor]:
    swoosh_r = op.name == "swoosh_r"

    def gradient(x: Tensor, grad: Tensor) -> Tensor:
        return kernels.backward(grad, x, swoosh_r, None, -1, None, False)[0]

    return (_layout.elementwise(gradient, saved.x, *grads),)


def _op(kind: str) -> Op:
    swoosh_r = KINDS[kind]
    return op(
        FAMILY,
        strides={"y": "x"},
        forward=f"x {swoosh_r} None -1 None",
        backward=f"grad x {swoosh_r} None -1 None False -> x _",
        launch=_launch,
        gradients=_gradients,
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
