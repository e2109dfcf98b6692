# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter several times faster where it does the same work again for every operation: shapes and
types, calls of one jitted function by another, checks of overflow, scans. Results stay the same to the bit.
"""

import math
from functools import cache

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from tests.kernels.interpreter import operators


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
    languages = {}

    def call(self, *arguments, **options):
        if self not in languages:
            languages[self] = [
                value for value in self.fn.__globals__.values() if value is tl or value is tl.core
            ]
        if any(tl.core.is_builtin(language.load) for language in languages[self]):
            return stock(self, *arguments, **options)
        return self.rewrite()(*arguments, **options)

    return call


def _check_overflow(a, b, operation):
    """Checks for integer overflow; the stock check forms ten tensors for it."""
    if a.type.scalar.int_bitwidth < 64:
        operators.exact(operators.ARITHMETIC[operation.__name__], a.handle.data, b.handle.data)


def _block_type(stock):
    """Remembers the fields of a type by its element and shape; the stock constructor checks each size again."""
    known = {}

    def init(self, element_ty, shape):
        sizes = tuple(n.value if isinstance(n, tl.constexpr) else n for n in shape)
        key = element_ty.name, sizes
        if key not in known:
            stock(self, element_ty, shape)
            constant = {
                "sizes": tl.tuple([tl.constexpr(n) for n in sizes]),
                "size": tl.constexpr(math.prod(sizes)),
            }
            known[key] = self.__dict__ | constant
        self.__dict__.update(known[key])

    return init


_SCALAR = tl.tuple([])
_ONE = tl.constexpr(1)


def _tensor(self, handle, type):
    """Sets the fields of a tensor without making a constant of each size again."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = (type.sizes, type.size) if type.is_block() else (_SCALAR, _ONE)


def _constant(stock):
    """Remembers the scalars that kernels name."""
    known = {}

    def constant(self, value, dtype):
        key = type(value), value, dtype.name
        if key not in known:
            known[key] = stock(self, value, dtype)
        return known[key]

    return constant


def _operands(stock):
    """Leaves two float32 or integer operands of one type alone at once."""
    plain = {tl.float32.name, tl.int32.name, tl.int64.name}

    def operands(self, lhs, rhs, *options, **named):
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            name = lhs.dtype.name
            if name in plain and name == rhs.dtype.name:
                return self.broadcast_impl_value(lhs, rhs)
        return stock(self, lhs, rhs, *options, **named)

    return operands


@cache
def install() -> None:
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _check_overflow
    interpreter.ScanOps.generic_scan = _scan
    interpreter._get_np_dtype = _numpy_type(interpreter._get_np_dtype)
    interpreter.InterpretedFunction.__call__ = _device_call(interpreter.InterpretedFunction.__call__)
    tl.block_type.__init__ = _block_type(tl.block_type.__init__)
    tl.tensor.__init__ = _tensor
    operators.install()
    TritonSemantic.scalar_constant = _constant(TritonSemantic.scalar_constant)
    TritonSemantic.binary_op_type_checking_impl = _operands(TritonSemantic.binary_op_type_checking_impl)
