# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of whole models: one file per model with ``NAME``, ``measure`` and ``QUICK``, the arguments of a quick
run.

Every ``measure`` takes ``settings``, ``reps``, ``compile_model`` (measure upstream under torch.compile too, where that
is possible), ``skip(case, shape, pass)``, which leaves a unit out, and ``report``. It yields the rows unit by unit and
raises ``upstream.MissingUpstream``.
"""

import pkgutil
from importlib import import_module

_FOUND = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
MODULES = {module.NAME: module for module in _FOUND if hasattr(module, "NAME")}


def names() -> list[str]:
    return list(MODULES)
