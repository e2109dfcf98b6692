# SPDX-License-Identifier: Apache-2.0
"""A depthwise convolution over time that looks ahead within chunks only.

    y = causal(x) + chunkwise(x) scale

causal has (K + 1) / 2 taps and sees the past; chunkwise has K centred taps and sees zeros outside the chunk. scale
depends on the position in the chunk of C frames: it is 1, plus left[pos] within K frames of the left edge, plus
right[K - C + pos] within K frames of the right edge.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class ChunkCausalDepthwiseConv1d(torch.nn.Module):
    """x (batch, channels, time) -> same shape. If chunk_size is below 0 or above the time, all frames are one chunk.

    Raises ValueError for an even kernel_size or a chunk_size of 0.
    """

    def __init__(
        self, channels: int, kernel_size: int, initial_scale: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__()
        if kernel_size % 2 != 1:
            raise ValueError(f"ChunkCausalDepthwiseConv1d: kernel_size must be odd, got {kernel_size}")
        self.causal_conv = torch.nn.Conv1d(channels, channels, (kernel_size + 1) // 2, groups=channels)
        self.chunkwise_conv = torch.nn.Conv1d(
            channels, channels, kernel_size, groups=channels, padding=kernel_size // 2, bias=bias
        )
        # Row 0 is added to a scale of 1 near the chunk's left edge, row 1 near its right edge.
        self.chunkwise_conv_scale = torch.nn.Parameter(torch.zeros(2, channels, kernel_size))
        self.kernel_size = kernel_size
        with torch.no_grad():
            self.causal_conv.weight.mul_(initial_scale)
            self.chunkwise_conv.weight.mul_(initial_scale)
            if bias and self.causal_conv.bias is not None:
                self.causal_conv.bias.uniform_(-0.1 * initial_scale, 0.1 * initial_scale)

    def forward(self, x: Tensor, chunk_size: int = -1) -> Tensor:
        if chunk_size == 0:
            raise ValueError("ChunkCausalDepthwiseConv1d: chunk_size must not be 0; below 0 is one chunk")
        batch, channels, frames = x.shape
        if chunk_size < 0 or chunk_size > frames:
            chunk_size = frames
        causal = self.causal_conv(F.pad(x, (self.kernel_size // 2, 0)))
        chunks = -(-frames // chunk_size)
        padded = F.pad(x, (0, chunks * chunk_size - frames))
        by_chunk = padded.reshape(batch, channels, chunks, chunk_size).transpose(1, 2).flatten(0, 1)
        y = self.chunkwise_conv(by_chunk) * self._get_chunk_scale(chunk_size)  # [B * chunks, C, chunk]
        y = y.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(2)
        return y[..., :frames] + causal

    def streaming_forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, channels, time), one chunk, cache (batch, channels, kernel_size // 2) of the frames before it ->
        output of x's shape, the cache for the next chunk.
        """
        left = self.kernel_size // 2
        if cache.shape[-1] != left:
            raise ValueError(
                f"ChunkCausalDepthwiseConv1d: cache must hold {left} frames, got {cache.shape[-1]}"
            )
        extended = torch.cat([cache, x], dim=2)
        chunkwise = self.chunkwise_conv(x) * self._get_chunk_scale(x.shape[2])
        return chunkwise + self.causal_conv(extended), extended[..., extended.shape[2] - left :]

    def _get_chunk_scale(self, chunk_size: int) -> Tensor:
        """Returns the scale (channels, chunk_size)."""
        left, right = self.chunkwise_conv_scale
        kernel_size = self.kernel_size
        if chunk_size < kernel_size:
            left, right = left[:, :chunk_size], right[:, kernel_size - chunk_size :]
        else:
            missing = chunk_size - kernel_size
            left, right = F.pad(left, (0, missing)), F.pad(right, (missing, 0))
        return 1.0 + (left + right)
