# SPDX-License-Identifier: Apache-2.0
r"""A residual and the norm that follows, as blocks with the norm before each branch have between two branches.

t = x + scale · u, the stream of the block;  y = n ⊙ weight + bias, the input of the next branch, over the channels:
n = (t − mean t) / √(var t + eps) for LayerNorm, n = t / √(mean t² + eps) for RMSNorm. The update u is the last branch's
output, or, in blocks with a norm behind each branch too, its RMSNorm: u = m ⊙ update_weight, m = update /
√(mean update² + eps). With gradients T of t and Y of y, and d = Y ⊙ weight:
dx = T + (d − mean d − n mean(d n)) / √(var t + eps), for RMSNorm without mean d; du = scale · dx;
dweight = Σ_rows Y ⊙ n, dbias = Σ_rows Y; with e = du ⊙ update_weight:
dupdate = (e − m mean(e m)) / √(mean update² + eps), dupdate_weight = Σ_rows du ⊙ m.
With a limit l a norm reads its input between −l and l, and passes no gradient outside.

Under autocast the stream is float32 and a branch computes in 16 bits: y has the dtype of update, the last branch's
output, so that no pass over memory casts it.

Upstream: the residuals of ``NemotronAsrStreamingEncoderBlock`` and ``Gemma4AudioLayer`` in transformers.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from fastasr.ops import _layout
from fastasr.ops._dispatch import Kernels, native_kernels, triton_kernels
from fastasr.ops._linear import LateFamily, late_sums
from fastasr.ops._norm import KINDS, effective_limit, limited, normed
from fastasr.ops._op import Arguments, Needs, Op, Saved, op
from fastasr.ops._runtime import operand


# --------------------------------------------------------------------------- kernels
def _operands(kernels: Kernels, a: Arguments) -> tuple[Any, ...]:
    """Returns x, update and the parameters. C++ kernels read all in the dtype of the computation; Triton's kernels
    convert what they load.
    """
    parameters = a.weight, a.bias, a.update_weight
    if kernels.backend == "triton":
        return _layout.rows(a.x), _layout.rows(a.update), *(operand(t, None) for t in parameters)
    double = any(t is not None and t.dtype is torch.float64 for t in parameters)
    work = torch.float64 if double else torch.promote_types(a.x.dtype, a.update.dtype)
    wide = torch.promote_types(work, torch.float32)
    return operand(a.x, work), operand(a.update, work), *(operand(t, wide) for t in parameters)


def _options(a: Arguments) -> tuple[float, float, int, float, float]:
    total = a.x if a.x.dtype.itemsize >= a.update.dtype.itemsize else a.update
    limits = effective_limit(a.update_limit, a.update), effective_limit(a.limit, total)
    return a.eps, a.scale, KINDS.index(a.kind), *limits


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    return kernels.forward(*_operands(kernels, a), *_options(a))


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor | None], saved: Saved, needs: Needs
) -> tuple[Tensor, ...]:
    operands = _operands(kernels, saved)
    work = None if kernels.backend == "triton" else operands[0].dtype
    grad_t, grad_y = (operand(grad, work) for grad in grads)
    if grad_y is None:
        grad_y = torch.zeros_like(operands[1], memory_format=torch.contiguous_format)
    late = late_sums(kernels, saved.weight, saved.bias)
    return kernels.backward(grad_t, grad_y, *operands, *_options(saved), *(() if late is None else (late,)))


FAMILY = LateFamily("add_norm", ("add_norm",), (native_kernels("add_norm"), triton_kernels("add_norm")))


# --------------------------------------------------------------------------- the op
@op(FAMILY, launch=_launch, gradients=_gradients)
def add_norm(
    x: Annotated[Tensor, "*S C, C >= 1"],
    update: Annotated[Tensor, "*S C"],
    weight: Annotated[Tensor, "C", "wide"],
    bias: Annotated[Tensor, "C", "wide"] | None = None,
    eps: Annotated[float, ">= 0"] = 1e-5,
    scale: float = 1.0,
    *,
    kind: Literal["layer", "rms"] = "layer",
    update_weight: Annotated[Tensor, "C", "wide"] | None = None,
    update_limit: Annotated[float, ">= 0"] = 0.0,
    limit: Annotated[float, ">= 0"] = 0.0,
) -> tuple[Annotated[Tensor, "t: *S C", "x + update"], Annotated[Tensor, "y: *S C", "update"]]:
    """Returns x + scale · update, and its norm over the last dimension.

    Args:
        x, update: (..., C), one shape. float32, bfloat16, float16 or float64.
        weight: (C,); bias: (C,) or None.
        eps: added to the variance, or to the mean of the squares.
        scale: the factor of the update.
        kind: "layer" subtracts the mean and divides by the standard deviation; "rms" divides by the root mean square.
        update_weight: (C,); the RMSNorm of the update with this weight takes the update's place.
        update_limit, limit: the norms read the update and the sum between -limit and limit, or the largest numbers of
            their dtype; 0: no limit.
    Returns:
        The sum, in the promoted dtype of x and update, and the norm of the sum as it is rounded, computed in float32 or
        better and rounded once to update's dtype. Both have x's shape.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    if update_weight is None:
        t = torch.add(x, update, alpha=scale)
    else:
        t = torch.add(x, normed(limited(update, update_limit), update_weight, None, eps, "rms"), alpha=scale)
    return t, normed(limited(t, limit), weight, bias, eps, kind).to(update.dtype)
