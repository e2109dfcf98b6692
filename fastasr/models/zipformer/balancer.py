# SPDX-License-Identifier: Apache-2.0
"""Balancer: keeps the mean and the size of each channel in a range, through the gradients.

The forward pass is the identity; ``fastasr.ops.balancer_gradient`` has the mathematics of the backward pass.
"""

import math
import random
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr import ops
from fastasr._recording import recording
from fastasr._transforms import Function
from fastasr.models.common.ragged import frames_of_nobody
from fastasr.models.zipformer.checkpointing import decided
from fastasr.models.zipformer.decisions import Numbers, changing
from fastasr.models.zipformer.schedules import FloatLike, ScheduledFloat
from fastasr.ops.balancer_gradient import Balanced, balance_, sums_of


class _Balance(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: Tensor | None, *limits: Any) -> Tensor:
        ctx.save_for_backward(x, hidden)
        ctx.limits = limits
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden = ctx.saved_tensors
        arguments: Any = grad, x, *ctx.limits, None, None, hidden
        y = ops.balancer_gradient(*arguments)
        return y, None, *([None] * len(ctx.limits))


def mean_limit(positive: float) -> float:
    """Returns mean / standard deviation of normal data of which the share ``positive`` is above 0. It uses a rough
    inverse of the error function, which is large but finite at 0 and 1.
    """
    x = 2 * positive - 1
    return 0.8139535143 * (math.log(1 + x + 1.0e-10) - math.log(1 - x + 1.0e-10)) / 2.0


def rms_limit(mean_abs: float) -> float:
    """Returns the root mean square of centred normal data whose mean absolute value is ``mean_abs``."""
    return 1.25331413732 * mean_abs  # sqrt(pi / 2)


class CutoffEstimator:
    """Tells whether a number is above the cutoff, which begins at 0 and follows the numbers so that a share ``p`` of
    those seen is above it.
    """

    def __init__(self, p: float) -> None:
        self.p = p
        self.count = 0
        self.count_above = 0
        self.cutoff = 0.0

    def __call__(self, x: float) -> bool:
        above = x > self.cutoff
        self.count += 1
        self.count_above += above
        excess = self.count_above / self.count - self.p
        if (excess > 0) == above:
            step = abs(excess)
            self.cutoff = x * step + self.cutoff * (1 - step)
        return above


# device -> (bytes of allocated memory, ids of the Balancers that this reading has served)
_READINGS: dict[torch.device, tuple[int, set[int]]] = {}


def memory_of_pass(balancer: "Balancer", device: torch.device) -> int:
    """Returns the bytes that were allocated on the device when the first Balancer of this pass asked: asking costs the
    host 10 to 30 us. A Balancer that asks again begins a new pass; one that the last pass left out may get its reading.
    """
    memory, served = _READINGS.get(device, (0, None))
    if served is None or id(balancer) in served:
        memory, served = _READINGS[device] = torch.cuda.memory_allocated(device), set()
    served.add(id(balancer))
    return memory


class Balancer(torch.nn.Module):
    """x -> x, any shape with ``num_channels`` elements along ``channel_dim``.

    A share ``prob`` of the calls that need gradients changes them so that in each channel the share of positive values
    stays within [min_positive, max_positive] and the mean absolute value within [min_abs, max_abs], both estimated for
    normal data. All of these are numbers or schedules; ``grad_scale`` is the size of the change relative to the
    gradient. Every call that needs gradients draws one number from Python's ``random``, and one per schedule that it
    reads. On CUDA the calls in the 5 % of the passes that began with the most allocated memory do nothing, and draw
    nothing (upstream asks in every call, for the memory of that moment).

    A call that changes gradients raises ValueError for another number of channels.
    """

    def __init__(
        self,
        num_channels: int,
        channel_dim: int,
        min_positive: FloatLike = 0.05,
        max_positive: FloatLike = 0.95,
        min_abs: FloatLike = 0.2,
        max_abs: FloatLike = 100.0,
        grad_scale: FloatLike = 0.04,
        prob: FloatLike | None = None,
    ) -> None:
        super().__init__()
        self.prob = ScheduledFloat((0.0, 0.5), (8000.0, 0.125), default=0.4) if prob is None else prob
        self.mem_cutoff = CutoffEstimator(0.05)
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self.min_positive = min_positive
        self.max_positive = max_positive
        self.min_abs = min_abs
        self.max_abs = max_abs
        self.grad_scale = grad_scale

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        recorded = recording()
        if recorded is not None:  # In a recorded call memory does not depend on the decision.
            numbers = recorded.numbers(lambda: _decided(self) or [0.0] * 6, 6)
            hidden, act = frames_of_nobody(x, self.channel_dim), numbers.values[:1]
            change = partial(_change, numbers, self.channel_dim, hidden)
            return changing(x, change, sums_of, lambda x: Balanced(x, self.channel_dim, act, hidden))
        if x.is_cuda and decided(lambda: self.mem_cutoff(memory_of_pass(self, x.device))):
            return x
        decision = _decided(self)
        if decision is None:
            return x
        if x.shape[self.channel_dim] != self.num_channels:
            raise ValueError(
                f"Balancer: x must have {self.num_channels} elements along dimension {self.channel_dim}, "
                f"got shape {tuple(x.shape)}"
            )
        return _balanced(x, frames_of_nobody(x, self.channel_dim), *decision[1:], self.channel_dim)


@torch.compiler.disable  # It cannot trace the backward pass, and compiling Function.apply raises an error.
def _balanced(*arguments: Any) -> Any:
    return _Balance.apply(*arguments)


def _change(
    numbers: Numbers, channel_dim: int, hidden: Tensor | None, grad: Tensor, x: Tensor, sums: Tensor | None
) -> None:
    """Changes the gradient in place by numbers from the host: whether the call acts, and its five limits."""
    balance_(grad, x, channel_dim, numbers.values[1:], numbers.values[:1], hidden, sums)


def _decided(self: "Balancer") -> tuple[bool, float, float, float, float, float] | None:
    """Draws whether this call changes gradients: returns True and the limits, or None."""
    probability = float(self.prob)
    if random.random() >= probability:
        return None
    return (
        True,
        mean_limit(float(self.min_positive)),
        mean_limit(float(self.max_positive)),
        rms_limit(float(self.min_abs)),
        rms_limit(float(self.max_abs)),
        float(self.grad_scale),
    )
