# SPDX-License-Identifier: Apache-2.0
r"""Depthwise convolution of maps, as in the ConvNeXt layer (Liu et al., 2022) of Zipformer's front end.

For x (B, T, F, C), taps w (C, K, L) and zeros around x:

    y[b, t, f, c] = bias[c] + Σ_{i < K, j < L} w[c, i, j] x[b, t + i − P, f + j − Q, c]        padding (P, Q)

With gradient g: dx is the convolution of g with w turned by 180° and padding (K − 1 − P, L − 1 − Q),
dw[c, i, j] = Σ_{b, t, f} g[b, t, f, c] x[b, t + i − P, f + j − Q, c] and dbias = Σ g.
Upstream: ``ConvNeXt.depthwise_conv`` in ``zipformer.modules.subsampling``.
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from fastasr.ops._op import Arguments, Op, op


# --------------------------------------------------------------------------- parts
def _padding(a: Arguments) -> tuple[int, int]:
    return a.padding


def _padding_fits(op: Op, a: Arguments) -> None:
    taps = a.weight.shape[-2:]
    for pad, count in zip(a.padding, taps, strict=True):
        if not 0 <= pad < count:
            op.fail("padding", f"at least 0 and less than {count} taps", pad)
    least = [max(1, count - 2 * pad) for pad, count in zip(a.padding, taps, strict=True)]
    if a.x.shape[1] < least[0] or a.x.shape[2] < least[1]:
        expected = f"shape (B, T, F, C) with T >= {least[0]} and F >= {least[1]}, to fit the kernel"
        op.fail("x", expected, tuple(a.x.shape))


# --------------------------------------------------------------------------- the op
@op(
    "cpu triton",
    one_dtype="x weight bias",
    sizes={"P Q": _padding},
    forward="x weight bias *padding",
    backward="grad x weight *padding *needs",
    check=_padding_fits,
)
def depthwise_conv2d(
    x: Annotated[Tensor, "B T F C"],
    weight: Annotated[Tensor, "C 1 K L | C K L, K >= 1, L >= 1"],
    bias: Annotated[Tensor, "C"] | None = None,
    *,
    padding: tuple[int, int] = (0, 0),
) -> Annotated[Tensor, "B T+2*P-K+1 F+2*Q-L+1 C", "x"]:
    """Convolves every channel of the maps x with taps of its own, stride 1, zeros around x; channels last.

    Args:
        x: (B, T, F, C), contiguous best: ``map.permute(0, 2, 3, 1)`` of a map in channels_last order is. float32,
            bfloat16, float16 or float64.
        weight: (C, 1, K, L), that of a ``torch.nn.Conv2d`` with C groups, or (C, K, L); x's dtype, except under
            autocast, which casts as it does for ``torch.nn.functional.conv2d``.
        bias: (C,) or None.
        padding: (P, Q), zeros before and after the frames and the pixels of a frame; less than (K, L).
    Returns:
        (B, T + 2P − K + 1, F + 2Q − L + 1, C), x's dtype, computed in float32 or better and rounded once.
    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ outside autocast.
        ValueError: shapes or devices do not match; padding out of range; x, padded, is smaller than the kernel.
    """
    taps, channels = weight.shape[-2:], weight.shape[0]
    padded = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    frames, width = padded.shape[1] - taps[0] + 1, padded.shape[2] - taps[1] + 1
    if 0 in (x.shape[0], frames, width, channels):  # torch's convolution raises on these
        nothing = weight.reshape(channels, taps.numel()).sum(1)
        return padded[:, :frames, :width] + (nothing if bias is None else nothing + bias)
    kernel = weight.reshape(channels, 1, *taps).to(x.dtype)
    return F.conv2d(padded.permute(0, 3, 1, 2), kernel, bias, groups=channels).permute(0, 2, 3, 1)
