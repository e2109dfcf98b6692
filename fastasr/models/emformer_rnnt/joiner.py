# SPDX-License-Identifier: Apache-2.0
"""The joint network: logits = W act(source + target) + b, for every frame and every position."""

from torch import Tensor, nn

from fastasr.models.common import plumbing

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Joiner(nn.Module):
    """Source encodings (B, T, D) and target encodings (B, U, D) to logits (B, T, U, output_dim).

    ``RNNT.loss`` computes the loss without storing these logits.

    Raises:
        ValueError: activation is neither "relu" nor "tanh".
    """

    def __init__(self, input_dim: int, output_dim: int, activation: str = "relu") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"Joiner: activation: expected 'relu' or 'tanh', got {activation!r}")
        self.linear = nn.Linear(input_dim, output_dim, bias=True)
        self.activation = _ACTIVATIONS[activation]()

    def forward(
        self,
        source_encodings: Tensor,
        source_lengths: Tensor,
        target_encodings: Tensor,
        target_lengths: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the logits and both lengths unchanged."""
        joined = self.activation(source_encodings.unsqueeze(2) + target_encodings.unsqueeze(1))
        return plumbing.linear(self.linear, joined), source_lengths, target_lengths
