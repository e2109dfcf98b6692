# SPDX-License-Identifier: Apache-2.0
"""Answers to names that a module or a list lacks: the nearest name, or a module's old name, with a warning, until the
next release drops it."""

import difflib
import warnings
from collections.abc import Callable, Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message, which suggests the known name that is nearest to ``name``, or ""."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def nearest_or_all(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the nearest of the known names, or all of them if none is near."""
    known = list(known)
    return nearest(name, known) or f"; there are: {', '.join(known)}"


def old_names(module: dict, renamed: dict[str, str]) -> Callable[[str], object]:
    """Returns the ``__getattr__`` of a module, given by its ``globals()``; ``renamed`` maps old names to new ones."""

    def getattr_(name: str) -> object:
        if name not in renamed:
            # without an object, since Python would add the nearest name once more
            raise AttributeError(
                f"module {module['__name__']!r} has no attribute {name!r}{nearest(name, module['__all__'])}",
                obj=None,
            )
        old, new = (f"{module['__name__']}.{n}" for n in (name, renamed[name]))
        warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
        return module[renamed[name]]

    return getattr_
