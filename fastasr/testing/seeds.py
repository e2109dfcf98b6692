# SPDX-License-Identifier: Apache-2.0
"""The random numbers of a test run: all of them come from one seed, ``SEED`` in the environment."""

import os
import random
import zlib

import torch


def begin(seed: str | None = None) -> str:
    """Begins a run with this seed, the environment's, or a drawn one. Returns the seed that repeats the run.

    The seed also picks the matrix product, which outside tests is measured and may differ from run to run. Processes
    that are started later inherit both.
    """
    os.environ["SEED"] = seed or os.environ.get("SEED") or str(random.randrange(1_000_000))
    os.environ.setdefault("FASTASR_GEMM", ("torch", "native")[seeded("product") % 2])
    return " ".join(f"{name}={os.environ[name]}" for name in ("SEED", "FASTASR_GEMM"))


def seeded(*parts: object) -> int:
    """Returns a seed made from the run's seed and from ``parts``, which name the draw."""
    return zlib.crc32(f"{os.environ.get('SEED')} {parts}".encode())


def seed_torch(seed: int) -> None:
    """Seeds the numbers that torch draws, as ``torch.manual_seed`` does. Where there is no accelerator, that function
    formats its caller's stack for each kind of accelerator, which takes longer than many calls of ops.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
