# SPDX-License-Identifier: Apache-2.0
"""The rules of every framework. A module or package of this folder that has ``RULES`` is a family of rules."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastasr.swap import binding
from fastasr.swap.rule import Rule, Upstream
from fastasr.swap.rules import torch

_MODULES = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
_FRAMEWORKS = [module.RULES for module in _MODULES if module is not torch and hasattr(module, "RULES")]

# Every family ends with the rules for torch's own classes, which apply if a rule of the framework matched a module.
FAMILIES = tuple((*rules, *torch.RULES) for rules in _FRAMEWORKS)


def rules_by_forward() -> dict[Any, Rule]:
    """Returns {forward: rule} for every forward that a rule binds."""
    return {forward: rule for family in FAMILIES for rule in family for forward in rule.forwards}


def swapped_modules(model: Upstream) -> Iterator[tuple[str, nn.Module, Rule]]:
    """Yields (path, module, rule) for every swapped module of ``model``."""
    by_forward = rules_by_forward()
    for path, module in model.named_modules():
        forward = binding.bound_forward(module)
        if forward is not None:
            yield path, module, by_forward[forward]
