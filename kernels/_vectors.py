# SPDX-License-Identifier: Apache-2.0
"""Neighbouring elements of a row: offsets whose vectors fill sectors, and loads that convert pairs.

A thread takes as many neighbours as 16 bytes hold of a load's dtype. Of a wider tensor in the same layout it takes them
by several instructions, which reach a part of each sector: for 8 numbers of float32 beside 8 of bfloat16, half of twice
as many. With as many neighbours as 16 bytes hold of the widest, every instruction has whole sectors, and all tensors
have one layout.
"""

import torch
import triton
import triton.language as tl

from fastasr.kernels._launch import cdiv
from fastasr.kernels._special import INTERPRETED

# Both numbers of a register in float32: bfloat16 is the upper half of it.
OF_BFLOAT16 = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
OF_FLOAT16 = tl.constexpr("{.reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}")


@triton.constexpr_function
def _neighbours(*tensors) -> tl.constexpr:
    widest = max(t.dtype.element_ty.primitive_bitwidth for t in tensors if t is not None)
    return tl.constexpr(128 // widest)  # the interpreter asks for one


@triton.jit
def neighbours(COUNT: tl.constexpr, A, B=None, C=None, D=None, E=None):
    """Returns [0, COUNT), offsets in tensors, of which those that matter are named."""
    return tl.max_contiguous(tl.arange(0, COUNT), _neighbours(A, B, C, D, E))


@triton.jit
def load(at, keep, PAIRS: tl.constexpr = True):
    """Returns the numbers at pointers in float32, 0 where not ``keep``. PAIRS of bfloat16 take two instructions; the
    compiler's own conversion takes three, and moves between registers.
    """
    x = tl.load(at, mask=keep, other=0.0)
    if PAIRS and not INTERPRETED and x.dtype.primitive_bitwidth == 16:  # the interpreter knows no assembly
        halves: tl.constexpr = OF_BFLOAT16 if x.dtype == tl.bfloat16 else OF_FLOAT16
        return tl.inline_asm_elementwise(halves, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    return x.to(tl.float32)


@triton.jit
def begun(columns, end, VECTOR: tl.constexpr):
    """Returns which columns are in vectors that begin before a row's end. What one reads behind it, nothing may use."""
    return columns // VECTOR * VECTOR < end


def vector(*tensors: torch.Tensor) -> int:
    """Returns how many numbers kernels may read at once where the last ones follow a row: 16 bytes, if these are
    aligned in all rows and the tensors' memory holds them."""
    for t in tensors:
        steps, size = t.stride()[:-1], t.element_size()
        count = 16 // size
        last = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, steps, strict=False))
        end = (last + cdiv(t.shape[-1], count) * count) * size
        if t.data_ptr() % 16 or any(step * size % 16 for step in steps) or end > t.untyped_storage().nbytes():
            return 1
    return count
