# SPDX-License-Identifier: Apache-2.0
"""The residual stream of a layer: x + f(x), with f(x) dropped for some sequences.

In a recorded pass one kernel adds, applies the mask and, under autocast, rounds the sum for the next branch; another
one adds up the gradients of a tensor's consumers. The gradient that a branch gets there belongs to it alone, so the
modules at its end may change it in place.
"""

from typing import Any

import torch
from torch import Tensor

from fastasr._recording import recording
from fastasr._transforms import Function
from fastasr.ops import _decided
from fastasr.ops._decided import Drawn
from fastasr.ops._register import autocast_dtype


def forked(src: Tensor, wide: int, narrow: int) -> tuple[Tensor, ...]:
    """Returns ``src`` for ``wide`` consumers that take its own dtype and ``narrow`` ones that take autocast's."""
    if recording() is None:
        return (src,) * (wide + narrow)
    return _Forked.apply(src, wide, narrow, _narrow(src))


def plus(src: Tensor, y: Tensor, mask: Drawn | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns src + y * mask twice, for the stream and for the next branch. ``mask`` is None, a tensor, whose products
    with 0 and 1 are exact, or in a recorded pass ``Drawn``."""
    if recording() is None:
        factor: Any = mask
        out = src + y if mask is None else torch.addcmul(src, y, factor)
        return out, out
    drawn: Any = mask or _decided.NOT_DRAWN
    return _Plus.apply(
        src, y, *drawn, _narrow(src) if src.dtype == torch.promote_types(src.dtype, y.dtype) else None
    )


def _narrow(src: Tensor) -> torch.dtype | None:
    """Returns the dtype in which branches take ``src``, or None if it is that of ``src``."""
    dtype = autocast_dtype(src)
    return None if dtype is src.dtype or src.dtype is torch.float64 else dtype


class _Plus(Function):
    @staticmethod
    def forward(
        ctx: Any, src: Tensor, y: Tensor, numbers: Any, rate: Any, of: Any, narrow: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(numbers, rate, of)
        ctx.dtypes = src.dtype, y.dtype
        ctx.set_materialize_grads(False)
        out, branch = _decided.plus(src, y, None if numbers is None else Drawn(numbers, rate, of), narrow)
        return out, branch.view_as(branch)

    @staticmethod
    def backward(ctx: Any, *found: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = [g for g in found if g is not None]
        if not grads:
            return None, None, None, None, None, None
        numbers, rate, of = ctx.saved_tensors
        of_src, of_y = ctx.dtypes
        passed = len(grads) == 1 and grads[0].dtype is of_src
        drawn = None if numbers is None else Drawn(numbers, rate, of)
        total, dy = _decided.gradients(grads, drawn, None if passed else of_src, of_y)
        return grads[0] if passed else total, dy, None, None, None, None


class _Forked(Function):
    @staticmethod
    def forward(
        ctx: Any, src: Tensor, wide: int, narrow: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        ctx.dtype, ctx.wide = src.dtype, wide
        ctx.set_materialize_grads(False)
        branch = src if dtype is None or not narrow else src.to(dtype)
        return *(src.view_as(src) for _ in range(wide)), *(branch.view_as(branch) for _ in range(narrow))

    @staticmethod
    def backward(ctx: Any, *found: Tensor | None) -> tuple[Tensor | None, ...]:
        # Autograd adds them in the order of the backward pass.
        grads = [g for g in (*found[: ctx.wide][::-1], *found[ctx.wide :][::-1]) if g is not None]
        return _decided.gradients(grads, None, ctx.dtype, None)[0] if grads else None, None, None, None
