# SPDX-License-Identifier: Apache-2.0
r"""Multi-head damped exponential moving average (Ma et al., "Mega", ICLR 2023, https://arxiv.org/abs/2209.10655).

    p = sigmoid(delta)    q = 1 - p sigmoid(alpha)
    h_n(t) = q_n h_n(t-1) + p_n beta_n x(t)
    y(t)   = act(sum_n gamma_n h_n(t) / sqrt(N) + omega x(t))

per channel, with N heads each. Every call computes the coefficients from the parameters, so they are never outdated.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastasr import ops
from fastasr.models.common.activations import Name as ActivationName
from fastasr.models.mega import activations

# A block's memory of a stream has tensors by name, or None where there is none yet.
State = dict[str, Any]


class MultiHeadDampedEMA(torch.nn.Module):
    """x (L, B, size) -> (y (L, B, size), state or None).

    mask (B, 1, L), True = padding: the average takes no input there (the residual omega x stays).
    state: a dict whose "ema_state" is the average so far: (B, size, num_heads), (size, num_heads) or None. With a
        state, the average after x is returned too and ``truncation_length`` does not apply; L may be any length.
    truncation_length: number of taps of the convolution that are kept.
    """

    def __init__(
        self,
        size: int,
        num_heads: int = 4,
        activation: torch.nn.Module | type[torch.nn.Module] = torch.nn.ReLU,
        truncation_length: int | None = None,
    ) -> None:
        super().__init__()
        self.damping_factor = torch.nn.Parameter(torch.empty(size, num_heads, 1))
        self.decay_factor = torch.nn.Parameter(torch.empty(size, num_heads, 1))
        self.ema_expansion_matrix = torch.nn.Parameter(torch.empty(size, num_heads, 1))
        self.kernel_projection_matrix = torch.nn.Parameter(torch.empty(size, num_heads))
        self.residual_weight = torch.nn.Parameter(torch.empty(size))
        self.scaling = math.sqrt(1.0 / num_heads)
        self.truncation_length = truncation_length
        self.activation = activations.instance(activation)
        self.num_heads = num_heads
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, val: float = 0.0, std1: float = 0.2, std2: float = 1.0) -> None:
        torch.nn.init.normal_(self.damping_factor, mean=val, std=std1)
        torch.nn.init.normal_(self.decay_factor, mean=val, std=std1)
        torch.nn.init.normal_(self.ema_expansion_matrix, mean=val, std=0.02)
        self.ema_expansion_matrix[:, 0::2] += 1.0  # heads of alternating sign
        self.ema_expansion_matrix[:, 1::2] -= 1.0
        torch.nn.init.normal_(self.kernel_projection_matrix, mean=val, std=std2)
        torch.nn.init.normal_(self.residual_weight, mean=val, std=std2)

    def compute_ema_coefficients(self) -> tuple[Tensor, Tensor]:
        """Returns (p, q), each (size, num_heads, 1)."""
        p = torch.sigmoid(self.damping_factor)
        return p, 1.0 - p * torch.sigmoid(self.decay_factor)

    get_ema_coefficients = compute_ema_coefficients

    def compute_ema_kernel(self, length: int) -> Tensor:
        """Returns the first ``length`` taps of the convolution, (size, length)."""
        p, q = self.compute_ema_coefficients()
        powers = q ** torch.arange(length, dtype=q.dtype, device=q.device)
        weight = (p * self.ema_expansion_matrix).squeeze(-1) * self.kernel_projection_matrix * self.scaling
        return torch.einsum("dnl,dn->dl", powers, weight)

    def ema_one_step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, size, 1) and the average so far -> (the average's output (1, B, size), the average)."""
        y, state = _scan(self, x.permute(2, 0, 1), None, _batched(self, state, x.shape[0]), None, "identity")
        return y, state

    def forward(
        self, x: Tensor, mask: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if x.ndim != 3 or x.shape[-1] != self.residual_weight.shape[0]:
            raise ValueError(
                f"MultiHeadDampedEMA: x: expected shape (L, B, {self.residual_weight.shape[0]}), got {tuple(x.shape)}"
            )
        name = activations.fused_name(self.activation)
        padding = None if mask is None else mask.squeeze(1)
        before = None if state is None else _batched(self, state["ema_state"], x.shape[1])
        y, after = _scan(self, x, padding, before, self.residual_weight, name or "identity")
        return (y if name is not None else self.activation(y)), (None if state is None else after)


def _scan(
    module: MultiHeadDampedEMA,
    x: Tensor,
    padding: Tensor | None,
    state: Tensor | None,
    residual: Tensor | None,
    activation: ActivationName,
) -> tuple[Tensor, Any]:
    """Returns (y, state after x); the state is None if none was given."""
    weights = (
        module.damping_factor,
        module.decay_factor,
        module.ema_expansion_matrix,
        module.kernel_projection_matrix,
    )
    if state is not None:
        return ops.ema_scan(
            x, *weights, residual, state=state, return_state=True, padding_mask=padding, activation=activation
        )
    y = ops.ema_scan(
        x,
        *weights,
        residual,
        padding_mask=padding,
        truncation=module.truncation_length,
        activation=activation,
    )
    return y, None


def _batched(module: MultiHeadDampedEMA, state: Tensor | None, batch: int) -> Tensor:
    """Returns the average so far, given in any accepted shape, as (B, size, num_heads)."""
    size, heads = module.kernel_projection_matrix.shape
    if state is None:
        return module.kernel_projection_matrix.new_zeros(batch, size, heads)
    if state.ndim == 2:
        state = state.unsqueeze(0)
    if state.shape[1:] != (size, heads) or state.shape[0] not in (1, batch):
        raise ValueError(
            f"MultiHeadDampedEMA: ema_state: expected shape ({batch}, {size}, {heads}), got {tuple(state.shape)}"
        )
    return state.expand(batch, size, heads)
