# SPDX-License-Identifier: Apache-2.0
"""Encodings of relative positions in few dimensions.

For an offset n, with D dimensions and c = sqrt(D):

    u  = c sign(n) (log(|n| + c) - log c)                   logarithmic far from 0, slope 1 at 0
    a  = atan(2 pi u / (length_factor D))                   in (-pi/2, pi/2)
    pe = cos(a), sin(a), cos(2a), sin(2a), ...              the last dimension is 1 instead

Near 0 the encodings of neighbouring offsets differ clearly; far away mainly the magnitude of the offset counts.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastasr.models.zipformer.dropout import Dropout2


class CompactRelPositionalEncoding(torch.nn.Module):
    """x (time, ...) -> (1, left_context_len + 2 time - 1, embed_dim), for offsets from
    -(left_context_len + time - 1) to time - 1, in x's dtype.

    ``pe`` holds the encodings up to the longest input so far, at first ``max_len`` frames. It is not part of the state
    dict. Raises ValueError for an odd embed_dim or a length_factor below 1.
    """

    def __init__(
        self, embed_dim: int, dropout_rate: float, max_len: int = 1000, length_factor: float = 1.0
    ) -> None:
        super().__init__()
        if embed_dim % 2 != 0:
            raise ValueError(f"CompactRelPositionalEncoding: embed_dim must be even, got {embed_dim}")
        if length_factor < 1.0:
            raise ValueError(
                f"CompactRelPositionalEncoding: length_factor must be at least 1, got {length_factor}"
            )
        self.embed_dim = embed_dim
        self.dropout = Dropout2(dropout_rate)
        self.pe: Any = None  # the table, a Tensor, after ``extend_pe``
        self.length_factor = length_factor
        self.extend_pe(torch.tensor(0.0).expand(max_len))

    def extend_pe(self, x: Tensor, left_context_len: int = 0) -> None:
        """Makes ``pe`` long enough for x (time, ...), in float32 and on x's device."""
        length = x.size(0) + left_context_len
        if self.pe is None or self.pe.is_meta or self.pe.size(0) < 2 * length - 1:
            with torch.inference_mode(False):  # a table of inference mode could not be used in training
                self.pe = self._encode(length, x.device)
        elif self.pe.device != x.device:
            self.pe = self.pe.to(x.device)

    def _encode(self, length: int, device: torch.device) -> Tensor:
        offset = torch.arange(1 - length, length, dtype=torch.float32, device=device).unsqueeze(1)
        harmonic = torch.arange(1, self.embed_dim // 2 + 1, dtype=torch.float32, device=device)
        c = self.embed_dim**0.5
        compressed = c * offset.sign() * ((offset.abs() + c).log() - math.log(c))
        angle = (compressed / (self.length_factor * self.embed_dim / (2.0 * math.pi))).atan() * harmonic
        pe = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)  # [2 length - 1, D]
        pe[:, -1] = 1.0
        return pe

    def forward(self, x: Tensor, left_context_len: int = 0) -> Tensor:
        self.extend_pe(x, left_context_len)
        zero = self.pe.size(0) // 2
        time = x.size(0)
        pos_emb = self.pe[zero - (time + left_context_len) + 1 : zero + time]
        return self.dropout(pos_emb.to(x.dtype).unsqueeze(0))
