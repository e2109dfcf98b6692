# SPDX-License-Identifier: Apache-2.0
"""What selects the code of a kernel, and what the configurations of many kernels share."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastasr.kernels import _layer_norm

# Bytes of shared memory that a program may have, by architecture.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ARCHITECTURES = tuple(SHARED)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = ("fp32", "tf32", "bf16")  # "tf32": tensors of float32 whose products may be rounded to TF32


@dataclass
class Configuration:
    """A kernel with everything that selects its code.

    ``types`` are the element types of the pointers (other arguments are i32). ``constants`` are the kernel's constants
    and Triton's options, as a launcher names them. ``divisible`` names the integers that Triton knows to be multiples
    of 16, ``floats`` the numbers that are fp32.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict
    divisible: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
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


def norm_tile(
    kernel: str,
    channels: int,
    dtype: str,
    generation: int,
    gated: bool = False,
    masked: bool = False,
    norms: int = 1,
) -> dict[str, int]:
    """Returns the tile and the warps of a kernel that normalises rows."""
    if kernel == "backward":
        return _layer_norm.backward_tile(channels, DTYPES[dtype], gated, masked, generation)[0]
    return _layer_norm.forward_tile(channels, generation, norms)
