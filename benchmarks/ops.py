# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the ops, which their modules of samples declare. ``CASES`` are measured everywhere, ``ON_DEVICE``
by ``python -m fastasr.benchmarks.device`` on a GPU."""

import pkgutil
from importlib import import_module

from fastasr.testing import samples
from fastasr.testing.speed import Case

MODULES = tuple(import_module(f"{samples.__name__}.{m.name}") for m in pkgutil.iter_modules(samples.__path__))


def cases() -> list[Case]:
    """Returns every case of every op."""
    return [case for module in MODULES for case in getattr(module, "CASES", ())]


def names() -> list[str]:
    """Returns the ops that have cases, in table order."""
    return list(dict.fromkeys(case.op for case in cases()))
