# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the ops: one file per op, or per ops that share their kernels. ``CASES`` are measured everywhere,
``ON_DEVICE`` by ``python -m fastasr.benchmarks.studies.device`` on a GPU."""

import pkgutil
from importlib import import_module

from fastasr.benchmarks.case import Case

MODULES = tuple(import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))


def cases() -> list[Case]:
    """Returns every case of every op."""
    return [case for module in MODULES for case in module.CASES]


def names() -> list[str]:
    """Returns the ops that have cases, in table order."""
    return list(dict.fromkeys(case.op for case in cases()))
