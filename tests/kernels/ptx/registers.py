# SPDX-License-Identifier: Apache-2.0
"""The instructions that compute a register out of others."""

import numpy as np

from . import arithmetic
from .arithmetic import BITS, SIGNED, UNSIGNED, decode, encode
from .machine import MAKERS, maker
from .memory import Fault

FLOATS = ("f32", "f64", "f16", "bf16")
INTEGERS = {f"{s}{w}": d for s, table in (("u", UNSIGNED), ("s", SIGNED)) for w, d in table.items()}


def _each(kind: str, function):
    """Applies a function of numbers to registers of numbers, or to both halves of packed ones."""
    if kind in ("f16x2", "bf16x2"):
        half = kind[:-2]

        def packed(*bits):
            low, high = zip(*(arithmetic.halves(b) for b in bits), strict=True)
            return arithmetic.joined(
                *(encode(function(*(decode(p, half) for p in part)), half) for part in (low, high))
            )

        return packed
    return lambda *bits: encode(function(*(decode(b, kind) for b in bits)), kind)


def _ordinary(function_of):
    """Makes an instruction of one result, all of whose operands have its type."""

    def make(machine, operation, operands):
        kind = operation[-1]
        function = function_of(operation, kind)
        target = machine.slot(operands[0])
        sources = [machine.source(o, kind) for o in operands[1:]]
        if len(sources) == 1:
            (a,) = sources
            return lambda m, mask: m.put(target, function(m.get(a)), mask)
        if len(sources) == 2:
            a, b = sources
            return lambda m, mask: m.put(target, function(m.get(a), m.get(b)), mask)
        return lambda m, mask: m.put(target, function(*(m.get(s) for s in sources)), mask)

    return make


def _ftz(operation, function):
    if "ftz" not in operation:
        return function
    return lambda *values: arithmetic.flushed(function(*(arithmetic.flushed(v) for v in values)))


def _arithmetic(function):
    return _ordinary(lambda operation, kind: _each(kind, _ftz(operation, function)))


MAKERS["add"] = _arithmetic(lambda a, b: a + b)
MAKERS["sub"] = _arithmetic(lambda a, b: a - b)
MAKERS["abs"] = _arithmetic(np.abs)
MAKERS["neg"] = _arithmetic(np.negative)
MAKERS["sqrt"] = _arithmetic(np.sqrt)
MAKERS["and"] = _ordinary(lambda o, k: lambda a, b: a & b)
MAKERS["or"] = _ordinary(lambda o, k: lambda a, b: a | b)
MAKERS["xor"] = _ordinary(lambda o, k: lambda a, b: a ^ b)
MAKERS["not"] = _ordinary(lambda o, k: lambda a: ~a)
MAKERS["prmt"] = _ordinary(lambda o, k: arithmetic.permute)
MAKERS["ex2"] = _ordinary(lambda o, k: lambda a: arithmetic.ex2(a, "ftz" in o).view(np.uint32))
MAKERS["rsqrt"] = _ordinary(lambda o, k: lambda a: arithmetic.rsqrt(a).view(np.uint32))


@maker("rcp")
def _reciprocal(machine, operation, operands):
    if operation[-1] == "f64":  # the first 20 bits
        return _ordinary(
            lambda o, k: lambda a: (1 / a.view(np.float64)).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
        )(machine, operation, operands)
    return _ordinary(lambda o, k: lambda a: (1 / a.view(np.float32)).view(np.uint32))(
        machine, operation, operands
    )


@maker("max", "min")
def _extreme(machine, operation, operands):
    ordered = operation[-1][0] in "us" or "NaN" in operation  # else a number wins over NaN
    function = {"max": np.maximum if ordered else np.fmax, "min": np.minimum if ordered else np.fmin}[
        operation[0]
    ]
    if "relu" in operation:
        return _arithmetic(lambda a, b: np.maximum(function(a, b), a.dtype.type(0)))(
            machine, operation, operands
        )
    return _arithmetic(function)(machine, operation, operands)


@maker("fma")
def _fma(machine, operation, operands):
    kind = operation[-1]
    if kind == "f64":
        return _ordinary(lambda o, k: _each(k, arithmetic.fma64))(machine, operation, operands)
    return _ordinary(lambda o, k: _each(k, _ftz(o, arithmetic.fma32)))(machine, operation, operands)


