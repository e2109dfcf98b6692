# SPDX-License-Identifier: Apache-2.0
"""Sinusoidal encodings of relative positions, and the scaling of the input beside them."""

import math
from typing import Any

import torch
from torch import Tensor


class RelPositionalEncoding(torch.nn.Module):
    """x (B, T, d_model) -> (dropout(x √d_model), dropout(sinusoids (1, 2T − 1, d_model))).

    Row T − 1 + o belongs to the keys o frames after the query: sin and cos of −o times each frequency, interleaved.
    """

    def __init__(self, d_model: int, dropout_rate: float, max_len: int = 5000) -> None:
        super().__init__()
        self.d_model = d_model
        self.xscale = math.sqrt(d_model)
        self.dropout = torch.nn.Dropout(p=dropout_rate)
        self.pe: Any = None  # the table, a Tensor, after ``extend_pe``
        self.extend_pe(torch.tensor(0.0).expand(1, max_len))

    def extend_pe(self, x: Tensor) -> None:
        """Computes the table for x (B, T, ...) unless there is one that is long enough, of x's dtype and device."""
        frames = x.shape[1]
        if self.pe is not None and self.pe.shape[1] >= 2 * frames - 1:
            if self.pe.dtype == x.dtype and self.pe.device == x.device:
                return
            # A table of fewer bits cannot become one of more, and one on the meta device has no values.
            frames = (self.pe.shape[1] + 1) // 2
        with torch.inference_mode(False):  # a table of inference mode could not be used in training
            self.pe = relative_sinusoids(frames, self.d_model).to(device=x.device, dtype=x.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.extend_pe(x)
        middle, frames = self.pe.shape[1] // 2, x.shape[1]
        return self.dropout(x * self.xscale), self.dropout(self.pe[:, middle - frames + 1 : middle + frames])


def relative_sinusoids(frames: int, width: int) -> Tensor:
    """Returns (1, 2 frames − 1, width), float32; rows run from query − key = frames − 1 down to −(frames − 1)."""
    distance = torch.arange(frames - 1, -frames, -1, dtype=torch.float32, device="cpu").unsqueeze(1)
    rates = torch.exp(
        torch.arange(0, width, 2, dtype=torch.float32, device="cpu") * -(math.log(10000.0) / width)
    )
    table = torch.empty(1, 2 * frames - 1, width, dtype=torch.float32, device="cpu")
    table[0, :, 0::2] = torch.sin(distance * rates)
    table[0, :, 1::2] = torch.cos(distance * rates)
    return table
