# SPDX-License-Identifier: Apache-2.0
"""Notices changes of tensors from which something is kept between calls.

Kept are:

- projected positions of an attention module (``models/fast_conformer/attention.py``), and the table of positions of an
  encoder (``models/fast_conformer/positions.py``);
- the packed weights of a layer's native call (``models/common/packed_layers.py``: Zipformer's layers, Emformer's), and
  of a decoder's step (``models/mega/decoding.py``; on a GPU its coefficients);
- the weight of a convolution under weight norm (``models/common/convolutions.py``);
- the weights of a greedy search (``models/transducer/predictors.py``);
- an engine's copy of a whole encoder (``asr/streaming/encoder.py``);
- weights in fewer bits (``ops/_reduced_weights.py``);
- the projections of an encoder's frames in a search (``models/common/repeated_inputs.py``);
- the hidden keys of an attention mask (``models/fast_conformer/masks.py``), which are compared by :func:`content`.

Each of the others holds :class:`Originals`, a record of the tensors that it was made of, and is made again when they
differ from it. The address, torch's counter of writes and whether the tensor is contiguous are compared; writes through
``parameter.data``, through a NumPy view and by another process leave both as they were. So on the CPU one native call
also compares a sample of the values: eight cache lines of each tensor, or all of a tensor of at most 512 bytes
(csrc/cpu/support/kept.h). Before short calls it compares only one of the eight, the next one at the next call. A write
to all elements cannot hide from it, an uncounted write to a few can. On a GPU values are not compared, because the host
would have to wait for them.
:func:`drop` is for both cases.
"""

import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastasr.ops import _dispatch

T = TypeVar("T")
PARTS = 8  # kKeptPieces of csrc/cpu/support/kept.h
_RETURNED = 1 << 16  # From this many bytes on, the allocator may have returned memory to the system.
_SAMPLED = 256  # Without the native library, this many elements of a tensor are compared.
counter: Callable[[Tensor], int] = vars(torch._C.TensorBase)["_version"].__get__
_address = Tensor.data_ptr
_every: "weakref.WeakSet[Originals]" = weakref.WeakSet()
_lock = threading.RLock()  # guards the set


class Originals:
    """A record of ``tensors``, to which it holds no reference.

    ``compared``: those of them whose values are sampled, by default all. ``parts``: the number of calls of
    ``unchanged`` over which the comparison is spread, 1 to 8. ``counted`` says whether torch counts the writes to each
    tensor: it does not if one was made in inference mode, and may not if one is of a subclass.
    """

    def __init__(
        self, tensors: Sequence[Tensor], compared: Sequence[Tensor] | None = None, parts: int = 1
    ) -> None:
        self.counted, self._dropped = are_counted(tensors), False
        self._marks = self._marked(tensors)
        self._pieces: Iterator[Tensor] | None = None
        self._sample: list[Tensor] | None = None
        sampled = list(filter(_is_readable, tensors if compared is None else compared))
        if sampled and _dispatch.why_not_cpu("kept_pieces"):
            self._sample = [t.clone() for t in _sampled(tensors)]
        elif sampled:
            spans = torch.tensor(
                [(_address(t), _extent(t)) for t in sampled], dtype=torch.int64, device="cpu"
            )
            pieces = (torch.ops.fastasr_cpu.kept_pieces.default(spans, i, parts) for i in range(parts))
            self._pieces = itertools.cycle(list(pieces))
            # Their sizes are compared too: a smaller tensor at the old address may end before a compared piece.
            large = [i for i, t in enumerate(tensors) if t.nbytes >= _RETURNED]
            self._large = operator.itemgetter(*large, large[0]) if large else lambda tensors: ()
            self._sizes = [*map(Tensor.numel, self._large(tensors))]
            self._holds = _dispatch.registered("cpu", "kept_unchanged")
        self._ids = frozenset(map(id, tensors))
        with _lock:
            _every.add(self)

    def _marked(self, tensors: Sequence[Tensor]) -> tuple[list, list, list] | None:
        counts = [*map(counter, tensors)] if self.counted else []
        try:  # A transposed view of a square weight has its address.
            return counts, [*map(_address, tensors)], [*map(Tensor.is_contiguous, tensors)]
        except (RuntimeError, ValueError):  # no address: lazy layers before a call, for example
            return None

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Says whether ``tensors``, the tensors of the record, seem unchanged."""
        return (
            not self._dropped
            and self._marked(tensors) == self._marks
            and (self._pieces is None or self._same_values(tensors, self._pieces))
            and (self._sample is None or all(map(torch.equal, _sampled(tensors), self._sample)))
        )

    def _same_values(self, tensors: Sequence[Tensor], pieces: Iterator[Tensor]) -> bool:
        same_sizes = [*map(Tensor.numel, self._large(tensors))] == self._sizes
        return same_sizes and self._holds(next(pieces))


def drop(tensors: Iterable[Tensor]) -> int:
    """Has everything made of one of these tensors made again. Returns the number of these things."""
    ids, dropped = set(map(id, tensors)), 0
    with _lock:
        every = list(_every)
    for originals in every:
        if not originals._dropped and not ids.isdisjoint(originals._ids):
            originals._dropped = True
            dropped += 1
    return dropped


def content(mask: Tensor) -> object:
    """Returns a key for the content of a bool tensor. Two keys of one tensor are equal only if it has not changed
    between them, as far as shows without waiting for a GPU."""
    if not mask.is_cpu:
        return None if mask.is_inference() else mask._version
    if not _is_readable(mask) or _dispatch.why_not_cpu("kept_digest"):
        return object()
    return torch.ops.fastasr_cpu.kept_digest.default(mask)


def on(owner: Any, name: str, version: object, find: Callable[[], T]) -> T:
    """Returns ``find()``, which stays with ``owner`` as its attribute ``name`` while ``version`` is the same. What was
    found in inference mode serves that mode alone: no gradient may keep its tensors."""
    version = version, torch.is_inference_mode_enabled()
    kept = getattr(owner, name, None)
    if kept is None or kept[0] != version:
        kept = version, find()
        setattr(owner, name, kept)
    return kept[1]


def are_counted(tensors: Sequence[Tensor]) -> bool:
    """Says whether torch counts the writes to each tensor."""
    return all(type(t) in _dispatch.PLAIN and not t.is_inference() for t in tensors)


def _is_readable(t: Tensor) -> bool:
    return type(t) in _dispatch.PLAIN and t.is_cpu and t.layout is torch.strided and t.numel() > 0


def _extent(t: Tensor) -> int:
    """Returns the bytes from a tensor's first element to its last."""
    return t.itemsize * (1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)))


@torch.no_grad()
def _sampled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.flatten()[:: t.numel() // _SAMPLED + 1] for t in filter(_is_readable, tensors)]
