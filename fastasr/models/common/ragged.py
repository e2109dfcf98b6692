# SPDX-License-Identifier: Apache-2.0
"""Batches without padding: the frames of all recordings lie one after the other, as rows of one tensor.

Products, norms and activations run on these rows as on any others. Convolutions over time and attention are one call
each of an op that reads where recordings begin; Zipformer's attention is one native call on the CPU, and elsewhere runs
per recording, on views; short recordings of similar length share a call. A convolution that no op computes runs once
over all rows, with frames of zeros between the recordings. Copies are moves of rows, so that a backward pass takes time
linear in the rows. A GPU gets as many calls for many recordings as for few, because few
groups share calls of attention there, whatever the number of recordings.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastasr import _left
from fastasr._recording import has_values
from fastasr._tables import share
from fastasr._transforms import Function, is_transformed
from fastasr.models.common.plain import hooks_of
from fastasr.models.common.row import RowFrames
from fastasr.packed_frames import PackedFrames, packed

# Recordings shorter than SHORT whose lengths differ by at most LACKING frames share one call of attention, because a
# call costs more than that much padding. A GPU has work for many recordings at once: there recordings share a call if
# they lack half of the frames, or fewer than LACKING.
SHORT, LACKING = 64, 8
LACKING_ON_GPU = 256

# Hooks that serve packed frames too: those of FSDP, and those of transformers' outputs, which record only if asked for.
_HARMLESS = "torch.distributed.", "transformers.utils.output_capturing"

REFUSED = "the call has PackedFrames, but {}: pass the padded batch, packed.unpacked(longest)"

_all_padded = False


@contextmanager
def padded() -> Iterator[None]:
    """Has encoders run on padded batches inside the block, whatever ``ragged`` says, in all threads."""
    global _all_padded
    before, _all_padded = _all_padded, True
    try:
        yield
    finally:
        _all_padded = before


def are_all_padded() -> bool:
    """Says whether this is inside a block of ``padded``."""
    return _all_padded


def on_gpu(device: torch.device) -> bool:
    return device.type != "cpu"


def lengths(
    encoder: torch.nn.Module, valid: Tensor, why_not: Callable[[], str | None], least_on_gpu: int | None = 0
) -> list[int] | None:
    """Returns the frames of each recording, or None where the batch has no padding to leave out or the padding must
    stay, which this function notes.

    ``valid`` (B, T) is True at the frames that exist; on a GPU this function waits for it. ``why_not()`` returns why
    the encoder cannot leave padding out now, or None. Inside ``padded``, under torch.compile and tracing, which would
    take the lengths for constants, and under transforms, batches stay padded. A GPU computes the padding sooner than
    its host makes the calls without it: there inference stays padded, and so do training batches with less than
    ``least_on_gpu`` frames of padding. None: padding changes the values, so it never stays for the time.
    """
    if _all_padded or torch.jit.is_tracing() or is_transformed() or not has_values(valid):
        return None
    counts = valid.sum(-1)
    found = counts.tolist()
    if not 0 < sum(found) < valid.numel():
        return None
    if torch.equal(
        valid, torch.arange(valid.shape[1], device=valid.device, dtype=torch.int64) < counts[:, None]
    ):
        reason = why_not_hooked(encoder) or why_not()
        few = least_on_gpu is not None and (
            not torch.is_grad_enabled() or valid.numel() - sum(found) < least_on_gpu
        )
        if reason is None and few and on_gpu(valid.device):
            reason = "on a GPU that takes less time"
    else:
        reason = "its mask is not one of lengths"
    if reason is None:
        return found
    _left.note(encoder, f"this batch runs on its padding too: {reason}")
    return None


def of_packed(
    given: PackedFrames, encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], reason: str | None = None
) -> PackedFrames:
    """Returns what ``encode`` of a batch (B, T, ...) and its lengths (B,) -> (hidden states (B, T', ...), lengths (B,))
    makes of PackedFrames: the ragged encoder leaves the padding out again. It waits for the lengths.

    Raises ValueError for ``reason``, if given, and for PackedFrames that are none of features.
    """
    if reason is not None:
        raise ValueError(REFUSED.format(reason))
    given = given.of_features().to(given.frames.device)
    longest = max(1, *given.lengths.tolist())
    return packed(*encode(given.unpacked(longest), given.lengths))


def why_not_hooked(encoder: torch.nn.Module) -> str | None:
    """Returns which module inside the encoder has a hook that packed frames would surprise, or None."""
    for module, hooks in _hooked(encoder):
        if not all(getattr(hook, "__module__", "").startswith(_HARMLESS) for hook in hooks):
            name = next(name for name, other in encoder.named_modules() if other is module)
            return f"{name} has a hook, which would get packed frames"
    return None


def _hooked(encoder: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Iterable[Callable[..., Any]]]]:
    """Yields (module, its hooks) for the modules inside the encoder that have hooks.

    Every ragged call looks at all modules anew, so it misses no hook or module that was added meanwhile. The loop takes
    0.3 times as long as one over ``encoder.modules()``, which for a small batch was 3 % of the call.
    """
    modules = list(encoder.children())
    for module in modules:
        hooks = hooks_of(module)
        if any(hooks):
            yield module, chain.from_iterable(map(dict.values, hooks))
        if module._modules:
            modules.extend(child for child in module._modules.values() if child is not None)


class Group(NamedTuple):
    """Recordings that share a call: their numbers, the longest length, and (G, T) True behind their ends, or None."""

    members: list[int]
    longest: int
    hidden: Tensor | None


_local = threading.local()


class Packing:
    """The places of a batch's recordings in rows (N, ...), N the sum of ``lengths``; those may be 0.

    ``pads`` is False where a convolution of one recording depends on its length: then only equal lengths share a call.
    """

    def __init__(self, lengths: list[int], device: torch.device, pads: bool = True) -> None:
        self.lengths, self.device, self.pads = list(lengths), device, pads
        self._rates: dict[int, Rate] = {}
        self._found: dict[tuple[int, ...], Tensor] = {}

    @property
    def on_gpu(self) -> bool:
        return on_gpu(self.device)

    @property
    def count(self) -> int:
        """The number of recordings."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def _lacking(self, longest: int) -> int:
        if self.on_gpu:
            return max(longest // 2, LACKING_ON_GPU)
        return LACKING if longest <= SHORT else -1

    @functools.cached_property
    def groups(self) -> list[Group]:
        """Returns the recordings that share a call of attention; recordings without frames are in none."""
        return self._groups(self._lacking)

    @functools.cached_property
    def equal(self) -> list[Group]:
        """Returns the recordings of equal length, which share a call."""
        return self._groups(lambda longest: min(self._lacking(longest), 0))

    def _groups(self, lacking: Callable[[int], int]) -> list[Group]:
        groups: list[list[int]] = []
        longest = 0
        for i in sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i]):
            length = self.lengths[i]
            if groups and length and longest - length <= lacking(longest):
                groups[-1].append(i)
            elif length:
                groups.append([i])
                longest = length
        return [self._described(members) for members in groups]

    def _described(self, members: list[int]) -> Group:
        lengths = [self.lengths[i] for i in members]
        if min(lengths) == lengths[0]:
            return Group(members, lengths[0], None)
        frame = torch.arange(lengths[0], device=self.device, dtype=torch.int64)
        return Group(
            members,
            lengths[0],
            frame >= torch.tensor(lengths, device=self.device, dtype=torch.int64)[:, None],
        )

    def over_time(self, function: Callable[[Tensor, Tensor | None], Tensor], rows: Tensor) -> Tensor:
        """Calls ``function(x (T, G, ...), hidden (G, T) or None) -> (T, G, ...)`` for each group of recordings, of rows
        (N, 1, ...), and returns the rows of all."""
        return self.by_group(
            lambda x, hidden: function(x.transpose(0, 1), hidden).transpose(0, 1),
            rows[:, 0],
            groups=self.groups if self.pads else self.equal,
        ).unsqueeze(1)

    def by_group(
        self, function: Callable[..., Tensor], *rows: Tensor, groups: list[Group] | None = None
    ) -> Tensor:
        """Calls ``function(*tensors (G, T, ...), hidden (G, T) or None) -> (G, T, ...)`` for each group of recordings
        and returns the rows of all."""
        groups = self.groups if groups is None else groups
        calls = zip(*(self.stacked(t, groups) for t in rows), (group.hidden for group in groups), strict=True)
        return self.unstacked((function(*arguments) for arguments in calls), groups)

    def stacked(self, rows: Tensor, groups: list[Group] | None = None) -> Iterator[Tensor]:
        """Yields (G, T, ...) for each group."""
        groups = self.groups if groups is None else groups
        if self.on_gpu:
            places, sizes = self._places_in_groups(groups)
            placed = _Placed.apply(rows, places, sum(sizes))
            parts = placed.split(sizes) if len(sizes) > 1 else [placed]
            for group, part in zip(groups, parts, strict=True):
                yield part.unflatten(0, (len(group.members), group.longest))
            return
        pieces = rows.split(self.lengths)
        for group in groups:
            yield _stacked([pieces[i] for i in group.members], group.longest)

    def unstacked(self, tensors: Iterable[Tensor], groups: list[Group] | None = None) -> Tensor:
        """Returns the rows of tensors (G, T, ...), one for each group."""
        groups = self.groups if groups is None else groups
        if self.on_gpu:
            parts = [y.flatten(0, 1) for y in tensors]
            rows = torch.cat(parts) if len(parts) > 1 else parts[0]
            return _Taken.apply(rows, self._places_in_groups(groups)[0])
        lengths = self.lengths
        done: list[Tensor | None] = [None] * len(lengths)
        for group, y in zip(groups, tensors, strict=True):
            ones = (y.squeeze(0),) if len(group.members) == 1 else y.unbind(0)
            for i, one in zip(group.members, ones, strict=True):
                # a backward pass copies for a slice
                done[i] = one if len(one) == lengths[i] else one[: lengths[i]]
        return torch.cat([one for one in done if one is not None])

    def _places_in_groups(self, groups: list[Group]) -> tuple[Tensor, list[int]]:
        """Returns the places of the rows among those of all groups, and how many rows each group has."""
        begins = [0] * len(self.lengths)
        sizes: list[int] = []
        for group in groups:
            first = sum(sizes)
            for place, i in enumerate(group.members):
                begins[i] = first + place * group.longest
            sizes.append(len(group.members) * group.longest)
        return self._places(tuple(begins)), sizes

    def _places(self, begins: tuple[int, ...]) -> Tensor:
        """Returns the places (N,) of the rows where the recordings begin at ``begins``."""
        if begins not in self._found:
            like: Any = {"dtype": torch.int64, "device": "cpu"}  # on the CPU nothing waits for a GPU
            sizes = torch.tensor(self.lengths, **like)
            before = (torch.tensor(begins, **like) - sizes.cumsum(0) + sizes).repeat_interleave(sizes)
            self._found[begins] = (torch.arange(len(before), **like) + before).to(self.device)
        return self._found[begins]

    def spread(self, rows: Tensor, slots: list[int]) -> Tensor:
        """Returns rows (N, ...) with zeros behind each recording, so that it takes its number of ``slots``."""
        return _Placed.apply(rows, self._places(_begins(slots)), sum(slots))

    def gathered(self, rows: Tensor, slots: list[int]) -> Tensor:
        """Undoes ``spread``."""
        return _Taken.apply(rows, self._places(_begins(slots)))

    def of_batch(self, batch: Tensor) -> Tensor:
        """Returns the rows (N, ...) of a batch (T, B, ...)."""
        like: Any = {"dtype": torch.int64, "device": "cpu"}
        sizes = torch.tensor(self.lengths, **like)
        frame = torch.arange(sum(self.lengths), **like) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        return _Taken.apply(batch.flatten(0, 1), frame.to(self.device) * len(sizes) + self.recording)

    @functools.cached_property
    def sizes(self) -> Tensor:
        """Returns the lengths (B,)."""
        return torch.tensor(self.lengths, device=self.device, dtype=torch.int64)

    @functools.cached_property
    def starts(self) -> Tensor:
        """Returns where recordings begin, and where the last one ends, (B + 1,)."""
        starts = torch.tensor([0, *accumulate(self.lengths)], device=self.device, dtype=torch.int64)
        share(starts)
        return starts

    @functools.cached_property
    def recording(self) -> Tensor:
        """Returns the number of each frame's recording, (N,)."""
        return torch.arange(len(self.lengths), device=self.device, dtype=torch.int64).repeat_interleave(
            self.sizes, output_size=sum(self.lengths)
        )

    def repeated(self, values: Tensor) -> Tensor:
        """Returns values (B, ...) of the recordings, repeated for their frames, (N, ...)."""
        return _Repeated.apply(values, self)

    def at_rate(self, factor: int) -> "Rate":
        """Returns the packing of the recordings after downsampling by ``factor``, and which rows meet."""
        if factor not in self._rates:
            self._rates[factor] = Rate(self, factor)
        return self._rates[factor]

    def with_gaps(self, frames: int) -> list[int]:
        """Returns the slots that leave ``frames`` zeros behind each recording."""
        return [length + frames for length in self.lengths]

    def batch(self, rows: Tensor, frames: int) -> Tensor:
        """Returns (B, frames, ...), 0 behind each recording's end."""
        return self.spread(rows, [frames] * len(self.lengths)).unflatten(0, (len(self.lengths), frames))


class Rate:
    """Maps frames of a packing to those of ``slower``, the recordings after downsampling by ``factor``, and back."""

    def __init__(self, packing: Packing, factor: int) -> None:
        self.factor = factor
        self.slower = Packing([-(-n // factor) for n in packing.lengths], packing.device, packing.pads)
        # on the CPU, where nothing waits for a GPU
        one, other = (Packing(p.lengths, torch.device("cpu")) for p in (packing, self.slower))
        sizes, owner, slots = one.sizes, one.recording, other.sizes * factor
        owner_of_slot = other.recording.repeat_interleave(factor)
        first, first_slot = sizes.cumsum(0) - sizes, slots.cumsum(0) - slots
        within = torch.arange(len(owner_of_slot), dtype=torch.int64, device="cpu") - first_slot[owner_of_slot]
        # The frame of every slot (behind a recording's end its last one), the slot of every frame, slots behind ends.
        frames = first[owner_of_slot] + torch.minimum(within, sizes[owner_of_slot] - 1)
        of_frames = torch.arange(len(owner), dtype=torch.int64, device="cpu") + (first_slot - first)[owner]
        behind = (within >= sizes[owner_of_slot]).nonzero()[:, 0]
        self.frames, self.slots, self.behind = (t.to(packing.device) for t in (frames, of_frames, behind))

    def grouped(self, rows: Tensor) -> Tensor:
        """Returns rows (N, ...) as (N', factor, ...): a recording ends with its own last frame, repeated."""
        return _Grouped.apply(rows, self).unflatten(0, (-1, self.factor))

    def averaged(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Returns Σ_i weights[i] grouped[:, i], (N', ...), for weights (factor,)."""
        return (self.grouped(rows) * weights.view(-1, *(1,) * (rows.dim() - 1))).sum(1)

    def upsampled(self, rows: Tensor) -> Tensor:
        """Returns rows (N', ...) of ``slower``, repeated, as (N, ...)."""
        return _Upsampled.apply(rows, self)


class _Placed(Function):
    """Returns ``count`` rows: the given ones at their ``places``, zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.places = places
        return _placed(rows, places, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.places), None, None


class _Taken(Function):
    """Returns the rows at ``places``, each of which is named once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.count = places, len(rows)
        return rows.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _placed(grad, ctx.places, ctx.count), None


def _placed(rows: Tensor, places: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, places, rows)


def _begins(slots: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(slots, initial=0))[:-1]


class _Repeated(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return values.index_select(0, packing.recording)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packing = ctx.packing
        if not packing.on_gpu:
            return torch.stack([one.sum(0) for one in grad.split(packing.lengths)]), None
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return torch.segment_reduce(wide, "sum", lengths=packing.sizes, axis=0, unsafe=True).to(
            grad.dtype
        ), None


class _Grouped(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rate: Rate) -> Tensor:
        ctx.rate = rate
        return rows.index_select(0, rate.frames)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rate = ctx.rate
        last = rate.frames.index_select(0, rate.behind)
        more = grad.index_select(0, rate.behind)
        return grad.index_select(0, rate.slots).index_put_((last,), more, accumulate=True), None


class _Upsampled(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rate: Rate) -> Tensor:
        ctx.rate = rate
        return rows.index_select(0, rate.slots // rate.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rate = ctx.rate
        slots = grad.index_select(0, rate.frames).index_fill_(0, rate.behind, 0.0)
        return slots.unflatten(0, (-1, rate.factor)).sum(1), None


@contextmanager
def in_use(packing: Packing | RowFrames | None) -> Iterator[None]:
    """Has ``current()`` return this packing, or None, in this thread, inside the block."""
    before, _local.packing = current(), packing
    try:
        yield
    finally:
        _local.packing = before


def current() -> Packing | RowFrames | None:
    """Returns the packing of the frames that modules in this thread get now, or None where they get padded batches."""
    return getattr(_local, "packing", None)


def frames_of_nobody(x: Tensor, channel_dim: int = -1) -> Tensor | None:
    """Returns True at frames of nobody, where modules in this thread get a row that has some: in the shape of x without
    the dimension of the channels. Before that of the frames x has no other, or dimensions of size 1."""
    packing = current()
    if not isinstance(packing, RowFrames):
        return None
    shape = list(x.shape)
    del shape[channel_dim]
    return packing.hidden.view(-1, 1).expand(-1, math.prod(shape) // packing.frames).reshape(shape)


def with_zeros(pieces: Sequence[Tensor], slots: Sequence[int]) -> Tensor:
    """Returns the pieces as rows, with zeros behind each, so that it takes its number of ``slots``."""
    zeros = pieces[0].new_zeros(max(slots), *pieces[0].shape[1:])
    return torch.cat([
        part
        for piece, slot in zip(pieces, slots, strict=True)
        for part in (piece, zeros[: slot - len(piece)])
    ])  # fmt: skip


def _stacked(pieces: Sequence[Tensor], longest: int) -> Tensor:
    """Returns (G, longest, ...): one recording as it lies in memory, or several with zeros behind."""
    if len(pieces) == 1:
        return pieces[0].unsqueeze(0)
    return with_zeros(pieces, [longest] * len(pieces)).unflatten(0, (len(pieces), longest))
