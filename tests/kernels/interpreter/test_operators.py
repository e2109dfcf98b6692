# SPDX-License-Identifier: Apache-2.0
"""The operators of the fast interpreter give what the stock ones give: values, types and errors."""

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels.interpreter import operators

SEMANTIC = interpreter.interpreter_semantic
SHAPES = ((), (4,), (4, 1), (1, 8), (4, 8))
NUMBERS = (0, 1, -3, 2**30, 0.0, -0.0, 1.5, -7.25, float("inf"), float("nan"), True)
ARRAYS = {
    "fp32": np.array([0.0, -0.0, 1.5, -3.0, 1e30, np.inf, np.nan, 2.0], dtype=np.float32),
    "fp16": np.arange(-4, 4).astype(np.float16),
    "int32": np.array([0, 1, -7, 5, 100, -100, 3, 2], dtype=np.int32),
    "int64": np.array([3, -1, 7, 2**40, -(2**40), 5, -3, 1], dtype=np.int64),
    "int1": np.array([True, False, True, True, False, False, True, False]),
    "pointer": np.arange(1000, 1008).astype(np.uint64),
}
DTYPES = {
    "fp32": tl.float32,
    "fp16": tl.float16,
    "int32": tl.int32,
    "int64": tl.int64,
    "int1": tl.int1,
    "pointer": tl.pointer_type(tl.float32),
}


@triton.jit
def _empty():
    tl.full((), 0, tl.int32)


@pytest.fixture(autouse=True)
def _patched_language():
    scope = interpreter._patch_lang(_empty.fn)
    with np.errstate(all="ignore"):
        yield
    scope.restore()


def made(name, shape):
    dtype = DTYPES[name]
    data = np.resize(np.roll(ARRAYS[name], len(shape)), shape or (1,))
    kind = tl.block_type(dtype, list(shape)) if shape else dtype
    return tl.tensor(interpreter.TensorHandle(data, dtype), kind)


def result(function, *arguments, **options):
    try:
        made = function(*arguments, **options)
    except Exception as error:
        return type(error)
    parts = made if isinstance(made, tuple) else (made,)
    return [(str(p.type), str(p.handle.dtype), p.handle.data.dtype, p.handle.data.shape, p.handle.data.tobytes())
            for p in parts]  # fmt: skip


@pytest.mark.parametrize("name", operators.OPERATORS)
def test_an_operator_gives_what_the_stock_one_gives(name):
    method = getattr(tl.tensor, f"__{name}__")
    compared = 0
    for dtype in ARRAYS:
        for shape in SHAPES:
            a = made(dtype, shape)
            others = [
                made(kind, size) for kind in ARRAYS for size in SHAPES if name not in operators.REFLECTED
            ]
            for b in (*others, *NUMBERS):
                wanted = result(method.stock, a, b, _semantic=SEMANTIC)
                assert result(method, a, b) == wanted, (dtype, shape, b)
                compared += isinstance(wanted, list)
    assert compared > 50


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_an_operator_notices_an_overflow(name):
    kind = tl.block_type(tl.int32, [2])
    most = tl.tensor(
        interpreter.TensorHandle(np.array([2**31 - 1, -(2**31)], dtype=np.int32), tl.int32), kind
    )
    other = tl.tensor(interpreter.TensorHandle(np.array([5, 3], dtype=np.int32), tl.int32), kind)
    method = getattr(tl.tensor, f"__{name}__")
    assert result(method, most, other) is AssertionError
    assert result(method, most, 3) is AssertionError
    assert result(method, most, 2**40) == result(method.stock, most, 2**40, _semantic=SEMANTIC)


@pytest.mark.parametrize(
    ("kind", "a", "b", "fits"),
    [
        (tl.int16, 32767, 5, False),
        (tl.int8, 127, 5, False),
        (tl.int8, 100, 5, True),
        (tl.uint32, 3_000_000_000, 1, True),
        (tl.uint32, 2**32 - 1, 1, False),
    ],
)
def test_other_integers_overflow_as_in_the_stock_interpreter(kind, a, b, fits):
    dtype = interpreter._get_np_dtype(kind)
    a, b = (tl.tensor(interpreter.TensorHandle(np.array([n], dtype=dtype), kind), kind) for n in (a, b))
    found = result(SEMANTIC.add, a, b, True)
    assert isinstance(found, list) if fits else found is AssertionError


def test_operands_are_broadcast_as_by_the_stock_interpreter():
    broadcast = type(SEMANTIC).broadcast_impl_value
    for dtype in ARRAYS:
        for other in ARRAYS:
            for shape in SHAPES:
                for size in SHAPES:
                    a, b = made(dtype, shape), made(other, size)
                    assert result(broadcast, SEMANTIC, a, b) == result(broadcast.stock, SEMANTIC, a, b)


@pytest.mark.parametrize(
    "slices", [(None, slice(None)), (slice(None), None), None, (None, slice(None), None), (0,)]
)
def test_an_index_adds_dimensions(slices):
    index = tl.tensor.__getitem__
    for dtype in ARRAYS:
        for shape in ((), (4,)):
            a = made(dtype, shape)
            assert result(index, a, slices) == result(index.stock, a, slices, _semantic=SEMANTIC)
