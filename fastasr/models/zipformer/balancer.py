# SPDX-License-Identifier: Apache-2.0
"""Balancer: keeps the mean and the size of each channel in a range, through the gradients.

The forward pass is the identity. Per channel of x, over its N elements,

    u = mean(x^2)   mu = mean(x)   s = sqrt(u - mu^2)   r = sqrt(u)   m = mu / s
    loss = |m - clamp(m, m_min, m_max)| + |log(clamp(r, r_min, r_max) / r)|

and the gradient g of x becomes g + |g| l with l = d loss / dx scaled to root mean square ``grad_scale``. The first
term is active for m outside its range, with the sign e of the excess, the second for r outside its own, with sign f:

    d loss / dx = e (1 - m (x - mu) / s) / (N s)  +  f x / (N r^2)  =  p + q (x - mu)
    p = (e / s + f mu / r^2) / N        q = (f / r^2 - e m / s^2) / N        mean square = p^2 + q^2 s^2

So the backward pass is one reduction over x and one elementwise pass over x and g.
"""

import math
import random

import torch

from fastasr.models.zipformer.schedules import ScheduledFloat

_FLOOR = 1.0e-20  # of u - mu^2, u, and the root mean square of d loss / dx


def balancer_gradient(grad, x, min_mean, max_mean, min_rms, max_rms, grad_scale, channel_dim):
    """The new gradient, in the dtype of ``grad``; computed in float32 or better, without synchronisation."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x, g = x.detach().to(compute), grad.to(compute)
    dims = [i for i in range(x.ndim) if i != channel_dim % x.ndim]
    mu = x.mean(dims, keepdim=True)
    square = (x * x).mean(dims, keepdim=True)
    centred = square - mu * mu
    variance, power = centred.clamp(min=_FLOOR), square.clamp(min=_FLOOR)
    s, r = variance.sqrt(), power.sqrt()
    m = mu / s

    e = (m - m.clamp(min_mean, max_mean)).sign()
    f = (r - r.clamp(min_rms, max_rms)).sign()
    # Below the floors the statistics are constants.
    e_slope, f = e * (centred >= _FLOOR), f * (square >= _FLOOR)
    p = e / s + f * mu / power
    q = f / power - e_slope * m / variance
    count = x.numel() // max(1, mu.numel())
    rms = (p * p + q * q * centred.clamp(min=0)).sqrt() / count
    scale = grad_scale / rms.clamp(min=_FLOOR) / count
    p, q = (p - q * mu) * scale, q * scale
    return torch.addcmul(g, g.abs(), torch.addcmul(p, q, x)).to(grad.dtype)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *limits):
        ctx.save_for_backward(x)
        ctx.limits = limits
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return balancer_gradient(grad, x, *ctx.limits), *([None] * len(ctx.limits))


def mean_limit(positive):
    """The mean over standard deviation of normal data of which the share ``positive`` is above 0: a rough
    inverse of the error function, large but finite at 0 and 1.
    """
    x = 2 * positive - 1
    return 0.8139535143 * (math.log(1 + x + 1.0e-10) - math.log(1 - x + 1.0e-10)) / 2.0


def rms_limit(mean_abs):
    """The root mean square of centred normal data whose mean absolute value is ``mean_abs``."""
    return 1.25331413732 * mean_abs  # sqrt(pi / 2)


class CutoffEstimator:
    """Tells whether a number is among the largest; a share ``p`` of them is, on average."""

    def __init__(self, p):
        self.p = p
        self.count = 0
        self.count_above = 0
        self.cutoff = 0

    def __call__(self, x):
        above = x > self.cutoff
        self.count += 1
        self.count_above += above
        excess = self.count_above / self.count - self.p
        if (excess > 0) == above:
            step = abs(excess)
            self.cutoff = x * step + self.cutoff * (1 - step)
        return above


class Balancer(torch.nn.Module):
    """x -> x, any shape with ``num_channels`` elements along ``channel_dim``.

    On a share ``prob`` of the calls that need gradients, these are changed so that in each channel the share
    of positive values stays within [min_positive, max_positive] and the mean absolute value within [min_abs,
    max_abs], both as of normal data. All are numbers or schedules; ``grad_scale`` is the size of the change
    relative to the gradient. One number is drawn from Python's ``random`` per call that needs gradients, and
    one per schedule read. On CUDA the calls at the 5 % highest amounts of allocated memory do nothing.

    Raises ValueError for another number of channels, on the calls that change gradients.
    """

    def __init__(
        self,
        num_channels,
        channel_dim,
        min_positive=0.05,
        max_positive=0.95,
        min_abs=0.2,
        max_abs=100.0,
        grad_scale=0.04,
        prob=None,
    ):
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

    def forward(self, x):
        if not x.requires_grad or (x.is_cuda and self.mem_cutoff(torch.cuda.memory_allocated())):
            return x
        probability = float(self.prob)
        if random.random() >= probability:
            return x
        limits = (
            mean_limit(float(self.min_positive)),
            mean_limit(float(self.max_positive)),
            rms_limit(float(self.min_abs)),
            rms_limit(float(self.max_abs)),
            float(self.grad_scale),
        )
        if x.shape[self.channel_dim] != self.num_channels:
            raise ValueError(
                f"Balancer: x must have {self.num_channels} elements along dimension {self.channel_dim}, "
                f"got shape {tuple(x.shape)}"
            )
        return _Balance.apply(x, *limits, self.channel_dim)
