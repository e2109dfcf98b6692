# SPDX-License-Identifier: Apache-2.0
"""A layer of transformers' cache that has one row for all beams of a recording."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastasr.swap.rule import Upstream


def _rows(name: str) -> Any:
    def read(self: "SharedRows") -> Tensor | None:
        if not self.shares:
            self.spread()
        return self.held[name]

    def write(self: "SharedRows", t: Tensor | None) -> None:
        self.spread()
        self.held = self.held | {name: t}  # not in place: a shallow copy has the same dict

    return property(read, write)


class SharedRows:
    """What upstream's layer gets before its own methods. Inside ``shared()`` it has a row for each recording. Who reads
    or writes its keys or values elsewhere gives it a row for each beam from then on, because a reader may write in
    place."""

    keys, values = _rows("keys"), _rows("values")
    held: dict[str, Any]  # None in place of a tensor after a reset
    beams: int
    shares: bool
    owners: Tensor  # the recording of each beam

    def spread(self) -> None:
        """Makes a row for each beam."""
        if self.beams > 1:
            self.held = {name: t.repeat_interleave(self.beams, 0) for name, t in self.held.items()}
            self.beams = 1

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        self.shares = True
        try:
            yield
        finally:
            self.shares = False

    def get_seq_length(self) -> int:
        keys = self.held["keys"]
        return 0 if keys is None else keys.shape[-2]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Does nothing where beams change places with those of their own recording, as in every beam search."""
        if self.beams == 1 or not torch.equal((beam_idx // self.beams).to(self.owners), self.owners):
            upstream: Any = super()
            upstream.reorder_cache(beam_idx)

    def __reduce__(self) -> tuple:
        return _made, (type(self).__bases__[1], vars(self))


@functools.cache
def _class(kind: type) -> type:
    return type("SharedLayer", (SharedRows, kind), {})


def _made(kind: type, attributes: dict[str, Any]) -> Any:
    layer: Any = object.__new__(_class(kind))
    vars(layer).update(attributes)
    return layer


def shared_layer(layer: Upstream, beams: int) -> Any:
    """Returns upstream's layer with ``SharedRows``. Each of its rows stands for this many beams."""
    attributes = vars(layer).copy()
    held = {name: attributes.pop(name) for name in ("keys", "values")}
    rows = torch.arange(len(held["keys"]), device=held["keys"].device, dtype=torch.int64)
    own = {"held": held, "beams": beams, "shares": False, "owners": rows.repeat_interleave(beams)}
    return _made(type(layer), attributes | own)


def beams_of(layer: Upstream, rows: int) -> int:
    """Returns for how many of a decoder's rows each row of the layer stands."""
    return layer.beams if isinstance(layer, SharedRows) and len(layer.owners) == rows else 1
