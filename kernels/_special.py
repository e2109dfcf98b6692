# SPDX-License-Identifier: Apache-2.0
"""Exponentials and reciprocals by one instruction. Triton's own take three to eight: they keep results below 2^-126 and
rescale denominators above 2^126, which activations and softmaxes do not need.
"""

import os

import triton
import triton.language as tl

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
