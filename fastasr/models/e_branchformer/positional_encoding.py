# SPDX-License-Identifier: Apache-2.0
"""Sinusoidal encodings of relative positions, and the scaling of the input beside them."""

import math

import torch


class RelPositionalEncoding(torch.nn.Module):
    """x (B, T, d_model) -> (dropout(x √d_model), dropout(sinusoids (1, 2T − 1, d_model))).

    Row T − 1 + o belongs to the keys o frames after the query: sin and cos of −o times each frequency, interleaved.
    """

    def __init__(self, d_model, dropout_rate, max_len=5000):
        super().__init__()
        self.d_model = d_model
        self.xscale = math.sqrt(d_model)
        self.dropout = torch.nn.Dropout(p=dropout_rate)
        self.pe = None
        self.extend_pe(torch.tensor(0.0).expand(1, max_len))

    def extend_pe(self, x):
        """Computes the table for x (B, T, ...) unless it is long enough already."""
        if self.pe is not None and self.pe.shape[1] >= 2 * x.shape[1] - 1:
            if self.pe.dtype != x.dtype or self.pe.device != x.device:
                self.pe = self.pe.to(dtype=x.dtype, device=x.device)
            return
        self.pe = relative_sinusoids(x.shape[1], self.d_model).to(device=x.device, dtype=x.dtype)

    def forward(self, x):
        self.extend_pe(x)
        middle, frames = self.pe.shape[1] // 2, x.shape[1]
        return self.dropout(x * self.xscale), self.dropout(self.pe[:, middle - frames + 1 : middle + frames])


def relative_sinusoids(frames: int, width: int) -> torch.Tensor:
    """Returns (1, 2 frames − 1, width), float32; rows run from query − key = frames − 1 down to −(frames − 1)."""
    distance = torch.arange(frames - 1, -frames, -1, dtype=torch.float32).unsqueeze(1)
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width))
    table = torch.empty(1, 2 * frames - 1, width)
    table[0, :, 0::2] = torch.sin(distance * rates)
    table[0, :, 1::2] = torch.cos(distance * rates)
    return table
