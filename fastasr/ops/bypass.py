# SPDX-License-Identifier: Apache-2.0
r"""Bypass of Zipformer (Yao et al., 2023, section 3.3): y = x_orig + (x − x_orig) · scale.

With gradient g: dx = g · scale, dx_orig = g · (1 − scale), dscale = Σ_rows g · (x − x_orig).
Upstream: ``BypassModule`` in ``zipformer.modules.zipformer``.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from fastasr.ops._decided import Drawn
from fastasr.ops._op import OPS, Arguments, Op, op


def _trailing(op: Op, a: Arguments) -> None:
    """Checks scale against the trailing dimensions of x: kernels repeat it over rows of its size."""
    x, scale = a.x, a.scale
    if not (1 <= scale.dim() <= x.dim() and scale.shape == x.shape[x.dim() - scale.dim() :]):
        op.fail("scale", f"shape the trailing dimensions of x, {tuple(x.shape)}", tuple(scale.shape))


@op("cpu triton", check=_trailing)
def bypass(
    x_orig: Annotated[Tensor, "*S"], x: Annotated[Tensor, "*S"], scale: Annotated[Tensor, "..."]
) -> Annotated[Tensor, "*S", "x_orig + x + scale"]:
    """x_orig + (x − x_orig) · scale.

    Args:
        x_orig, x: the same shape; in a Zipformer (T, B, C). float32, bfloat16, float16 or float64.
        scale: (C,), or (B, C) for a scale per sequence: the trailing dimensions of x.
    Returns:
        A tensor of x's shape; its dtype is the promotion of the three, computed in float32 or better, rounded once.
    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not match.
    """
    return x_orig + (x - x_orig) * scale


# --------------------------------------------------------------------------- recorded passes
def _kernels(x: Tensor, *others: Tensor) -> Any:
    found = OPS["bypass"].family.kernels(x, *others)
    return found if found is not None and found.backend == "triton" else None


def dropped(x_orig: Tensor, x: Tensor, scale: Tensor, drawn: Drawn) -> Tensor:
    """Returns the op's result for the frames of a row (N, 1, C) and a scale (C,), x_orig in recordings that skip x."""
    kernels = _kernels(x, x_orig, scale)
    if kernels is not None:
        found: Tensor = kernels.forward(x_orig.contiguous(), x.contiguous(), scale.contiguous(), *drawn)
        return found
    return x_orig + torch.where(drawn.mask(torch.bool), x - x_orig, 0.0) * scale


def dropped_gradients(
    grad: Tensor, x_orig: Tensor, x: Tensor, scale: Tensor, drawn: Drawn
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x_orig, x and scale."""
    kernels = _kernels(x, x_orig, scale)
    if kernels is not None:
        given = (t.contiguous() for t in (grad, x_orig, x, scale))
        found: tuple[Tensor, Tensor, Tensor] = kernels.backward(*given, *drawn)
        return found
    kept = torch.where(drawn.mask(torch.bool), grad, 0.0)
    dscale = (kept * (x - x_orig)).sum((0, 1))
    return (grad - kept * scale).to(x_orig.dtype), (kept * scale).to(x.dtype), dscale.to(scale.dtype)
