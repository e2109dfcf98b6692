# SPDX-License-Identifier: Apache-2.0
r"""BatchNorm over frames in training, and the activation that follows, as a Conformer's convolution module has them.

y = act(z), z = n ⊙ weight + bias, n = (x − m) / √(v + eps), where m and v are the mean and the biased variance of each
channel over the N frames that are not padding (Ioffe and Szegedy, 2015). With q = grad ⊙ act'(z), 0 at padding:
dbias = Σ_frames q, dweight = Σ_frames q ⊙ n, dx = weight / √(v + eps) ⊙ (q − (dbias + n ⊙ dweight) / N), 0 at padding.

Upstream: ``torch.nn.BatchNorm1d`` and SiLU behind the depthwise convolution of transformers' Parakeet and NeMo's
FastConformer, of torchaudio's Conformer and of others.
"""

from typing import Annotated

import torch
from torch import Tensor

from fastasr.ops import _activation
from fastasr.ops._op import op


@op(
    "cpu triton",
    keeps={"statistics": Annotated[Tensor, "4 C", "wide x + weight + bias"]},
    forward="x weight bias padding_mask eps momentum activation",
    backward="grad x weight bias padding_mask statistics activation -> x weight bias",
)
def batch_norm_activation(
    x: Annotated[Tensor, "*S C, C >= 1"],
    weight: Annotated[Tensor, "C", "wide"],
    bias: Annotated[Tensor, "C", "wide"],
    *,
    padding_mask: Annotated[Tensor, "*S", bool] | None = None,
    eps: Annotated[float, ">= 0"] = 1e-5,
    momentum: float = 0.1,
    activation: _activation.Activation = "silu",
) -> tuple[
    Annotated[Tensor, "y: *S C", "x"],
    Annotated[Tensor, "mean: C", "wide x", "constant"],
    Annotated[Tensor, "variance: C", "wide x", "constant"],
    Annotated[Tensor, "rate: C", "wide x", "constant"],
]:
    """The activation of BatchNorm over all dimensions but the last, by the statistics of x itself.

    Args:
        x: (..., C); float32, bfloat16, float16 or float64.
        weight, bias: (C,).
        padding_mask: x's shape without C, bool; True: the frame has no part in the statistics.
        eps: added to the variance.
        momentum: how far running statistics move towards those of x.
        activation: "identity", "silu", "relu", "tanh" or "gelu" (by erf).
    Returns:
        y in x's shape and dtype, computed in float32 or better and rounded once, 0 at padding; and constants (C,) in
        float32, or float64 if x is: the mean, the unbiased variance, which is 0 where one frame or none counts, and
        the rate: ``momentum``, or 0 where no frame counts. ``running.lerp_(found, rate)`` moves running statistics as
        torch does, and nothing waits for the device.
    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or names do not match.
    """
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, x.shape[-1])
    hidden, count = None, rows.new_full((), rows.shape[0])
    if padding_mask is not None:
        hidden = padding_mask.reshape(-1, 1)
        rows, count = rows.masked_fill(hidden, 0.0), (~hidden).sum(dtype=rows.dtype)
    share = 1.0 / count.clamp(min=1.0)
    mean = rows.sum(0) * share
    centred = rows - mean
    if hidden is not None:
        centred = centred.masked_fill(hidden, 0.0)
    rest = centred.sum(0) * share  # of the mean, which was rounded
    centred = centred - rest
    if hidden is not None:
        centred = centred.masked_fill(hidden, 0.0)
    squares = centred.square().sum(0)
    normal = centred * torch.rsqrt(squares * share + eps)
    z = torch.addcmul(bias.to(rows.dtype), normal, weight.to(rows.dtype))
    y = _activation.FUNCTIONS[activation](z)
    if hidden is not None:
        y = y.masked_fill(hidden, 0.0)
    variance = squares.detach() / (count - 1.0).clamp(min=1.0)
    rate = torch.full_like(variance, momentum).masked_fill(count == 0, 0.0)
    return y.to(x.dtype).reshape(x.shape), (mean + rest).detach(), variance, rate
