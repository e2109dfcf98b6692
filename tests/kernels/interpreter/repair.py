# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter round as the hardware does: bfloat16 to nearest, ties to even, ``fma`` once, and operands
of float32 products to TF32 where the kernel allows it.

The stock interpreter rounds the product and the sum of an ``fma`` separately; it truncates float32 to
bfloat16, or rounds ties away from zero without carrying into the exponent, and multiplies raw 16-bit patterns
in ``tl.dot``. ``test_rounding.py`` tells whether the repair still holds.
"""

from functools import cache

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

from tests.kernels.ptx.arithmetic import narrow, widen

# ``fma_dot`` replaces the processor's BLAS for products of float32. Then a b and its transpose are the same numbers, as
# they are on a GPU: a kernel that computes scores once by rows and once by columns relies on it.
IN_ORDER = False


def fma_dot(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Computes total + a b of float32, a fused multiply-add per column of a, in order, as a GPU without
    TF32 does.
    """
    a, b, total = a.astype(np.float64), b.astype(np.float64), total.astype(np.float64)
    for k in range(a.shape[-1]):
        total += a[..., :, k, None] * b[..., None, k, :]
        total[...] = total.astype(np.float32)
    return total.astype(np.float32)


PRECISIONS = set()  # of all products so far


def truncated(operand):
    """Drops the 13 bits of float32 that a product in TF32 does not read."""
    if operand.dtype.scalar != tl.float32:
        return operand
    bits = operand.data.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _repair(builder: type) -> None:
    stock_cast, stock_convert, stock_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    stock_fma = builder.create_fma

    def conversion(source, target):
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(narrow(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widen(source.data), tl.float32)
        return None

    def cast(self, source, target):
        converted = conversion(source, target)  # a handle's truth value is that of its data
        return stock_cast(self, source, target) if converted is None else converted

    def convert(self, source, target, rounding):
        converted = conversion(source, target)
        return stock_convert(self, source, target, rounding) if converted is None else converted

    def dot(self, a, b, accumulator, precision, *options):
        PRECISIONS.add(precision)
        if precision == ir.INPUT_PRECISION.TF32:
            a, b = truncated(a), truncated(b)
        kinds = a.dtype.scalar, b.dtype.scalar, accumulator.dtype.scalar
        if IN_ORDER and kinds == (tl.float32,) * 3:
            return interpreter.TensorHandle(fma_dot(a.data, b.data, accumulator.data), tl.float32)
        if tl.bfloat16 not in kinds[:2]:
            return stock_dot(self, a, b, accumulator, precision, *options)
        product = np.matmul(widen(a.data), widen(b.data))
        return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    def fma(self, a, b, c):
        if c.dtype.scalar != tl.float32:
            return stock_fma(self, a, b, c)
        wide = a.data.astype(np.float64) * b.data + c.data  # the product of two float32 is exact in float64
        return interpreter.TensorHandle(wide.astype(np.float32), tl.float32)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, convert, dot
    builder.create_fma = fma


def _repair_sums(reductions: type) -> None:
    """Adds up pairs of rows as rows alone. numpy adds by halves along the last dimension alone, threads along any."""
    stock_sum = reductions.sum

    def sum_last(self, values):
        data = values.handle.data
        if data.ndim != 3 or self.axis != 1:
            return stock_sum(self, values)
        total = np.ascontiguousarray(np.moveaxis(data, 1, 2)).sum(2)
        return self.to_tensor(np.expand_dims(total, 1) if self.keep_dims else total, values.dtype)

    reductions.sum = sum_last


@cache
def install() -> None:
    _repair(interpreter.InterpreterBuilder)
    _repair_sums(interpreter.ReduceOps)
