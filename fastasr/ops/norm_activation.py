# SPDX-License-Identifier: Apache-2.0
r"""A norm over the channels and the activation that follows, as the convolution modules of many Conformers have them.

y = act(z), z = n ⊙ weight + bias, where n = (x − mean x) / √(var x + eps) for LayerNorm, and n = x / √(mean x² + eps)
for RMSNorm (Zhang and Sennrich, 2019). With q = grad ⊙ act'(z) and d = q ⊙ weight, over the channels of a row:
dx = (d − mean d − n mean(d n)) / √(var x + eps), for RMSNorm without mean d; dweight = Σ_rows q ⊙ n, dbias = Σ_rows q.
With a limit l the norm reads clamp(x, −l, l), and dx is 0 outside.

Upstream: transformers' ``Wav2Vec2BertConvolutionModule`` and ``NemotronAsrStreamingEncoderConvolutionModule``,
SpeechBrain's ``ConvolutionModule``, behind the depthwise convolution; Gemma's ``Gemma4AudioLightConv1d``, with a limit.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from fastasr.ops import _activation
from fastasr.ops._dispatch import Kernels
from fastasr.ops._norm import KINDS, effective_limit, limited, normed
from fastasr.ops._op import Arguments, Needs, Op, Saved, op
from fastasr.ops._runtime import operand


# --------------------------------------------------------------------------- kernels
def _operands(kernels: Kernels, a: Arguments, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns x, weight and bias. C++ kernels read parameters in the dtype of the computation; Triton's kernels convert
    what they load.
    """
    if kernels.backend == "triton":
        return a.x.contiguous(), a.weight.contiguous(), operand(a.bias, None)
    double = torch.float64 in (a.weight.dtype, None if a.bias is None else a.bias.dtype)
    work = torch.float64 if double else dtype
    wide = torch.promote_types(work, torch.float32)
    return a.x.to(work).contiguous(), a.weight.to(wide).contiguous(), operand(a.bias, wide)


def _options(a: Arguments) -> tuple[float, int, int, float]:
    return a.eps, KINDS.index(a.kind), _activation.NUMBERS[a.activation], effective_limit(a.limit, a.x)


def _launch(op: Op, kernels: Kernels, a: Arguments, dtype: torch.dtype, keep: bool) -> tuple[Tensor, Tensor]:
    y, statistics = kernels.forward(*_operands(kernels, a, dtype), *_options(a), keep)
    if statistics is None:  # Triton's kernels compute them again.
        statistics = a.weight.new_empty(*y.shape[:-1], 3, dtype=torch.float32)
    return y, statistics


def _gradients(
    op: Op, kernels: Kernels, grads: Sequence[Tensor], saved: Saved, needs: Needs
) -> tuple[Tensor, ...]:
    x, weight, bias = _operands(kernels, saved, saved.x.dtype)
    grad = operand(grads[0], x.dtype)
    return kernels.backward(grad, x, weight, bias, saved.statistics, *_options(saved))


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    strides={"x": "rows"},
    keeps={"statistics": Annotated[Tensor, "*S 3", "wide x + weight + bias"]},
    forward="x weight bias eps kind activation limit keep",
    backward="grad x weight bias statistics eps kind activation limit -> x weight bias",
    launch=_launch,
    gradients=_gradients,
)
def norm_activation(
    x: Annotated[Tensor, "*S C, C >= 1"],
    weight: Annotated[Tensor, "C", "wide"],
    bias: Annotated[Tensor, "C", "wide"] | None = None,
    *,
    eps: Annotated[float, ">= 0"] = 1e-5,
    kind: Literal["layer", "rms"] = "layer",
    activation: _activation.Activation = "silu",
    limit: Annotated[float, ">= 0"] = 0.0,
) -> Annotated[Tensor, "*S C", "x"]:
    """The activation of LayerNorm or RMSNorm over the last dimension.

    Args:
        x: (..., C); float32, bfloat16, float16 or float64.
        weight: (C,); bias: (C,) or None.
        eps: added to the variance, or to the mean of the squares.
        kind: "layer" subtracts the mean and divides by the standard deviation; "rms" divides by the root mean square.
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
        limit: the norm reads x between -limit and limit, or the largest numbers of x's dtype; 0: no limit.
    Returns:
        A tensor of x's shape and dtype, computed in float32 or better, rounded once.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    return _activation.FUNCTIONS[activation](normed(limited(x, limit), weight, bias, eps, kind))
