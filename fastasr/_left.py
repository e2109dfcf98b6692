# SPDX-License-Identifier: Apache-2.0
"""Remembers why calls left fastasr's fastest path, for a log line and for ``fastasr.why``.

A call that runs fastasr's fastest path leaves no trace and costs nothing. One that leaves it, for upstream's code or
for operations one by one, calls ``note``, which is the whole mechanism: any object of any layer of the package may be
noted.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fastasr._transforms import is_transformed, transform

_log = logging.getLogger("fastasr")


@dataclass
class Left:
    """The calls of one method of an object that left: why the last one did, and how many there were."""

    reason: str = ""
    calls: int = 0


_left = WeakIdKeyDictionary()  # object -> method -> Left
_logged: set[tuple[type, str, str]] = set()  # class, method, reason: a model has many objects of a class
_thread = threading.local()


def note(obj: object, reason: str, method: str = "forward", level: int = logging.WARNING) -> None:
    """Records that a call of ``method`` leaves, and why, and logs it the first time: once per class, method and reason,
    so a reason must not contain details that differ from call to call.

    Does nothing under torch.compile and torch.export, which trace this function away, and inside ``ignored``.
    ``level`` is INFO if the caller asked for it, as for gradients or a transform.
    """
    if torch.compiler.is_compiling() or is_ignored():
        return
    if is_transformed():  # A transform comes before the caller's reason.
        reason, level = f"the call is under {transform()}", logging.INFO
    methods = _left.get(obj)
    if methods is None:
        methods = _left.setdefault(obj, {})
    left = methods.get(method)
    if left is None:
        left = methods.setdefault(method, Left())
    left.reason = reason
    left.calls += 1
    kind = type(obj), method, reason
    if kind not in _logged:
        _logged.add(kind)
        _log.log(level, "%s.%s leaves fastasr's fast path: %s", type(obj).__name__, method, reason)


def of(obj: object) -> dict[str, Left]:
    """Returns method -> Left of the object's calls that left."""
    return _left.get(obj, {})


def is_ignored() -> bool:
    """Says whether this thread is inside a block of ``ignored``."""
    return getattr(_thread, "ignored", False)


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Notes nothing in this thread inside the block, where fastasr itself makes the calls to compare both ways."""
    before, _thread.ignored = is_ignored(), True
    try:
        yield
    finally:
        _thread.ignored = before
