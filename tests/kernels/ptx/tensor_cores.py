# SPDX-License-Identifier: Apache-2.0
"""Products of tensor cores, and the instructions that move their operands: how the lanes of a warp hold matrices.

Registers are [programs, warps, 32 lanes]; lane 4 g + t belongs to group g.
"""

import numpy as np

from . import arithmetic
from .memory import Fault


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns c + a b in float32: exact products, whose sum is rounded towards zero, as the hardware does."""
    return arithmetic.toward_zero(np.matmul(a.astype(np.float64), b.astype(np.float64)) + c)


def elements(registers: np.ndarray, kind: str) -> np.ndarray:
    """Returns 32-bit registers as numbers, with a last dimension for the one or two of each."""
    if kind == "tf32":
        return (registers & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    pair = np.stack(arithmetic.halves(registers), -1)
    return arithmetic.decode(pair, kind).astype(np.float32)


def fragment_a(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """Returns [programs, warps, 16, k] from four registers."""
    p, w, _ = registers[0].shape
    x = elements(np.stack(registers, -1), kind)  # p, w, lane, register, half
    x = x.reshape(p, w, 8, 4, 2, 2, -1)  # g, t, half of k, half of rows, element
    return x.transpose(0, 1, 5, 2, 4, 3, 6).reshape(p, w, 16, -1)


def fragment_b(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """Returns [programs, warps, k, 8] from two registers."""
    p, w, _ = registers[0].shape
    x = elements(np.stack(registers, -1), kind)  # p, w, lane, register, element
    x = x.reshape(p, w, 8, 4, 2, -1)
    return x.transpose(0, 1, 4, 3, 5, 2).reshape(p, w, -1, 8)


def fragment_c(registers: list[np.ndarray]) -> np.ndarray:
    """Returns [programs, warps, 16, 8] from four registers of float32."""
    p, w, _ = registers[0].shape
    x = np.stack(registers, -1).view(np.float32).reshape(p, w, 8, 4, 2, 2)  # g, t, half of rows, column
    return x.transpose(0, 1, 4, 2, 3, 5).reshape(p, w, 16, 8)


def registers_c(matrix: np.ndarray) -> list[np.ndarray]:
    """Returns what ``fragment_c`` reads."""
    p, w = matrix.shape[:2]
    x = matrix.reshape(p, w, 2, 8, 4, 2).transpose(0, 1, 3, 4, 2, 5).reshape(p, w, 32, 4)
    return [np.ascontiguousarray(x[..., i]).view(np.uint32) for i in range(4)]


def matrices_of_rows(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """Returns ldmatrix's registers [programs, warps, 32] of one matrix, from its rows [programs, warps, 8, 4] of
    32-bit words.
    """
    p, w = rows.shape[:2]
    if not transposed:
        return rows.reshape(p, w, 32)
    x = np.stack(arithmetic.halves(rows), -1).reshape(p, w, 8, 8).transpose(0, 1, 3, 2)  # column, row
    pairs = x.reshape(p, w, 8, 4, 2)
    return arithmetic.joined(pairs[..., 0], pairs[..., 1]).reshape(p, w, 32)


SWIZZLED = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row by the descriptor's mode


def shared_operand(
    bytes_: np.ndarray, descriptor: np.ndarray, rows: int, columns: int, size: int, transposed: bool
) -> np.ndarray:
    """Returns wgmma's operand [programs, rows, columns] as words of ``size`` bytes: rows are those of A or the columns
    of B, columns are k. ``bytes_`` is shared memory, ``descriptor`` [programs].
    """
    d = descriptor.astype(np.uint64)
    start = ((d & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
    leading = (((d >> np.uint64(16)) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
    stride = (((d >> np.uint64(32)) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
    mode = np.unique(d >> np.uint64(62))
    if mode.size != 1 or ((d >> np.uint64(49)) & np.uint64(7)).any():
        raise Fault(
            f"a descriptor of shared memory that is not understood: {[hex(int(v)) for v in np.unique(d)[:6]]}"
        )
    mode = int(mode[0])
    width = SWIZZLED[mode]
    row, k = np.arange(rows)[:, None], np.arange(columns)[None, :]
    start, leading, stride = (v[:, None, None] for v in (start, leading, stride))
    if not transposed:
        byte = k * size
        place = start + (row // 8) * stride + (row % 8) * width
        place = place + (byte if mode else (byte // 16) * leading + byte % 16)
    else:
        byte = row * size
        place = start + (byte // width) * leading + byte % width + (k // 8) * stride + (k % 8) * width
    if mode:
        mask = {1: 7, 2: 3, 3: 1}[mode]
        place = place ^ (((place >> 7) & mask) << 4)
    words = bytes_.view({2: np.uint16, 4: np.uint32}[size])
    return words[np.arange(len(words))[:, None, None], place // size]
