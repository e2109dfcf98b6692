# SPDX-License-Identifier: Apache-2.0
"""Upstream's models in another precision. This imports the swap's engine, which steps.py does not: all tests need that."""

import contextlib

import torch

from fastasr.swap.verify import StayInFp64


@contextlib.contextmanager
def computing_in(dtype):
    """Keeps upstream in ``dtype``: in fp64 its softmax and regularisers cast to fp32, and constants of its dropout have
    the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with StayInFp64():
            yield
    finally:
        torch.set_default_dtype(before)
