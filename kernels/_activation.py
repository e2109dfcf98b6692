# SPDX-License-Identifier: Apache-2.0
"""Activations inside other kernels, by the numbers of fastasr/ops/_activation.py, and their derivatives.

PRECISE, which float32 tensors use, keeps the relative error within a few units in the last place, in the tails too.
Without it the kernels use the hardware's exponential and division, whose errors 16-bit results do not show.
"""

import triton
import triton.language as tl

from fastasr.kernels._special import exp2, reciprocal

IDENTITY, SILU, RELU, TANH, GELU = (tl.constexpr(number) for number in range(5))


@triton.jit
def exp_nonpositive(x, PRECISE: tl.constexpr):
    """Returns exp(x) for x <= 0. PRECISE computes 2^n exp(f), f = x - n ln 2 in [-0.35, 0.35], within 0.7 ulp, and 0
    below -87.
    """
    if not PRECISE:
        return exp2(x * 1.4426950408889634)
    n = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    f = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, x))
    p = tl.fma(f, 1.0 / 5040.0, 1.0 / 720.0)
    p = tl.fma(f, p, 1.0 / 120.0)
    p = tl.fma(f, p, 1.0 / 24.0)
    p = tl.fma(f, p, 1.0 / 6.0)
    p = tl.fma(f, p, 0.5)
    return tl.where(x < -87.0, 0.0, (1.0 + tl.fma(f * f, p, f)) * exp2(n))  # keeps a NaN


@triton.jit
def exp_difference(x, most, PRECISE: tl.constexpr):
    """Returns exp(x - most) for x <= most, a number of x's row. Without PRECISE, rounding multiplies all those of a row
    by one factor, at most 1 + 1e-7 |most|, which a softmax does not see.
    """
    if PRECISE:
        return exp_nonpositive(x - most, True)
    return exp2(tl.fma(x, 1.4426950408889634, -1.4426950408889634 * most))


@triton.jit
def sigmoid_pair(x, PRECISE: tl.constexpr):
    """Returns sigmoid(x) and sigmoid(-x); neither is computed as one minus the other, which would cancel."""
    if not PRECISE:
        # at most 2^100: larger numbers have no reciprocal
        e = exp2(tl.minimum(x * -1.4426950408889634, 100.0, propagate_nan=tl.PropagateNan.ALL))
        s = reciprocal(1.0 + e)
        return s, e * s
    e = exp_nonpositive(-tl.abs(x), PRECISE)
    larger = reciprocal(1.0 + e, PRECISE)
    smaller = e * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)


@triton.jit
def normal_pair(x, PRECISE: tl.constexpr):
    """Returns the normal distribution's cumulative function (relative error 3e-7 in either tail) and its
    density.
    """
    e = exp_nonpositive(-0.5 * x * x, PRECISE)
    u = reciprocal(tl.fma(tl.abs(x), 0.4, 1.0))
    p = tl.fma(u, -3.96011658e-2, 2.00602097e-1)  # the tail over e
    p = tl.fma(u, p, -3.73684850e-1)
    p = tl.fma(u, p, 2.50974918e-1)
    p = tl.fma(u, p, -1.23865632e-2)
    p = tl.fma(u, p, 1.58416807e-1)
    p = tl.fma(u, p, 1.55786572e-1)
    p = tl.fma(u, p, 1.59904189e-1)
    p = tl.fma(u, p, -1.19876988e-5)
    tail = e * p
    return tl.where(x < 0.0, tail, 1.0 - tail), e * 0.398942280


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr, PRECISE: tl.constexpr):
    """Returns act(x) and act'(x); the compiler drops the one that the caller does not use."""
    if ACTIVATION == SILU and not PRECISE:
        # 0 far out, where a gate may multiply the slope by 1e30
        s = reciprocal(1.0 + exp2(x * -1.4426950408889634))
        return x * s, s * tl.fma(x, 1.0 - s, 1.0)
    if ACTIVATION == SILU:
        e = exp_nonpositive(-tl.abs(x), PRECISE)
        larger = reciprocal(1.0 + e, PRECISE)
        smaller = e * larger
        s = tl.where(x < 0.0, smaller, larger)
        r = tl.where(x < 0.0, larger, smaller)
        return tl.where(x < 0.0, x * e, x) * larger, s * tl.fma(x, r, 1.0)
    if ACTIVATION == RELU:
        return tl.where(x < 0.0, 0.0, x), tl.where(x > 0.0, 1.0, 0.0)  # keeps a NaN
    if ACTIVATION == TANH:
        e = exp_nonpositive(-2.0 * tl.abs(x), PRECISE)
        larger = reciprocal(1.0 + e, PRECISE)
        u = x * x
        p = tl.fma(u, -3.58452002e-4, 2.30136467e-3)  # (tanh(x) - x) / x^3 below 1
        p = tl.fma(u, p, -7.94610661e-3)
        p = tl.fma(u, p, 2.14866567e-2)
        p = tl.fma(u, p, -5.38798012e-2)
        p = tl.fma(u, p, 1.33323446e-1)
        p = tl.fma(u, p, -3.33332956e-1)
        large = tl.fma(-2.0 * e, larger, 1.0)
        y = tl.where(u < 1.0, tl.fma(x * u, p, x), tl.where(x < 0.0, -large, large))
        return y, tl.where(u < 0.7, tl.fma(-y, y, 1.0), 4.0 * e * larger * larger)  # where 1 - y^2 cancels
    if ACTIVATION == GELU:
        cumulative, density = normal_pair(x, PRECISE)
        return x * cumulative, tl.fma(x, density, cumulative)
    return x, tl.full(x.shape, 1.0, tl.float32)
