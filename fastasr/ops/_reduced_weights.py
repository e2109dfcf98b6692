# SPDX-License-Identifier: Apache-2.0
"""Copies of the weights of linear layers in fewer bits, which the products of inference read in their place.

``keep`` makes the copy of a parameter; from then on every product of an op with that parameter, or with a view of all
of it as a matrix, runs on the copy (csrc/cpu/gemm/reduced_gemm.h has the formulas). The parameter itself stays. If
it changes (:mod:`fastasr.ops._kept`), the next product makes the copy again. A copy lives as long as its parameter,
or until ``drop``.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastasr import _left
from fastasr.ops import _dispatch, _kept, _weight_formats

FORMATS = {format: _weight_formats.FORMATS[format] for format in ("bf16", "int8")}
MOST_INPUTS = 1 << 16  # as in csrc/cpu/gemm/reduced_gemm.h


def why_not(format: str) -> str:
    """Says why no product runs on such copies on this machine, or returns ""."""
    why = _dispatch.why_not_cpu("reduced_linear")
    if not why and format == "bf16" and not _dispatch.native_build_info()["bf16_gains"]:
        return "this processor has no instructions for bf16, or slow ones: float32 is as fast"
    return why


@functools.cache
def _product() -> Callable[..., Tensor]:
    return torch.ops.fastasr_cpu.reduced_linear.default  # One overload costs less to call.


class Copy:
    """The copy of one parameter. ``watch``, if given, is called with x, bias and the product's result."""

    def __init__(self, weight: Tensor, format: str) -> None:
        self.format = format
        self.watch: Callable[[Tensor, Tensor | None, Tensor], None] | None = None
        self._weight = weakref.ref(weight)
        self._pack()

    def _pack(self) -> None:
        weight = self._weight()
        assert weight is not None
        originals = _kept.Originals([weight], parts=_kept.PARTS)
        matrix = weight.detach().flatten(1).contiguous()
        self.packed = torch.ops.fastasr_cpu.reduced_pack(matrix, FORMATS[self.format])
        # These are set last: until then, other threads see that the copy is old.
        self._originals, self.address, self.outputs = originals, weight.data_ptr(), len(weight)
        _changed()

    @property
    def parameter(self) -> Tensor | None:
        """Returns the parameter while it lives."""
        return self._weight()

    @property
    def bytes(self) -> int:
        """Returns the size of the copy in memory."""
        return self.packed.nbytes

    def fresh(self) -> bool:
        """Says whether the parameter is alive and where it was when packed; packs it again if its values changed."""
        weight = self._weight()
        if weight is None or weight.data_ptr() != self.address:
            return False
        if not self._originals.unchanged([weight]):
            self._pack()
        return True

    def product(self, x: Tensor, bias: Tensor | None, input: int = 0) -> Tensor:
        """Returns x weightᵀ + bias for x (..., K). ``input`` is 1 for SwooshL(x) in place of x, 2 for SwooshR(x)."""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        y = _product()(rows, self.packed, bias, self.outputs, FORMATS[self.format], input)
        if x.dim() != 2:
            y = y.view(*x.shape[:-1], self.outputs)
        if self.watch is not None:
            self.watch(x, bias, y)
        return y


_by_parameter = WeakIdKeyDictionary()  # parameter -> its copy
copies: dict[int, Copy] = {}  # by the address of the parameter
_thread = threading.local()
_lock = threading.RLock()  # guards both dictionaries
_changes = 0


def generation() -> int:
    """Counts the changes of copies: a result found among them is valid while the number stays."""
    return _changes


def _changed() -> None:
    global _changes
    with _lock:
        _changes += 1
        _dispatch.FAMILIES["linear"].chosen.clear()


def keep(weight: Tensor, format: str) -> Copy:
    """Makes the copy of ``weight`` (N, K, 1...), float32 on the CPU, and has products read it."""
    with _lock:
        before: Copy | None = _by_parameter.get(weight)
        copy = Copy(weight, format)
        _refile(copy.address)
        _by_parameter[weight] = copies[copy.address] = copy
        if before is not None and copies.get(before.address) is before:
            del copies[before.address]  # Without any copy, other threads would look for none.
        weakref.finalize(weight, _forget, copy.address)
        _changed()
        return copy


def copy_of(weight: Tensor) -> Copy | None:
    """Returns the copy of a parameter, or None."""
    return _by_parameter.get(weight)


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """This thread's products read the parameters themselves inside the block."""
    before, _thread.suspended = is_suspended(), True
    try:
        yield
    finally:
        _thread.suspended = before


def is_suspended() -> bool:
    """Says whether this thread is inside ``suspended``."""
    return getattr(_thread, "suspended", False)


def _refile(address: int) -> None:
    """Moves the copy at an address that its parameter has left, if there is one, to the parameter's present address:
    products look for copies only while there are some."""
    copy = copies.pop(address, None)
    weight = None if copy is None else copy._weight()
    if weight is not None and _by_parameter.get(weight) is copy:
        copies.setdefault(weight.data_ptr(), copy)


def _forget(address: int) -> None:
    """Frees the copy at the address of a parameter that died, unless another parameter has its memory."""
    with _lock:
        copy = copies.get(address)
        if copy is not None and not copy.fresh():
            _refile(address)
            _changed()


def drop(weight: Tensor) -> bool:
    """Forgets the copy of ``weight``. Returns whether there was one."""
    with _lock:
        copy: Copy | None = _by_parameter.pop(weight, None)
        if copy is not None and copies.get(copy.address) is copy:
            del copies[copy.address]
        _changed()
    return copy is not None


def of(x: Tensor, weight: Tensor) -> Copy | None:
    """Returns the copy that the product of x with ``weight`` reads, or None."""
    if is_suspended():
        return None
    copy = copies.get(weight.data_ptr())
    if copy is None or not copy.fresh():
        copy = _moved(weight)
        if copy is None:
            return None
    if not x.numel():
        return None
    plain = x.dtype is torch.float32 and x.is_cpu and weight.dtype is torch.float32
    if plain and weight.dim() == 2 and len(weight) == copy.outputs:
        return copy
    what = "a part of it" if plain else f"{str(x.dtype).removeprefix('torch.')} tensors on {x.device.type}"
    _left.note(copy.parameter, f"float32 weights multiply {what}", "product")
    return None


def _moved(weight: Tensor) -> Copy | None:
    """Returns the copy of a parameter that has other memory than when it was packed, packed again."""
    with _lock:
        copy = copies.get(weight.data_ptr())
        if copy is not None and copy.fresh():  # another thread has packed it meanwhile
            return copy
        for candidate in (weight, weight._base):
            copy = None if candidate is None else _by_parameter.get(candidate)
            if copy is not None and candidate is not None and candidate.data_ptr() == weight.data_ptr():
                return keep(candidate, copy.format) if candidate.is_cpu else None
        _refile(weight.data_ptr())
    return None
