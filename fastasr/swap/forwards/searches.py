# SPDX-License-Identifier: Apache-2.0
"""Searches, whose code is upstream's: while one runs, language models keep what they found for earlier tokens."""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from fastasr.models.common.plain import is_watched
from fastasr.swap.forwards import ctc_scorers
from fastasr.swap.rule import Upstream, upstream_forward

T = TypeVar("T")


class _Thread(threading.local):
    # Module -> (what its results depend on, what it keeps), while a search runs
    kept: "weakref.WeakKeyDictionary[Any, tuple] | None" = None
    last: tuple = ()  # the modules of whose results the search reads the last token's alone


_thread = _Thread()


def search(self: Upstream, *args: Any, **kwargs: Any) -> Any:
    """Serves ESPnet's searches."""
    with running(), ctc_scorers.served(self.scorers.values()):
        return upstream_forward(self, *args, **kwargs)


@contextlib.contextmanager
def running(last: Iterable[Any] = ()) -> Iterator[None]:
    """Marks a block as a search. ``last``: modules of whose results it reads the last token's alone."""
    before = _thread.kept, _thread.last
    _thread.kept, _thread.last = weakref.WeakKeyDictionary(), tuple(last)
    try:
        yield
    finally:
        _thread.kept, _thread.last = before


def is_running() -> bool:
    """Says whether a swapped search runs in this thread."""
    return _thread.kept is not None


def reads_last_token(module: Upstream) -> bool:
    """Says whether the search that runs in this thread, and nobody else, reads the module's result of the last token
    alone."""
    return any(module is one for one in _thread.last) and not is_watched(module)


def kept(module: Upstream, form: tuple, find: Callable[[], T]) -> T | None:
    """Returns what the module keeps in the search that runs in this thread, at first ``find()``; None if none runs."""
    places = _thread.kept
    if places is None:
        return None
    found = places.get(module)
    if found is None or found[0] != form:
        found = places[module] = form, find()
    result: T = found[1]
    return result
