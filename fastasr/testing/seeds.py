# SPDX-License-Identifier: Apache-2.0
"""The random numbers of a test run: all of them come from one seed, ``SEED`` in the environment."""

import os
import random
import zlib

import torch


def begin(seed: str | None = None) -> str:
    """Begins a run with this seed, that of the environment, or a drawn one. Returns what repeats the run.

    The seed also picks the matrix product, which outside tests is measured and may differ from run to run. Processes
    that are started later inherit both.
    """
    os.environ["SEED"] = seed or os.environ.get("SEED") or str(random.randrange(1_000_000))
    os.environ.setdefault("FASTASR_GEMM", ("torch", "native")[seeded("product") % 2])
    return " ".join(f"{name}={os.environ[name]}" for name in ("SEED", "FASTASR_GEMM"))


def seeded(*parts: object) -> int:
    """Returns a seed made from the run's and from ``parts``, which tell apart what is drawn."""
    return zlib.crc32(f"{os.environ.get('SEED')} {parts}".encode())


def seed_torch(seed: int) -> None:
    """Seeds the numbers that torch draws, as ``torch.manual_seed`` does. Where there is no accelerator, that function
    formats the stack of its caller for each kind of them, which takes longer than many a call of an op.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
