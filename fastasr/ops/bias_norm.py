# SPDX-License-Identifier: Apache-2.0
r"""BiasNorm of Zipformer (Yao et al., 2023, section 3.4).

y = x · s, s = e^log_scale · m^(−1/2), m = mean over channels of (x − bias)². No epsilon. With G = Σ_j g_j x_j and
k = G s / Σ_j (x_j − b_j)²: dx = g s − k (x − b), db = Σ_rows k (x − b), dlog_scale = Σ_rows G s.
Upstream: ``BiasNorm`` in ``zipformer.modules.scaling``.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from fastasr.ops._dispatch import Kernels
from fastasr.ops._op import Arguments, Needs, Op, Saved, op


def _check(op: Op, a: Arguments) -> None:
    channels = a.x.shape[a.channel_dim]
    if a.bias.shape[0] != channels:
        op.fail("bias", f"shape ({channels},)", tuple(a.bias.shape))


# --------------------------------------------------------------------------- kernels
def _operands(kernels: Kernels, a: Arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Moves the channels last and gives x and bias one dtype for the C++ kernels."""
    x, bias = a.x.movedim(a.channel_dim, -1), a.bias
    if kernels.backend == "cpu":
        x, bias = x.to(dtype), bias.to(dtype)
    return x.contiguous(), bias.contiguous(), a.log_scale.reshape(())


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> Tensor:
    return kernels.forward(*_operands(kernels, a, dtype)).movedim(-1, a.channel_dim).contiguous()


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor, ...]:
    (grad,) = grads
    grad = grad.movedim(saved.channel_dim, -1).contiguous()
    operands = _operands(kernels, saved, op.written.result_dtypes(saved)[0])
    dx, dbias, dlog_scale = kernels.backward(grad, *operands)
    return dx.movedim(-1, saved.channel_dim), dbias, dlog_scale


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    check=_check,
    forward="x bias log_scale",
    backward="grad x bias log_scale -> x bias log_scale",
    launch=_launch,
    gradients=_gradients,
)
def bias_norm(
    x: Annotated[Tensor, "*S D"],
    bias: Annotated[Tensor, "C"],
    log_scale: Annotated[Tensor, " | 1"],
    channel_dim: Annotated[int, "dimension of x"] = -1,
) -> Annotated[Tensor, "*S D", "x + bias"]:
    """x · mean((x − bias)², channel_dim)^(−1/2) · e^log_scale. There is no epsilon: a row equal to bias gives inf.

    Args:
        x: any shape with at least one dimension; float32, bfloat16, float16 or float64.
        bias: (C,), C = x.shape[channel_dim].
        log_scale: one element.
        channel_dim: the dimension that is normalised.
    Returns:
        A tensor of x's shape; its dtype is the promotion of x's and bias's (as the formula's), computed in float32 or
        better and rounded once.
    Raises:
        TypeError: an argument is not a floating tensor, or channel_dim not an int.
        ValueError: shapes or devices do not match.
    """
    bias = bias.reshape(-1, *(1,) * ((x.dim() - 1 - channel_dim) % x.dim()))
    scale = torch.mean((x - bias) ** 2, dim=channel_dim, keepdim=True) ** -0.5 * log_scale.exp()
    return x * scale
