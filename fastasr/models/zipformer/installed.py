# SPDX-License-Identifier: Apache-2.0
"""Finds out which Python modules are installed."""

import importlib.util


def is_module_available(*modules: str) -> bool:
    """Says whether all of these top-level modules can be found. The function does not import them."""
    return all(importlib.util.find_spec(module) is not None for module in modules)
