# SPDX-License-Identifier: Apache-2.0
"""Which Python modules there are."""

import importlib.util


def is_module_available(*modules):
    """Whether all of these top-level modules can be found. None of them is imported."""
    return all(importlib.util.find_spec(module) is not None for module in modules)
