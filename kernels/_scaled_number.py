# SPDX-License-Identifier: Apache-2.0
"""Positive numbers as m 2^e, e a whole number in float32; once normalised 1 <= m < 2.

Sums of probabilities in this form neither underflow nor round as logarithms do. An impossible number has e below
``NEVER``. Whole numbers pass between float32 and bits by additions: a conversion takes five times as long, and the
sums of a lattice wait for each other.
"""

import triton
import triton.language as tl

from fastasr.kernels._special import reciprocal

NEVER = tl.constexpr(-1.4426950408889634 * 2.0**80)  # log probabilities below -2^80 count as -inf
IMPOSSIBLE = tl.constexpr(-(2.0**100))  # stands for -inf: more than 2^26 of them can be added
FLOOR = tl.constexpr(-(2.0**101))
WHOLE = tl.constexpr(
    2.0**23
)  # From here to its double, float32 has whole numbers, whose low bits count them.
WHOLE_BITS = tl.constexpr(0x4B000000)
ONE = tl.constexpr(127.0 + 2.0**23)  # what stands for the exponent of 1


@triton.jit
def split(x):
    """Returns (m, e) of exp(x), m in [0.7, 1.42]. Beyond 2^22 e is rounded as x itself is, and the rest
    is kept small.
    """
    x = tl.maximum(x, IMPOSSIBLE)
    e = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    r = tl.fma(e, 2.12194440e-4, tl.fma(e, -0.693359375, x))
    r = tl.minimum(tl.maximum(r, -1.0), 1.0)
    p = tl.fma(r, 1.3814162835e-3, 8.3689272005e-3)  # (exp(r) - 1 - r) / r^2, within 3e-9 of exp(r)
    p = tl.fma(p, r, 4.1668408503e-2)
    p = tl.fma(p, r, 1.6666518894e-1)
    p = tl.fma(p, r, 4.9999993330e-1)
    return tl.fma(p, r * r, r + 1.0), e


@triton.jit
def _with_exponent(n):
    """Returns the number whose exponent's bits are n - WHOLE, or 0 if that is below 0."""
    return (tl.maximum(n, WHOLE).to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(d):
    """Returns 2^d for d <= 1, or 0 where 2^d is no normal number."""
    return _with_exponent(d + ONE)


@triton.jit
def normalised(m, e):
    bits = m.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) + WHOLE_BITS).to(tl.float32, bitcast=True) - ONE
    return ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True), e + exponent


@triton.jit
def add(am, ae, bm, be):
    """Returns a + b, not normalised."""
    d = be - ae
    share = _with_exponent(
        8388735.0 - tl.abs(d)
    )  # 2^-|d|; the interpreter subtracts from no constant by name
    more = d > 0.0
    m = tl.fma(tl.where(more, am, bm), share, tl.where(more, bm, am))
    return m, tl.maximum(ae, be)


@triton.jit
def ratio(am, ae, bm, be):
    """Returns a / b, rounded once, where a <= b and b is normalised. Of impossible numbers it is any number."""
    a = am * power_of_two(tl.minimum(ae - be, 1.0))
    r = reciprocal(bm)
    q = a * r
    return tl.fma(tl.fma(-q, bm, a), r, q)


@triton.jit
def logarithm(m, e):
    """Returns the logarithm of normalised numbers, -inf where they are impossible. ln 2 is added in two
    parts.
    """
    score = tl.fma(e, 0.6931471824645996, tl.fma(e, -1.904654323148236e-09, tl.log(m)))
    return tl.where(e < NEVER, float("-inf"), score)


@triton.jit
def compose(am, ae, bm, be, cm, ce, dm, de):
    """Composes maps p -> (p a + b) c + d, for scans of p[t] = p[t-1] a[t] + b[t]. It normalises products alone, which
    nobody waits for: a sum grows with the logarithm of its terms' number.
    """
    pm, pe = normalised(am * cm, ae + ce)
    qm, qe = add(bm * cm, be + ce, dm, de)
    return pm, pe, qm, qe


@triton.jit
def compose_plain(a, b, c, d):
    """Does the same as ``compose`` on plain numbers."""
    return a * c, tl.fma(b, c, d)
