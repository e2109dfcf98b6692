# SPDX-License-Identifier: Apache-2.0
"""Sinusoids of the absolute position, added to scaled embeddings.

    y[t] = dropout(sqrt(d) x[t] + pe[t]),   pe[t, 2i] = sin(t / 10000^(2i / d)), pe[t, 2i + 1] = cos(same)

Vaswani et al., "Attention is all you need" (2017).
"""

import math
from typing import Any

import torch
from torch import Tensor


class PositionalEncoding(torch.nn.Module):
    """x (batch, time, d_model) -> same shape. The table starts with ``max_len`` positions and grows if x is longer."""

    def __init__(self, d_model: int, dropout_rate: float, max_len: int = 5000) -> None:
        super().__init__()
        self.d_model = d_model
        self.xscale = math.sqrt(d_model)
        self.dropout = torch.nn.Dropout(p=dropout_rate)
        self.pe: Any = None  # not a buffer, because upstream's state dicts do not have it
        self.extend_pe(torch.zeros(()).expand(1, max_len))

    def extend_pe(self, x: Tensor) -> None:
        """Makes ``pe`` (1, length, d_model) with the dtype and device of x and at least x's length."""
        frames = x.shape[1]
        if self.pe is not None and self.pe.shape[1] >= frames:
            if self.pe.dtype == x.dtype and self.pe.device == x.device:
                return
            # A table of fewer bits cannot become one of more, and a table on the meta device has no values.
            frames = self.pe.shape[1]
        with torch.inference_mode(False):  # a table of inference mode could not be used in training
            self.pe = self._sinusoids(frames).to(device=x.device, dtype=x.dtype)

    def _sinusoids(self, frames: int) -> Tensor:
        """Returns (1, frames, d_model), float32."""
        even = torch.arange(0, self.d_model, 2, dtype=torch.float32, device="cpu")
        angles = torch.arange(frames, dtype=torch.float32, device="cpu").unsqueeze(1) * torch.exp(
            even * -(math.log(10000.0) / self.d_model)
        )
        pe = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, : self.d_model]
        return pe.unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        self.extend_pe(x)
        return self.dropout(x * self.xscale + self.pe[:, : x.shape[1]])
