# SPDX-License-Identifier: Apache-2.0
"""What the instructions of PTX compute: functions of numpy arrays of the bits in registers."""

import numpy as np

BITS = {"b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16}
BITS |= dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 32)
BITS |= dict.fromkeys(("b64", "u64", "s64", "f64"), 64)
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def widen(bits: np.ndarray) -> np.ndarray:
    """Returns bfloat16 as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Returns float32 as the bits of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (
        (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    ).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """Returns what the bits of a register stand for."""
    width = BITS[kind]
    if bits.dtype.itemsize * 8 != width:
        bits = bits.astype(UNSIGNED[width])
    if kind == "f32":
        return bits.view(np.float32)
    if kind == "f64":
        return bits.view(np.float64)
    if kind == "f16":
        return bits.view(np.float16)
    if kind == "bf16":
        return widen(bits)
    if kind[0] == "s":
        return bits.view(SIGNED[width])
    return bits


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Returns the bits of a register with these values."""
    if kind == "bf16":
        return narrow(values)
    if kind == "f16":
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(values, dtype=np.float16).view(np.uint16)
    if kind == "f32":
        return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    if kind == "f64":
        return np.ascontiguousarray(values, dtype=np.float64).view(np.uint64)
    return np.ascontiguousarray(values).view(UNSIGNED[BITS[kind]])


def halves(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def flushed(values: np.ndarray) -> np.ndarray:
    """Returns float32 whose subnormal numbers are zero."""
    return np.where(np.abs(values) < np.float32(2**-126), np.copysign(np.float32(0), values), values)


def toward_zero(values: np.ndarray) -> np.ndarray:
    """Returns float64 as float32, rounded towards zero."""
    nearest = values.astype(np.float32)
    over = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(over & np.isfinite(values), np.nextafter(nearest, np.float32(0)), nearest)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a b + c in float32, rounded once but for ties of float64 (the product is exact there)."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a b + c in float64, from the product's two parts (Dekker) and the sum's (Knuth)."""
    product = a * b
    high_a, high_b = (t - (t - v) for v in (a, b) for t in (v * 134217729.0,))
    low_a, low_b = a - high_a, b - high_b
    error = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    total = product + c
    part = total - product
    rest = (product - (total - part)) + (c - part)
    result = total + (rest + error)
    return np.where(np.isfinite(result), result, total)


def approximate(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Returns these float64 as float32, off by up to 2^-23 of each before it is rounded, by a hash of the argument's
    bits: with the rounding, the largest error that PTX states for approximations is nearly reached.
    """
    mixed = (bits * np.uint32(2654435761)) ^ (bits >> np.uint32(15))
    noise = mixed.astype(np.float64) / 2.0**31 - 1.0
    return (values * (1 + noise * 2.0**-23)).astype(np.float32)


def ex2(bits: np.ndarray, ftz: bool) -> np.ndarray:
    x = bits.view(np.float32)
    x = flushed(x) if ftz else x
    y = np.exp2(x.astype(np.float64))
    y = np.where((x == np.rint(x)) | ~np.isfinite(y), y, approximate(y, bits)).astype(np.float32)
    return flushed(y) if ftz else y


def rsqrt(bits: np.ndarray) -> np.ndarray:
    return approximate(1 / np.sqrt(bits.view(np.float32).astype(np.float64)), bits)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divides integers, rounding towards zero; what a division by zero gives is left open in PTX."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    return np.where(b == 0, -1, (a - np.fmod(a, safe)) // safe).astype(a.dtype)


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Returns prmt.b32: each byte of the result is one of the eight of {b, a}, or its sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = (
            (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        ).astype(np.uint32)
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        out |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return out
