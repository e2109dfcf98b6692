# SPDX-License-Identifier: Apache-2.0
"""What selects the code of a kernel, and what the configurations of many kernels share."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastasr.kernels import _parts

# Bytes of shared memory that a program may have, by architecture.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = tuple(SHARED)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = ("fp32", "tf32", "bf16")  # "tf32": tensors of float32 whose products may be rounded to TF32


@dataclass
class Configuration:
    """A kernel with everything that selects its code.

    ``types`` are the element types of the pointers (other arguments are i32). ``divisible`` names the integers that
    Triton knows to be multiples of 16, ``floats`` the numbers that are fp32. ``stages`` belongs to the pipeline of
    loads. ``most_registers`` is what a launcher allows each thread.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict
    warps: int
    divisible: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    stages: int = 3  # Triton's own choice
    most_registers: int | None = None  # the assembler's own choice
    architectures: tuple[int, ...] = ARCHITECTURES  # what ``configurations`` fills in


@contextmanager
def setting(dtype: str):
    """Yields torch's dtype, while torch's setting for products of float32 is what ``dtype`` says."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield DTYPES[element_type(dtype)]
    finally:
        matmul.fp32_precision = before


def element_type(dtype: str) -> str:
    return "fp32" if dtype == "tf32" else dtype


def reduce_tile(parts: int) -> tuple[dict[str, int], int]:
    """Returns (constants, warps) of a kernel that adds up so many parts."""
    constants = _parts.reduce_tile(parts)
    return constants, constants.pop("num_warps")
