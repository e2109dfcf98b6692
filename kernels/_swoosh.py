# SPDX-License-Identifier: Apache-2.0
"""Swoosh and its derivative inside kernels, from z = x - a and u = exp(-|z|): see swoosh.py."""

import triton
import triton.language as tl

from fastasr.kernels._special import exp2, reciprocal


@triton.jit
def exp_minus_abs(x, RIGHT: tl.constexpr, SHORT: tl.constexpr):
    """Returns z = x - a and u = exp(-|z|).

    Unless SHORT, it adds back to first order what z and the exponent e lost in rounding, r = (x - a) - e ln 2: without
    this the error of u is three times that of torch's exp.
    """
    a: tl.constexpr = 1.0 if RIGHT else 4.0
    z = x - a
    e = tl.fma(x, 1.4426950408889634, -1.4426950408889634 * a)
    u = exp2(-tl.abs(e))
    if not SHORT:
        r = tl.fma(e, -0.6931471805599453, z) + (x - (z + a))
        u = tl.where(u > 1e-20, tl.fma(u, tl.where(z > 0.0, -r, r), u), u)  # r is nan for infinite x
    return z, u


@triton.jit
def swoosh(x, z, u, RIGHT: tl.constexpr, SHORT: tl.constexpr):
    """Returns swoosh(x). log1p(u) = u + u^2 Q(u), Q minimax on [0, 1], has an error of 3.3e-8, or 1e-5
    when SHORT.
    """
    if SHORT:
        q = tl.fma(u, -0.024734515696763992, 0.10359258204698563)
        q = tl.fma(u, q, -0.21240416169166565)
        q = tl.fma(u, q, 0.32622605562210083)
        q = tl.fma(u, q, -0.49953946471214294)
    else:
        q = tl.fma(u, 0.0053648208267986774, -0.030065778642892838)
        q = tl.fma(u, q, 0.0792045146226883)
        q = tl.fma(u, q, -0.13753800094127655)
        q = tl.fma(u, q, 0.191536545753479)
        q = tl.fma(u, q, -0.24857163429260254)
        q = tl.fma(u, q, 0.3332132399082184)
        q = tl.fma(u, q, -0.49999648332595825)
    log1p = tl.fma(u * u, q, u)
    # log1p - c comes first: both are small, so the sum is rounded once at its own scale, not at that of max(z, 0).
    return tl.fma(x, -0.08, tl.maximum(z, 0.0) + (log1p - (0.313261687 if RIGHT else 0.035)))


@triton.jit
def swoosh_slope(z, u, SHORT: tl.constexpr):
    """Returns swoosh'(x)."""
    return tl.fma(tl.where(z > 0.0, 1.0, u), reciprocal(1.0 + u, not SHORT), -0.08)
