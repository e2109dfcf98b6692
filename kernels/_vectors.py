# SPDX-License-Identifier: Apache-2.0
"""Neighbouring elements of tensors of several widths, by vectors that fill sectors.

A thread takes as many neighbours as 16 bytes hold of a load's dtype. Of a wider tensor in the same layout it takes them
by several instructions, which reach a part of each sector: for 8 numbers of float32 beside 8 of bfloat16, half of twice
as many. With as many neighbours as 16 bytes hold of the widest, every instruction has whole sectors, and all tensors
have one layout.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _neighbours(*tensors) -> tl.constexpr:
    widest = max(t.dtype.element_ty.primitive_bitwidth for t in tensors if t is not None)
    return tl.constexpr(128 // widest)  # the interpreter asks for one


@triton.jit
def neighbours(COUNT: tl.constexpr, A, B=None, C=None, D=None, E=None):
    """Returns [0, COUNT), offsets in tensors, of which those that matter are named."""
    return tl.max_contiguous(tl.arange(0, COUNT), _neighbours(A, B, C, D, E))