@maker("mul", "mad")
def _multiply(machine, operation, operands):
    kind = operation[-1]
    if kind[0] in "bf":  # f32, bf16x2
        return _arithmetic(lambda a, b: a * b)(machine, operation, operands)
    mode = operation[1]
    target = machine.slot(operands[0])
    a, b = (machine.source(o, kind) for o in operands[1:3])
    width = BITS[kind]
    if mode == "wide":
        wide = kind[0] + str(2 * width)

        def times(x, y):
            dtype = INTEGERS[wide]
            return decode(x, kind).astype(dtype) * decode(y, kind).astype(dtype)
    elif mode == "lo":
        wide = kind

        def times(x, y):
            return decode(x, kind) * decode(y, kind)
    else:
        wide, dtype = kind, INTEGERS[kind[0] + "64"]

        def times(x, y):  # the upper half, of 32 bits
            return ((decode(x, kind).astype(dtype) * decode(y, kind)) >> dtype(32)).astype(INTEGERS[kind])

    if operation[0] == "mul":
        return lambda m, mask: m.put(target, encode(times(m.get(a), m.get(b)), wide), mask)
    c = machine.source(operands[3], wide)
    return lambda m, mask: m.put(
        target, encode(times(m.get(a), m.get(b)) + decode(m.get(c), wide), wide), mask
    )


@maker("div", "rem")
def _divide(machine, operation, operands):
    kind = operation[-1]
    if kind in FLOATS:
        # div.full is off by at most 2 units in the last place.
        return _arithmetic(lambda a, b: a / b)(machine, operation, operands)
    if operation[0] == "div":
        return _arithmetic(arithmetic.quotient)(machine, operation, operands)
    return _arithmetic(lambda a, b: a - arithmetic.quotient(a, b) * b)(machine, operation, operands)


@maker("shl", "shr")
def _shift(machine, operation, operands):
    kind = operation[-1]
    width = BITS[kind]
    target, a = machine.slot(operands[0]), machine.source(operands[1], kind)
    b = machine.source(operands[2], "u32")
    dtype = UNSIGNED[width]

    def shifted(x, n):
        n = n.astype(np.uint64)
        beyond = n >= np.uint64(width)
        if operation[0] == "shl":
            return np.where(
                beyond, dtype(0), encode(decode(x, kind), kind) << np.minimum(n, width - 1).astype(dtype)
            )
        x = decode(x, kind)
        moved = x >> np.minimum(n, width - 1).astype(x.dtype)
        return encode(moved if kind[0] == "s" else np.where(beyond, x.dtype.type(0), moved), kind)

    return lambda m, mask: m.put(target, shifted(m.get(a), m.get(b)), mask)


@maker("bfe")
def _extract(machine, operation, operands):
    kind = operation[-1]
    target = machine.slot(operands[0])
    a, b, c = (machine.source(o, k) for o, k in zip(operands[1:], (kind, "u32", "u32"), strict=True))

    def extracted(x, begin, count):
        x = decode(x, kind).astype(np.int64)
        begin, count = (v.astype(np.int64) & 0xFF for v in (begin, count))
        begin = np.minimum(begin, 63)
        y = (x >> begin) & ((1 << count) - 1)
        if kind[0] == "s":
            y = np.where(y >> np.maximum(count - 1, 0) & 1, y - (1 << count), y)
        return y.astype(np.int64).astype(UNSIGNED[BITS[kind]])

    return lambda m, mask: m.put(target, extracted(m.get(a), m.get(b), m.get(c)), mask)


COMPARED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b,
    "hi": lambda a, b: a > b,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}


@maker("setp")
def _compare(machine, operation, operands):
    kind = operation[-1]
    compare = COMPARED[operation[1]]
    a, b = (machine.source(o, kind) for o in operands[1:3])
    if len(operation) - ("ftz" in operation) != 3 or len(operands) != 3:
        raise Fault(f"unknown comparison {operation}")
    if "|" in operands[0]:
        low, high = (machine.slot(o) for o in operands[0].split("|"))

        def both(m, mask):
            parts = zip(arithmetic.halves(m.get(a)), arithmetic.halves(m.get(b)), strict=True)
            for target, (x, y) in zip((low, high), parts, strict=True):
                m.put(target, compare(decode(x, kind[:-2]), decode(y, kind[:-2])), mask)

        return both
    target = machine.slot(operands[0])
    return lambda m, mask: m.put(target, compare(decode(m.get(a), kind), decode(m.get(b), kind)), mask)


