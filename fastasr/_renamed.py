# SPDX-License-Identifier: Apache-2.0
"""Serves a module's old names, with a warning, until the next release drops them."""

import warnings
from collections.abc import Callable


def old_names(module: dict, renamed: dict[str, str]) -> Callable[[str], object]:
    """Returns the ``__getattr__`` of a module, given by its ``globals()``; ``renamed`` maps old names to new ones."""

    def getattr_(name: str) -> object:
        if name not in renamed:
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        old, new = (f"{module['__name__']}.{n}" for n in (name, renamed[name]))
        warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
        return module[renamed[name]]

    return getattr_
