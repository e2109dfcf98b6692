# SPDX-License-Identifier: Apache-2.0
"""The linear recurrence h(t) = q h(t−1) + b x(t) in eager PyTorch, over whole tensors: its sums Σ c h, and its windows.

x is (B, D, L); q, b and c are (D, N), b real, q and c real or complex. A complex q is a :class:`Polar`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16


@dataclass(frozen=True)
class Polar:
    """Complex numbers by radius and angle: their powers are exact at radius 0 and 1."""

    radius: Tensor
    angle: Tensor

    def __pow__(self, exponent: float | Tensor) -> Tensor:
        radius, angle = self.radius**exponent, self.angle * exponent
        # torch.polar has no gradient at radius 0
        return torch.complex(radius * torch.cos(angle), radius * torch.sin(angle))

    def __getitem__(self, rows: slice) -> "Polar":
        return Polar(self.radius[rows], self.angle[rows])

    def unsqueeze(self, dim: int) -> "Polar":
        return Polar(self.radius.unsqueeze(dim), self.angle.unsqueeze(dim))


def real(t: Tensor) -> Tensor:
    """Returns the real part."""
    return t.real if t.is_complex() else t


def _plus_real(t: Tensor, summand: Tensor) -> Tensor:
    """Returns t plus the real ``summand``. torch multiplies a real summand by a complex 1, which turns infinities into
    NaN.
    """
    return torch.complex(t.real + summand, t.imag) if t.is_complex() else t + summand


def convolution(
    x: Tensor, q: Tensor, b: Tensor, c: Tensor, state: Tensor | None, need_state: bool
) -> tuple[Tensor, Tensor]:
    """Returns (Re Σ c h of x (B, D, L), the last h (B, D, N)) in about 16 + log L steps over whole tensors: a direct
    convolution inside chunks of 16, then a scan by doubling between them. The powers of q are not computed as exp(j log
    q), because q may be 0.
    """
    batch, channels, length = x.shape
    chunks = max(1, (length + CHUNK - 1) // CHUNK)
    blocks = F.pad(x, (0, chunks * CHUNK - length)).reshape(batch, channels, chunks, CHUNK)
    powers = q.unsqueeze(-1) ** torch.arange(CHUNK + 1, device=x.device, dtype=x.dtype)  # (D, N, 17)
    states = powers.shape[1]
    before = powers.new_zeros(batch, channels, 1, states) if state is None else state.unsqueeze(2)

    taps = real(((b * c).unsqueeze(-1) * powers[..., :CHUNK]).sum(1))  # (D, 16)
    padded = F.pad(blocks, (CHUNK - 1, 0))
    y = taps[:, 0, None, None] * blocks
    for j in range(1, CHUNK):
        y = y + taps[:, j, None, None] * padded[..., CHUNK - 1 - j : 2 * CHUNK - 1 - j]

    expanded = b.unsqueeze(-1) * powers[..., :CHUNK]
    ends = blocks[..., CHUNK - 1, None] * expanded[:, None, :, 0]  # (B, D, chunks, N): h from the chunk alone
    for j in range(1, CHUNK):
        ends = ends + blocks[..., CHUNK - 1 - j, None] * expanded[:, None, :, j]
    carry = torch.cat([before, ends[:, :, :-1]], 2)  # h before each chunk, once those before it are added
    step = 1
    while step < chunks:
        earlier = F.pad(carry[:, :, :-step], (0, 0, step, 0))
        carry = carry + earlier * (q ** float(CHUNK * step)).unsqueeze(1)
        step *= 2
    decayed = c.unsqueeze(-1) * powers[..., 1:]
    y = y + torch.stack([real((carry * decayed[:, None, :, i]).sum(-1)) for i in range(CHUNK)], -1)

    y = y.reshape(batch, channels, chunks * CHUNK)[..., :length]
    if not need_state or length == 0:
        # adding 0 times the powers gives unused parameters zero gradients instead of None
        return y, before.squeeze(2) + powers[:0].sum()
    rest = length - (chunks - 1) * CHUNK
    last = q**rest * carry[:, :, -1]
    # The input of the last step is not multiplied by q^0: an infinity times a complex 1 is NaN in the imaginary part.
    newest, earlier = blocks[:, :, -1, rest - 1, None] * b, blocks[:, :, -1, None, : rest - 1]
    tail = b.unsqueeze(-1) * powers[..., 1:rest].flip(-1)
    return y, _plus_real(last + (earlier * tail).sum(-1), newest)


def window(inputs: Tensor, q: Tensor, taps: int) -> Tensor:
    """Returns Σ_{j<taps} q^j inputs(t−j) of (B, D, N, L), by doubling, so that no tap has to be subtracted again."""

    def late(h: Tensor, power: Tensor, steps: int) -> Tensor:
        return power.unsqueeze(-1) * F.pad(h, (steps, -steps))

    # It takes only powers of two of q, whose angles are exact; the angle of q^36 would be rounded before its cosine.
    total, counted, shift = 0.0 * (q**1.0).unsqueeze(-1), 0, q**0.0
    block, size = inputs, 1  # the sum of `size` taps
    while True:
        power = q ** float(size)
        if taps & size:
            total = total + (late(block, shift, counted) if counted else block)
            shift = power if counted == 0 else shift * power
            counted += size
        if 2 * size > taps:
            return total
        block = block + late(block, power, size)
        size *= 2
