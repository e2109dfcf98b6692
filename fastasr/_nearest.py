# SPDX-License-Identifier: Apache-2.0
"""Suggestions for a name that a module or a list lacks: the nearest names that it has."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message, which suggests the known name that is nearest to ``name``, or ""."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def nearest_or_all(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the nearest of the known names, or all of them if none is near."""
    known = list(known)
    return nearest(name, known) or f"; there are: {', '.join(known)}"


def no_attribute(module: str, name: str, known: Iterable[str]) -> AttributeError:
    """Returns the error of a module's ``__getattr__``, with the nearest name. It holds no object: with one,
    Python adds the nearest name once more.
    """
    return AttributeError(f"module {module!r} has no attribute {name!r}{nearest(name, known)}", obj=None)
