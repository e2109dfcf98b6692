# SPDX-License-Identifier: Apache-2.0
"""Upstream's models in another precision. This imports the engine of the swap, so it is not part of steps.py."""

import contextlib

import torch

from fastasr.swap.replay import StayInFp64


@contextlib.contextmanager
def computing_in(dtype):
    """Keeps upstream in ``dtype``: in fp64 its softmax and regularisers cast to fp32, and constants of its dropout have
    the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with StayInFp64() if dtype is torch.float64 else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)
