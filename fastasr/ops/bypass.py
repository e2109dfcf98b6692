# SPDX-License-Identifier: Apache-2.0
r"""Bypass of Zipformer (Yao et al., 2023, section 3.3): y = x_orig + (x − x_orig) · scale.

With gradient g: dx = g · scale, dx_orig = g · (1 − scale), dscale = Σ_rows g · (x − x_orig).
Upstream: ``BypassModule`` in ``zipformer.modules.zipformer``.
"""

from typing import Annotated

from torch import Tensor

from fastasr.ops._op import Arguments, Op, op


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