@maker("selp")
def _select(machine, operation, operands):
    kind = operation[-1]
    target = machine.slot(operands[0])
    a, b = (machine.source(o, kind) for o in operands[1:3])
    chosen = machine.slot(operands[3])
    return lambda m, mask: m.put(target, np.where(m.get(chosen), m.get(a), m.get(b)), mask)


@maker("mov")
def _move(machine, operation, operands):
    kind = operation[-1]
    if isinstance(operands[1], tuple):  # pack
        target, parts = machine.slot(operands[0]), operands[1]
        width = BITS[kind] // len(parts)
        slots = [machine.source(o, f"b{width}") for o in parts]
        poison = np.full((1, 1), (1 << width) - 1, UNSIGNED[width])
        dtype = UNSIGNED[BITS[kind]]

        def pack(m, mask):
            value = 0
            for i, slot in enumerate(slots):
                part = m.registers[slot]  # LLVM writes no number to a half that nothing reads
                value = value | ((poison if part is None else part).astype(dtype) << dtype(i * width))
            m.put(target, value, mask)

        return pack
    if isinstance(operands[0], tuple):  # unpack
        targets = [None if o == "_" else machine.slot(o) for o in operands[0]]
        a = machine.source(operands[1], kind)
        width = BITS[kind] // len(targets)
        dtype = UNSIGNED[BITS[kind]]

        def unpack(m, mask):
            value = m.get(a)
            for i, target in enumerate(targets):
                if target is not None:
                    m.put(target, (value >> dtype(i * width)).astype(UNSIGNED[width]), mask)

        return unpack
    if kind == "pred":
        target = machine.slot(operands[0])
        if operands[1].lstrip("-").isdigit():
            value = np.array([[bool(int(operands[1]))]])
            return lambda m, mask: m.put(target, value, mask)
        a = machine.slot(operands[1])
        return lambda m, mask: m.put(target, m.get(a), mask)
    target, a = machine.slot(operands[0]), machine.source(operands[1], kind)
    dtype = UNSIGNED[BITS[kind]]
    return lambda m, mask: m.put(target, m.get(a).astype(dtype, copy=False), mask)


ROUNDED = {"rn": np.rint, "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rm": np.floor}


@maker("cvt")
def _convert(machine, operation, operands):
    *_, to, of = operation
    target = machine.slot(operands[0])
    if to in ("bf16x2", "f16x2"):
        high, low = (machine.source(o, of) for o in operands[1:])
        half = to[:-2]
        return lambda m, mask: m.put(
            target, arithmetic.joined(*(encode(decode(m.get(s), of), half) for s in (low, high))), mask
        )
    a = machine.source(operands[1], of)
    rounding = next((ROUNDED[o] for o in operation[1:-2] if o in ROUNDED), None)
    if to == "tf32":
        return lambda m, mask: m.put(target, (m.get(a) + np.uint32(0x1000)) & np.uint32(0xFFFFE000), mask)

    def converted(bits):
        x = decode(bits, of)
        if "ftz" in operation and of == "f32":
            x = arithmetic.flushed(x)
        if of in FLOATS and to in FLOATS:
            if any(o in ("rmi", "rni", "rzi", "rpi") for o in operation):
                x = rounding(x)
            if to == "bf16" and of == "f64":
                raise Fault("cvt.bf16.f64")
            return encode(x, to)
        if of in FLOATS:
            limits = np.iinfo(INTEGERS[to])
            x = np.nan_to_num(rounding(x.astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
            inside = np.clip(x, limits.min, np.nextafter(np.float64(limits.max), 0))
            return encode(np.where(x >= limits.max, limits.max, inside.astype(INTEGERS[to])), to)
        if to in FLOATS:  # float64 holds integers of up to 53 bits, and a second rounding to 16 bits is rare
            return encode(x.astype(np.float64), to)
        width = BITS[to]
        return x.astype(INTEGERS[("s" if of[0] == "s" else "u") + str(width)]).view(UNSIGNED[width])

    return lambda m, mask: m.put(target, converted(m.get(a)), mask)
