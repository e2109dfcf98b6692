# SPDX-License-Identifier: Apache-2.0
"""Exponentials and reciprocals by one instruction. Triton's own take three to eight: they keep results below 2^-126 and
rescale denominators above 2^126, which activations and softmaxes do not need.
"""

import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter knows no assembly


@triton.jit
def exp2(x):
    """Returns 2^x within 2 ulp, and 0 below 2^-126."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def reciprocal(x, PRECISE: tl.constexpr = False):
    """Returns 1 / x within 1 ulp, for |x| in [2^-126, 2^126]. PRECISE: a Newton step takes it below that."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    if PRECISE:
        y = tl.fma(y, tl.fma(-x, y, 1.0), y)
    return y


@triton.jit
def bits_from(n):
    """Returns the bits of 32 from number n >= 0 on: none for n >= 32, as PTX defines, other than LLVM."""
    if INTERPRETED:
        bits = tl.where(n < 32, tl.full(n.shape, -1, tl.int32) << n, 0)
    else:
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, 0xffffffff, $1;", "=r,r", [n], dtype=tl.int32, is_pure=True, pack=1
        )
    return bits
