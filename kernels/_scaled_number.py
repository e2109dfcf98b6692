# SPDX-License-Identifier: Apache-2.0
"""Positive numbers as m 2^e, with 1 <= m < 2 once normalised and e a whole number in float32.

Sums of probabilities in this form neither underflow nor round as logarithms do. An impossible number has e below
``NEVER``.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2.0**80))  # log probabilities below count as -inf
IMPOSSIBLE = tl.constexpr(-(2.0**100))
NEVER = tl.constexpr(-(2.0**99))
FLOOR = tl.constexpr(-(2.0**101))


@triton.jit
def split(x):
    """Returns (m, e) of exp(x), m in [0.7, 1.42]. Beyond 2^22 e is rounded as x itself is, and the rest
    is kept small.
    """
    x = tl.where(x < LEAST, IMPOSSIBLE, x)
    e = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    r = tl.fma(e, 2.12194440e-4, tl.fma(e, -0.693359375, x))
    r = tl.minimum(tl.maximum(r, -1.0), 1.0)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    return tl.fma(p, r * r, r + 1.0), e


@triton.jit
def power_of_two(d):
    """Returns 2^d for d <= 0, or 0 where 2^d is no normal number."""
    n = (tl.maximum(d, -127.0) + 127.0).to(tl.int32)
    return (n << 23).to(tl.float32, bitcast=True)


@triton.jit
def normalised(m, e):
    bits = m.to(tl.int32, bitcast=True)
    e = tl.maximum(e + ((bits >> 23) - 127).to(tl.float32), FLOOR)
    return ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True), e


@triton.jit
def add(am, ae, bm, be):
    """Returns a + b, not normalised."""
    e = tl.maximum(ae, be)
    return tl.fma(am, power_of_two(ae - e), bm * power_of_two(be - e)), e


@triton.jit
def ratio(am, ae, bm, be):
    """Returns a / b where a <= b."""
    return tl.div_rn(am * power_of_two(tl.minimum(ae - be, 0.0)), bm)


@triton.jit
def logarithm(m, e):
    """Returns the logarithm of normalised numbers, -inf where they are impossible. ln 2 is added in two
    parts.
    """
    score = tl.fma(e, 0.6931471824645996, tl.fma(e, -1.904654323148236e-09, tl.log(m)))
    return tl.where(e < NEVER, float("-inf"), score)


@triton.jit
def compose(am, ae, bm, be, cm, ce, dm, de):
    """Composes maps p -> (p a + b) c + d, for scans of p[t] = p[t-1] a[t] + b[t]."""
    pm, pe = normalised(am * cm, ae + ce)
    qm, qe = add(bm * cm, be + ce, dm, de)
    qm, qe = normalised(qm, qe)
    return pm, pe, qm, qe


@triton.jit
def compose_plain(a, b, c, d):
    """Does the same as ``compose`` on plain numbers."""
    return a * c, tl.fma(b, c, d)
