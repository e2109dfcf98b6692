# SPDX-License-Identifier: Apache-2.0
"""Operators of tensors in one step, for Triton's interpreter: the stock ones make a tensor in each of a dozen steps.

An operator serves two tensors, or a tensor and a number, of float32, int32 or int64, masks, and pointers with offsets.
``test_operators.py`` compares the results with the stock ones; other operands go to the stock operator.
"""

from functools import partial

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide}
INTEGER = {"mod": np.fmod, "floordiv": lambda a, b: (a - np.fmod(a, b)) // b}  # rounds towards zero
COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or}
REFLECTED = ("radd", "rsub", "rmul")
NUMBERS = {"fp32": np.float32, "int32": np.int32, "int64": np.int64}
INTEGERS = {"int32", "int64"}


def exact(function, a, b):
    """Adds, subtracts or multiplies integers of fewer than 64 bits, whose result must fit."""
    wide = function(a, b, dtype=np.int64)
    narrow = wide.astype(a.dtype)
    assert (wide == narrow).all(), f"{a.dtype} overflow detected for operation {function.__name__}"
    return narrow


def _moved(pointers, offsets, width):
    return pointers + width * offsets.astype(np.uint64)


def _plan(name, a, b):
    """Returns how to compute an operator: a function of two arrays, the second one if it is a number, the dtype of the
    result's handle if ``a`` has another, and the result's type. Returns None for other operands.
    """
    kinds = [operand.type for operand in (a, b) if isinstance(operand, tl.tensor)]
    element, names = a.dtype, {kind.scalar.name for kind in kinds}
    if name == "add" and element.is_ptr() and len(kinds) == 2 and b.dtype.name in INTEGERS:
        width = np.uint64(max(1, element.element_ty.primitive_bitwidth // 8))
        return partial(_moved, width=width), None, None, _joint(element, kinds)
    if name in LOGIC:
        of_masks = names == {"int1"} and len(kinds) == 2
        return (LOGIC[name], None, None, _joint(element, kinds)) if of_masks else None
    if names != {"fp32"} and not names <= INTEGERS:
        return None
    whole = names <= INTEGERS
    number = None
    if len(kinds) == 1:
        fits = abs(b) < 2**24 if type(b) is int else type(b) is float and not whole
        if not fits:
            return None
        # Triton takes -0.0 for 0.
        number = np.array([b or 0], dtype=NUMBERS[element.name])
    if len(names) == 2:
        element = tl.int64
    of = element if len(names) == 2 else None
    if name in COMPARISONS:
        return COMPARISONS[name], number, of, _joint(tl.int1, kinds)
    if name in INTEGER if not whole else name == "truediv":
        return None
    function = (INTEGER | ARITHMETIC)[name.removeprefix("r")]
    if element.name == "int32" and name not in INTEGER:
        function = partial(exact, function)
    if name in REFLECTED:
        function = partial(_swapped, function)
    return function, number, of, _joint(element, kinds)


def _swapped(function, a, b):
    return function(b, a)


def _joint(element, kinds):
    """Returns the type of a result whose operands are broadcast."""
    shapes = [tuple(kind.shape) for kind in kinds if kind.is_block()]
    return tl.block_type(element, list(np.broadcast_shapes(*shapes))) if shapes else element


def _made(data, of, kind):
    """Makes a tensor without the checks of the stock constructors."""
    handle = object.__new__(interpreter.TensorHandle)
    handle.data, handle.dtype, handle.attr = data, of, {}
    return tl.tensor(handle, kind)


def _operator(name, stock):
    plans = {}

    def apply(a, b):
        key = (a.type.name, b.type.name) if b.__class__ is tl.tensor else (a.type.name, b.__class__, b)
        plan = plans[key] if key in plans else plans.setdefault(key, _plan(name, a, b))
        if plan is None:
            return stock(a, b, _semantic=interpreter.interpreter_semantic)
        function, number, of, kind = plan
        data = function(a.handle.data, b.handle.data if number is None else number)
        return _made(data, of or a.handle.dtype.scalar, kind)

    apply.stock = stock
    return apply


def _index(stock):
    """Adds dimensions of size 1."""
    whole, known = slice(None), {}

    def index(self, slices):
        parts = slices if type(slices) is tuple else (slices,)
        if not self.type.is_block() or any(
            p is not None and (type(p) is not slice or p != whole) for p in parts
        ):
            return stock(self, slices, _semantic=interpreter.interpreter_semantic)
        data = self.handle.data[parts]
        key = self.dtype.name, data.shape
        if key not in known:
            known[key] = tl.block_type(self.dtype, list(data.shape))
        return _made(data, self.handle.dtype.scalar, known[key])

    index.stock = stock
    return index


def _cast(stock):
    """Leaves a tensor that has the dtype alone."""

    def cast(self, source, target, rounding=None):
        same = rounding is None and source.dtype.name == target.scalar.name
        return source if same else stock(self, source, target, rounding)

    return cast


def _broadcast(stock):
    """Leaves two operands of one shape alone, and fills a block with a scalar."""
    known = {}

    def filled(scalar, block):
        key = scalar.dtype.name, block.name
        if key not in known:
            known[key] = block.with_element_ty(scalar.dtype)
        of = scalar.handle.dtype.scalar
        return _made(
            np.full(block.shape.values, scalar.handle.data, interpreter._get_np_dtype(of)), of, known[key]
        )

    def broadcast(self, left, right):
        a, b = left.type, right.type
        if not a.is_block():
            return (filled(left, b), right) if b.is_block() else (left, right)
        if not b.is_block():
            return left, filled(right, a)
        return (left, right) if a.shape.values == b.shape.values else stock(self, left, right)

    broadcast.stock = stock
    return broadcast


OPERATORS = (*ARITHMETIC, *INTEGER, *COMPARISONS, *LOGIC, *REFLECTED)


def install() -> None:
    for name in OPERATORS:
        setattr(tl.tensor, f"__{name}__", _operator(name, getattr(tl.tensor, f"__{name}__")))
    tl.tensor.__getitem__ = _index(tl.tensor.__getitem__)
    semantic = tl.semantic.TritonSemantic
    semantic.cast = _cast(semantic.cast)
    semantic.broadcast_impl_value = _broadcast(semantic.broadcast_impl_value)
