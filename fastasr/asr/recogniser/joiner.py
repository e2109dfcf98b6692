# SPDX-License-Identifier: Apache-2.0
"""The transducer's joiner: logits of the next token, or blank, from a frame and a context."""

import torch
from torch import Tensor

from fastasr.models.zipformer.initial_scale import ScaledLinear


class Joiner(torch.nn.Module):
    """logits = output_linear(tanh(encoder_proj(encoder_out) + decoder_proj(decoder_out)))

    encoder_out (..., encoder_dim) and decoder_out (..., decoder_dim) have the same number of dimensions and broadcast.
    With ``project_input=False`` both must be projected already.
    """

    def __init__(self, encoder_dim: int, decoder_dim: int, joiner_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder_proj = ScaledLinear(encoder_dim, joiner_dim, initial_scale=0.25)
        self.decoder_proj = ScaledLinear(decoder_dim, joiner_dim, initial_scale=0.25)
        self.output_linear = torch.nn.Linear(joiner_dim, vocab_size)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True) -> Tensor:
        if encoder_out.ndim != decoder_out.ndim:
            raise ValueError(
                f"Joiner: encoder_out and decoder_out must have as many dimensions, got shapes "
                f"{tuple(encoder_out.shape)} and {tuple(decoder_out.shape)}"
            )
        if project_input:
            encoder_out, decoder_out = self.encoder_proj(encoder_out), self.decoder_proj(decoder_out)
        return self.output_linear(torch.tanh(encoder_out + decoder_out))
