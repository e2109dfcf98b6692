# SPDX-License-Identifier: Apache-2.0
r"""Relative-position biases of attention: b[i, j] depends on the offset j - i only, a Toeplitz matrix.

``simple``: one learned value per offset. ``rotary``: with R(m) the rotation of channel pairs (c, c + size/2) by the
angles m theta_c, theta_c = 10000^(-c / (size/2)),

    b[i, j] = R(i) alpha . R(j) beta
            = sum_c (a1 b1 + a2 b2)_c cos((j - i) theta_c) - (a1 b2 - a2 b1)_c sin((j - i) theta_c)

where 1 and 2 are the halves of alpha and beta. So 2L - 1 values define the bias of L positions; attention takes them.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastasr._tables import kept
from fastasr.models.common.plain import is_plain_named


def matrix(values: Tensor, rows: int | None = None) -> Tensor:
    """Expands values by offset, (2L-1,), to the matrix (L, L) whose row i holds the offsets -i .. L-1-i, or to its last
    ``rows``."""
    length = (values.shape[0] + 1) // 2
    wide = torch.promote_types(values.dtype, torch.float32)  # in which the gradient adds up its rows
    return values.to(wide).unfold(0, length, 1)[:rows].flip(0).to(values.dtype)


class RelativePositionBias(torch.nn.Module):
    """One learned value for each of the 2 max_positions - 1 offsets.

    Raises ValueError for a length beyond max_positions.
    """

    def __init__(self, max_positions: int) -> None:
        super().__init__()
        self.max_positions = max_positions
        self.relative_position_bias = torch.nn.Parameter(torch.empty(2 * max_positions - 1))
        self.reset_parameters()

    def reset_parameters(self, val: float = 0.0, std: float = 0.02) -> None:
        torch.nn.init.normal_(self.relative_position_bias, mean=val, std=std)

    def forward(self, length: int) -> Tensor:
        """Returns the bias of ``length`` positions, (length, length)."""
        return matrix(relative(self, length))


class RotaryRelativePositionBias(torch.nn.Module):
    """The bias of two learned, rotated vectors. ``size`` must be even; the length is not limited.

    The buffer ``_pe`` carries no information and exists because checkpoints have it.
    """

    def __init__(self, size: int, max_positions: int = 2048) -> None:
        super().__init__()
        if size % 2:
            raise ValueError(f"RotaryRelativePositionBias: size: expected an even number, got {size}")
        self.alpha = torch.nn.Parameter(torch.empty(1, size))
        self.beta = torch.nn.Parameter(torch.empty(1, size))
        self.register_buffer("_pe", torch.zeros(1, dtype=torch.float32))
        self.size, self.max_positions = size, max_positions
        self.reset_parameters()

    def reset_parameters(self, val: float = 0.0, std: float = 0.02) -> None:
        torch.nn.init.normal_(self.alpha, mean=val, std=std)
        torch.nn.init.normal_(self.beta, mean=val, std=std)

    @staticmethod
    def get_sinusoid_embeddings(max_positions: int, size: int) -> tuple[Tensor, Tensor]:
        """Returns (sine, cosine) of position times angle, each (max_positions, size // 2), in float32."""
        angles = _angles(torch.arange(max_positions, dtype=torch.float64, device="cpu"), size // 2)
        return angles.sin().float(), angles.cos().float()

    def rotary(self, x: Tensor) -> Tensor:
        """Rotates row m of x (length, size) by R(m)."""
        length, size = x.shape
        table = _table(_bucket(length), size // 2, x.dtype, x.device)
        centre = (table.shape[0] - 1) // 2
        cosine, sine = table[centre : centre + length].chunk(2, dim=-1)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=1)

    def forward(self, length: int) -> Tensor:
        """Returns the bias of ``length`` positions, (length, length)."""
        return matrix(relative(self, length))


def is_plain(bias: torch.nn.Module, owner: torch.nn.Module) -> bool:
    """Says whether the values of this bias can be read by offset: it is of a class here or of ESPnet's of the same
    name. Others must be called.
    """
    return is_plain_named(bias, ("RelativePositionBias", "RotaryRelativePositionBias"), owner)


def relative(bias: Any, length: int) -> Tensor:
    """Returns the values of a bias that is plain by offset -(length-1) .. length-1, (2 length - 1,): a view of a simple
    bias's parameter."""
    if hasattr(bias, "relative_position_bias"):
        if length > bias.max_positions:
            raise ValueError(
                f"RelativePositionBias: length: expected at most {bias.max_positions} (max_positions), got {length}"
            )
        centre = bias.max_positions - 1
        return bias.relative_position_bias[centre - length + 1 : centre + length]
    return _rotary(bias.alpha, bias.beta, length)


def _rotary(alpha: Tensor, beta: Tensor, length: int) -> Tensor:
    a1, a2 = alpha[0].chunk(2)
    b1, b2 = beta[0].chunk(2)
    weights = torch.cat((a1 * b1 + a2 * b2, a2 * b1 - a1 * b2))
    table = _table(_bucket(length), a1.shape[0], alpha.dtype, alpha.device)
    centre = (table.shape[0] - 1) // 2
    return torch.mv(table[centre - length + 1 : centre + length], weights)


def _bucket(length: int) -> int:
    """Rounds up to a power of two, so that growing lengths need few tables."""
    return max(64, 1 << (length - 1).bit_length())


def _angles(positions: Tensor, half: int) -> Tensor:
    theta = torch.exp(
        torch.arange(half, dtype=torch.float64, device=positions.device) * (-math.log(1e4) / half)
    )
    return positions.unsqueeze(1) * theta


@kept(16)
def _table(length: int, half: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns [cos | sin] of offset times angle, (2 length - 1, 2 half), one row per offset -(length-1) .. length-1."""
    with torch.inference_mode(False), torch.no_grad():
        angles = _angles(torch.arange(1 - length, length, dtype=torch.float64, device=device), half)
        return torch.cat((angles.cos(), angles.sin()), dim=1).to(dtype)
